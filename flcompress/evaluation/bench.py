"""Wall clock, memory and counted work: the teacher, guided, at all its steps next to the student, in one process."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flcompress.core.backend import Backend
from flcompress.core.program import Program
from flcompress.core.records import BenchFile, ClipPart, SpeedRow, Spread, WorkPart
from flcompress.core.registry import find_backend, known_backends
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network, select, to_device
from flcompress.diffusion.sampling import sample
from flcompress.draws import generator
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import FlcompressError, RequestError
from flcompress.evaluation.backends import COMPONENTS, Role, Sampler, Samplers, Side
from flcompress.evaluation.machine import MemoryMeter, machine, memory_in_use
from flcompress.models.loading import meta_transformer
from flcompress.progress import ProgressSink
from flcompress.runtime.backends.options import choose_backends
from flcompress.runtime.sizes import sizes_of
from flcompress.runtime.torch_session import best_device

DENOISING, PIPELINE = "denoising", "pipeline"
PROMPT = "what the clip shows"
"""Every prompt is padded to one length, so its text does not matter."""

Pair = dict[Side, Sampler]

PixelSize = tuple[int, int, int]
"""(frames, height, width) of a clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one clip took: seconds and peak bytes of the denoising loop and of the whole pipeline."""

    seconds: dict[str, float]
    memory: dict[str, int | None]


def read_size(text: str) -> PixelSize:
    """Read FRAMESxHEIGHTxWIDTH, in pixels; RequestError for anything else."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise RequestError(f"--size: {text} given, expected FRAMESxHEIGHTxWIDTH, such as 81x480x832")
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


class _Stage:
    """What both models share: text encoders and autoencoder, prompts, a first frame, noise of the size sampled."""

    def __init__(self, program: Program, device: str, batch: int, size: PixelSize | None) -> None:
        grid = sizes_of(program)
        self.clip = grid.clip(program.latents[1:]) if size is None else size
        names = ("--size, frames", "--size, height", "--size, width")
        shape = program.latents[1:] if size is None else grid.latents(*size, names)
        self.latents = (program.latents[0], *shape)
        self._parts, self._device, self._prompts = program.parts(device), device, [PROMPT] * batch
        self.noise = torch.randn(batch, *self.latents, generator=generator("bench", "noise")).to(device)
        self._first = torch.zeros(batch, 3, *self.clip, device=device)  # its first frame is black
        self._meter = MemoryMeter(device)
        before = memory_in_use(device)
        self.conditioning(program.contract)
        self._parts.decode_latents(self.noise)
        self._parts_bytes = max(0, memory_in_use(device) - before)

    def conditioning(self, contract: SamplingContract) -> tuple[Conditioning, Conditioning | None]:
        """Return that of the prompts and, only where the contract guides, of the negative one, as a stock pipeline."""
        prompts = [*self._prompts, contract.negative_prompt] if contract.guided else self._prompts
        length, batch = contract.max_sequence_length, len(self._prompts)
        every = to_device(self._parts.encode_prompts(prompts, length), self._device)
        first = to_device(self._parts.encode_images(self._first, self._prompts, length), self._device)
        negative = select(every, slice(batch, batch + 1)) if contract.guided else None
        return select(every, slice(0, batch)) | first, negative

    @torch.no_grad()
    def generate(self, sampler: Sampler) -> Measurement:
        """Make one batch of clips: text encoding, denoising, decoding."""
        sampler.calls = dict.fromkeys(sampler.calls, 0)
        self._meter.begin()
        started = self._now()
        given, negative = self.conditioning(sampler.contract)
        encoded, encoding = self._now(), self._meter.growth()
        self._meter.begin()
        fresh = generator("bench", "noise again")
        start = self._parts.family.start(self.noise, given)
        latents = sample(sampler.network, sampler.contract, start, given, negative, fresh)
        latents = self._parts.family.end(self._parts.config, latents, given)
        denoised, denoising = self._now(), self._meter.growth()
        self._meter.begin()
        self._parts.decode_latents(latents)
        ended, decoding = self._now(), self._meter.growth()
        growths = [growth for growth in (encoding, denoising, decoding) if growth is not None]
        held, whole = sampler.weight_bytes, len(growths) == 3
        return Measurement(
            seconds={DENOISING: denoised - encoded, PIPELINE: ended - started},
            memory={
                DENOISING: None if denoising is None else held + denoising,
                PIPELINE: held + self._parts_bytes + max(growths) if whole else None,
            },
        )

    def flops(self, network: Network, timestep: float, given: Conditioning) -> int:
        """Return the floating point operations of one network evaluation, counted by torch."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(self.noise, torch.full((len(self.noise),), timestep, device=self.noise.device), given)
        return int(counter.get_total_flops())

    def _now(self) -> float:
        """Return the clock's time once the GPU has done all that was asked of it."""
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def bench(
    run: RunDirectory,
    rounds: int = 5,
    progress: ProgressSink | None = None,
    backends: Sequence[str] | None = None,
    *,
    size: PixelSize | None = None,
    batch: int = 1,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Time the teacher, guided, against the student, one batch at a time, and write RUN/bench/results.json.

    On the GPU if there is one, in the precision that `flcompress generate` uses. Every round runs each backend's
    teacher and then its student, so that a busy moment of the machine meets both. Before the first round each is run
    once untimed. `ratio` is that of the two times of a round.

    Args:
        run: a finished run.
        rounds: interleaved repetitions.
        progress: called after every clip.
        backends: what to time in addition to torch eager, which always is; None: every backend that can.
        size: (frames, height, width) of the clips, in pixels; None: the size that the run's model is sampled at.
        batch: samples generated at once.
        options: of the backends, by name; each goes to every backend that has it.

    Returns:
        What the file holds. A time or ratio is {"median", "low", "high"}, low and high being the extremes over rounds;
        a peak of memory is in bytes, the weights of that side included; a backend that cannot run here is in "skipped"
        with the reason.

    Raises:
        RequestError: an unfinished run; a size that the model does not take; a backend that was asked for and is not
            exported in this run or not available here; an unknown backend or option.
        FlcompressError: the GPU's memory is too small.
    """
    for name in backends or ():
        find_backend(name)
    others = [name for name in known_backends() if name != "torch" and (backends is None or name in backends)]
    chosen = choose_backends(["torch", *others], options)
    try:
        return _bench(run, rounds, progress, chosen, size, batch, needed=backends is not None)
    except torch.OutOfMemoryError as error:
        raise FlcompressError(
            f"bench: out of GPU memory ({' '.join(str(error).split())[:120]}...); give a smaller --size or --batch, or "
            "fewer backends with --backend torch"
        ) from error


def _bench(
    run: RunDirectory,
    rounds: int,
    progress: ProgressSink | None,
    backends: Sequence[Backend],
    size: PixelSize | None,
    batch: int,
    *,
    needed: bool,
) -> dict[str, Any]:
    program, key, device = run.final(), run.key, best_device()
    samplers = Samplers(run, program, backends[0])
    for backend in backends if needed else ():
        samplers.check(backend)
    stage = _Stage(program, device, batch, size)
    pairs, skipped, measured = _Rounds(stage, device, rounds, progress).measure(samplers, backends, needed=needed)
    eager = pairs[backends[0]]
    sides: dict[Side, WorkPart] = {side: _work(stage, samplers, eager, side) for side in COMPONENTS}
    results = BenchFile(
        program=key,
        family=program.family.name,
        pipeline=program.pipeline_class,
        size=ClipPart(**dict(zip(("frames", "height", "width"), stage.clip, strict=True))),
        latents=list(stage.latents),
        batch=batch,
        device=device,
        precision=eager["student"].precision,
        machine=machine(device),
        rounds=rounds,
        work_ratio=_total(sides["teacher"]) / _total(sides["student"]),
        teacher=sides["teacher"],
        student=sides["student"],
        rows=[
            _row(backend.label if backend.stock else f"{backend.label} (teacher: torch eager)", what, pair, measured)
            for backend, pair in pairs.items()
            for what in (DENOISING, PIPELINE)
        ],
        skipped=skipped,
    )
    folder = run.path / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    results.write(folder / "results.json")
    return results.dump()


class _Rounds:
    """The clips of a bench: one with each sampler to warm up, then interleaved rounds."""

    def __init__(self, stage: _Stage, device: str, rounds: int, progress: ProgressSink | None) -> None:
        self._stage, self._device, self._rounds, self._progress = stage, device, rounds, progress
        self._done, self._samplers = 0, 0
        self._pairs: dict[Backend, Pair] = {}
        self._skipped: list[dict[str, str]] = []

    def measure(
        self, samplers: Samplers, backends: Sequence[Backend], *, needed: bool
    ) -> tuple[dict[Backend, Pair], list[dict[str, str]], dict[Sampler, list[Measurement]]]:
        """Return the pairs by backend, what was skipped and why, and the measurements of every sampler.

        Args:
            samplers: where they come from.
            backends: torch's, then the others.
            needed: whether one that cannot run is an error.
        """
        fresh = {backend: 2 if backend.stock else 1 for backend in backends}
        self._samplers = sum(fresh.values())
        for backend in backends:
            try:
                self._pairs[backend] = self._warm(samplers, backend)
            except FlcompressError as reason:
                if needed or not self._pairs:  # torch, the first, is always needed
                    raise
                self._skipped.append({"backend": backend.label, "reason": str(reason)})
                self._samplers -= fresh[backend]
        order = list(dict.fromkeys(sampler for pair in self._pairs.values() for sampler in pair.values()))
        measured: dict[Sampler, list[Measurement]] = {sampler: [] for sampler in order}
        for _ in range(self._rounds):
            for sampler in order:
                measured[sampler].append(self._clip(sampler))
        return self._pairs, self._skipped, measured

    def _warm(self, samplers: Samplers, backend: Backend) -> Pair:
        """Load, and generate once untimed: threads, caches, compilation."""
        before = memory_in_use(self._device)
        pair = samplers.of(backend)
        known = {sampler for other in self._pairs.values() for sampler in other.values()}
        for sampler in pair.values():
            if sampler not in known:
                self._clip(sampler)
        if not backend.stock and self._device == "cuda":
            # The memory of another library, which it keeps: weights and room for activations.
            pair["student"].weight_bytes = max(0, memory_in_use(self._device) - before)
        return pair

    def _clip(self, sampler: Sampler) -> Measurement:
        measurement = self._stage.generate(sampler)
        self._done += 1
        if self._progress is not None:
            total = (self._rounds + 1) * self._samplers
            self._progress(self._done, total, {"seconds": measurement.seconds[PIPELINE]})
        return measurement


def _work(stage: _Stage, samplers: Samplers, eager: Pair, side: Side) -> WorkPart:
    """Count, never assume: evaluations of the last clip, parameters of the module, operations of a forward.

    "evaluations" and "flops" are those of all transformers; of two experts "own_evaluations" are those of the one that
    is compressed, and "partner" has the other's.
    """
    sampler = eager[side]
    contract = sampler.contract
    given, _ = stage.conditioning(contract)
    counted: dict[Role, WorkPart] = {}
    for role, network in sampler.networks.items():
        calls, timesteps = sampler.calls[role], _timesteps(contract, role)
        shape = meta_transformer(samplers.folder(side, role))
        counted[role] = WorkPart(
            parameters=sum(parameter.numel() for parameter in shape.parameters()),
            evaluations=calls,
            flops=calls * stage.flops(network, timesteps[0], given) if timesteps else 0,
        )
    own = counted["transformer"]
    if (partner := counted.get("partner")) is None:
        return own
    return WorkPart(
        parameters=own.parameters,
        evaluations=own.evaluations + partner.evaluations,
        own_evaluations=own.evaluations,
        flops=own.flops + partner.flops,
        partner=partner,
    )


def _timesteps(contract: SamplingContract, role: Role) -> list[float]:
    """Return the timesteps that a transformer answers."""
    own = set(contract.own_steps)
    return [t for index, t in enumerate(contract.timesteps) if (index in own) == (role == "transformer")]


def _total(side: WorkPart) -> int:
    """Return the work of one side: evaluations times parameters, of both of two experts."""
    own = side.evaluations if side.own_evaluations is None else side.own_evaluations
    partner = 0 if side.partner is None else side.partner.evaluations * side.partner.parameters
    return own * side.parameters + partner


def _row(label: str, what: str, pair: Pair, measured: dict[Sampler, list[Measurement]]) -> SpeedRow:
    slow, fast = ([one.seconds[what] for one in measured[pair[side]]] for side in COMPONENTS)
    memory = {side: _peak([one.memory[what] for one in measured[pair[side]]]) for side in COMPONENTS}
    return SpeedRow(
        backend=label,
        what=what,
        precision=pair["student"].precision,
        teacher_seconds=_spread(slow),
        student_seconds=_spread(fast),
        ratio=_spread([a / b for a, b in zip(slow, fast, strict=True)]),
        teacher_memory=memory["teacher"],
        student_memory=memory["student"],
    )


def _peak(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))
