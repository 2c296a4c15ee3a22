"""Wall clock and counted work: the teacher, guided, at all its steps beside the student, in one process."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flcompress.core.program import Program
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network, select
from flcompress.diffusion.sampling import sample
from flcompress.draws import generator
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.evaluation.backends import BACKENDS, EAGER, Unusable, available_cores, compiled, cpu_name, onnx_network
from flcompress.files import write_text
from flcompress.models.latent_size import folder_grid
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network
from flcompress.progress import ProgressSink

DENOISING, PIPELINE = "denoising", "pipeline"
PROMPT = "what the clip shows"
"""Every prompt is padded to one length, so its text does not matter."""


@dataclass
class Sampler:
    """One model behind one backend, as it is timed.

    Attributes:
        network: the velocity.
        contract: how it is sampled.
        evaluations: network evaluations of the last clip, counted as they happen.
        seconds: what each round took, by what was timed.
    """

    network: Network
    contract: SamplingContract
    evaluations: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {DENOISING: [], PIPELINE: []})

    def counted(self, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning) -> torch.Tensor:
        """Call the network and count the call."""
        self.evaluations += 1
        return self.network(x, timestep, given)


class _Stage:
    """What both models share: text encoder and autoencoder, one prompt, one noise of the size that is sampled."""

    def __init__(self, program: Program) -> None:
        self._parts = program.parts()
        self.noise = torch.randn(1, *program.latents, generator=generator("bench", "noise"))
        grid = folder_grid(program.components["transformer"], program.components["vae"])
        self._clip = torch.zeros(1, 3, *grid.clip(program.latents[1:]))  # its first frame is black

    def conditioning(self, contract: SamplingContract) -> tuple[Conditioning, Conditioning | None]:
        """The prompt's conditioning and, only where the contract guides, the negative one's, as in a stock pipeline."""
        prompts = [PROMPT, contract.negative_prompt] if contract.guided else [PROMPT]
        length = contract.max_sequence_length
        made = self._parts.encode_prompts(prompts, length)
        given = select(made, slice(0, 1)) | self._parts.encode_images(self._clip, [PROMPT], length)
        return given, select(made, slice(1, 2)) if contract.guided else None

    @torch.no_grad()
    def generate(self, sampler: Sampler) -> tuple[float, float]:
        """Make one clip; the seconds of the denoising loop, and of the whole pipeline (text, denoising, decoding)."""
        sampler.evaluations = 0
        started = time.perf_counter()
        prompt, negative = self.conditioning(sampler.contract)
        encoded = time.perf_counter()
        again = generator("bench", "noise again")
        start = self._parts.family.start(self.noise, prompt)
        latents = sample(sampler.counted, sampler.contract, start, prompt, negative, again)
        denoised = time.perf_counter()
        self._parts.decode_latents(latents)
        return denoised - encoded, time.perf_counter() - started

    def flops(self, sampler: Sampler) -> int:
        """Floating point operations of one network evaluation, counted by torch."""
        from torch.utils.flop_counter import FlopCounterMode

        prompt, _ = self.conditioning(sampler.contract)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            sampler.network(self.noise, torch.full((1,), sampler.contract.timesteps[0]), prompt)
        return int(counter.get_total_flops())


def bench(
    run: RunDirectory,
    rounds: int = 5,
    progress: ProgressSink | None = None,
    backends: Sequence[str] = BACKENDS,
) -> dict[str, Any]:
    """Time the teacher, guided, against the student, one clip at a time, and write RUN/bench/results.json.

    Every round runs each backend's teacher and then its student, so that a busy moment of the machine meets both.
    Before the first round each is run once untimed. `ratio` is that of the two times of a round.

    Args:
        run: a finished run.
        rounds: interleaved repetitions.
        progress: told after every clip.
        backends: which of `BACKENDS` to time; "torch eager" always is.

    Returns:
        What the file holds. A time or ratio is {"median", "low", "high"}, low and high being the extremes over rounds;
        a backend that cannot run here is in "skipped" with the reason.
    """
    program, key = run.final(), run.key
    if program.contract.experts is not None:
        raise RequestError(
            f"{run.path}: a {program.pipeline_class} with two experts, which bench does not time yet; expected a model "
            "with one transformer; time 'flcompress generate' instead"
        )
    stage = _Stage(program)
    teacher_model = load_transformer(program.components["original"])
    student_model = load_transformer(program.components["transformer"])
    pairs = {EAGER: (as_network(teacher_model), as_network(student_model))}
    makers: dict[str, Callable[[], tuple[Network, Network]]] = {
        "torch.compile": lambda: _compiled(program),
        # The teacher is not exported: its eager time is what the student's is held against.
        "ONNX Runtime": lambda: (pairs[EAGER][0], onnx_network(run.exports / "onnx" / "model.onnx")),
    }
    skipped = []
    for name, make in makers.items():
        if name in backends:
            try:
                pairs[name] = make()
            except Unusable as reason:
                skipped.append({"backend": name, "reason": str(reason)})
    samplers = {
        name: (Sampler(teacher, program.teacher_contract), Sampler(student, program.contract))
        for name, (teacher, student) in pairs.items()
    }
    if "ONNX Runtime" in samplers:  # one teacher stands in both rows and is timed once a round
        samplers["ONNX Runtime"] = (samplers[EAGER][0], samplers["ONNX Runtime"][1])
    _time(stage, list({id(s): s for pair in samplers.values() for s in pair}.values()), rounds, progress)
    sides = {
        "teacher": _work(stage, samplers[EAGER][0], teacher_model),
        "student": _work(stage, samplers[EAGER][1], student_model),
    }
    work = {side: counted["evaluations"] * counted["parameters"] for side, counted in sides.items()}
    results = {
        "program": key,
        "machine": _machine(next(student_model.parameters()).device),
        "rounds": rounds,
        "batch": 1,
        "work_ratio": work["teacher"] / work["student"],
        **sides,
        "rows": [_row(name, what, *samplers[name]) for name in samplers for what in (DENOISING, PIPELINE)],
        "skipped": skipped,
    }
    folder = run.path / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def _compiled(program: Program) -> tuple[Network, Network]:
    # Compiling changes a model in place, so these are loaded anew.
    teacher, student = (load_transformer(program.components[name]) for name in ("original", "transformer"))
    return compiled(teacher), compiled(student)


def _time(stage: _Stage, samplers: Sequence[Sampler], rounds: int, progress: ProgressSink | None) -> None:
    total = (rounds + 1) * len(samplers)
    for number in range(rounds + 1):
        for place, sampler in enumerate(samplers):
            denoising, pipeline = stage.generate(sampler)
            if number > 0:  # the first one warms up: threads, caches, compilation
                sampler.seconds[DENOISING].append(denoising)
                sampler.seconds[PIPELINE].append(pipeline)
            if progress is not None:
                progress(number * len(samplers) + place + 1, total, {"seconds": pipeline})


def _work(stage: _Stage, sampler: Sampler, model: Any) -> dict[str, int]:
    """Counted, not assumed: evaluations of the last clip, parameters of the module, operations of a forward."""
    evaluations = sampler.evaluations
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "evaluations": evaluations,
        "flops": evaluations * stage.flops(sampler),
    }


def _row(backend: str, what: str, teacher: Sampler, student: Sampler) -> dict[str, Any]:
    slow, fast = teacher.seconds[what], student.seconds[what]
    return {
        "backend": backend if backend != "ONNX Runtime" else "ONNX Runtime (teacher: torch eager)",
        "what": what,
        "teacher_seconds": _spread(slow),
        "student_seconds": _spread(fast),
        "ratio": _spread([a / b for a, b in zip(slow, fast, strict=True)]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _machine(device: torch.device) -> dict[str, Any]:
    """What computed: a GPU that only is there is not named."""
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "system": platform.platform(),
    }
