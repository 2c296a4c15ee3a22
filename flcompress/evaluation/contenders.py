"""Contenders of an evaluation: the teacher, its shortcuts, each stage's output, and the student of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flcompress.core.backend import Backend
from flcompress.core.program import Fact, Program
from flcompress.diffusion.contract import SamplingContract, resample
from flcompress.diffusion.network import Conditioning, Network, select, to_device
from flcompress.diffusion.sampling import IntraGuidance
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.evaluation.backends import Sampler, Samplers
from flcompress.ir.graph import BlockGraph
from flcompress.models.loading import load_transformer, meta_transformer
from flcompress.models.network import as_network
from flcompress.models.stock_files import folder_digest
from flcompress.models.tensor_memory import free_gpu_memory
from flcompress.tracing.self_attention import frame_local_blocks, frame_local_network
from flcompress.tracing.skip import skipping_network

SHORTCUT_STEPS = 4
"""Steps of the teacher's shortcut if the run has no few-step student."""

Guidance = tuple[float, float]
"""(b1, b2) in u + b1 (c - u) + b2 (c - c_pruned), FastLightGen's well-guided teacher."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model and the way it is sampled.

    Attributes:
        name: short name in tables and files.
        label: name for readers.
        network: its velocity.
        contract: its sampling contract.
        intra: guidance away from a weaker model, beside the contract's by text.
        parameters: parameters that take part in one network evaluation.
        identity: digest of everything that decides the output of `network`, so that its clips can be cached; "" if
            they must not be.
        release: frees the memory of the transformers that it and its siblings loaded.
    """

    name: str
    label: str
    network: Network
    contract: SamplingContract
    parameters: int
    identity: str = ""
    intra: IntraGuidance | None = None
    release: Callable[[], None] = lambda: None

    @property
    def evaluations(self) -> int:
        """Network evaluations of one sample."""
        return self.contract.evaluations + (len(self.contract.timesteps) if self.intra else 0)


def run_contenders(
    run: RunDirectory,
    device: str = "cpu",
    backends: Sequence[Backend] = (),
    guidances: Sequence[Guidance] = (),
    frame_local: float | None = None,
    *,
    stages: bool = True,
) -> list[Contender]:
    """Return the contenders of a finished run, in the order of the tables. Weights are loaded at first use.

    On a GPU they compute in bf16, as stock pipelines do there, and only the transformers of one are in memory.

    Args:
        run: the run.
        device: what torch computes on.
        backends: further ones that run the student, each a contender by itself.
        guidances: (b1, b2) of well-guided teachers, each a contender by itself: the laws that distribution matching
            converges to.
        frame_local: share of the run's result, in parameters, whose blocks attend within latent frames in one more
            contender: those of the least attention on other frames.
        stages: whether what lies between teacher and student is a contender: the pruned model without training, and
            Stage II's.

    Raises:
        RequestError: guidance away from the pruned teacher of a run that prunes nothing; a backend, and the run has no
            student, no such export, or a damaged or earlier one; see `frame_local_blocks`.
        UnavailableError: a backend cannot run on this machine.
    """
    start, final = run.start(), run.final()
    parts = _Transformers(final, start.graph, device)
    teacher = final.teacher_contract
    few = final.contract.num_inference_steps if Fact.FEW_STEP in final.facts else SHORTCUT_STEPS
    guided = f"{teacher.num_inference_steps} steps" + (", guided" if teacher.guided else "")
    contenders = [parts.contender(f"teacher-{teacher.num_inference_steps}", f"teacher, {guided}", "original", teacher)]
    if few != teacher.num_inference_steps:
        shortcut = resample(teacher, few, final.family.sigmas)
        contenders.append(parts.contender(f"teacher-{few}", f"teacher, {few} steps", "original", shortcut))
    cut = final.prune_set
    contenders += [parts.well_guided(guidance, teacher, cut) for guidance in guidances]
    if cut and stages:
        contenders.append(parts.contender("raw-pruned", f"raw-pruned, {guided}", "original", teacher, cut))
    if stages and parts.digest("elastic") != parts.digest("original"):
        contenders.append(
            parts.contender("stochastic-depth-full", f"Stage II, full depth, {guided}", "elastic", teacher)
        )
        if cut:
            label = f"Stage II, pruned, {guided}"
            contenders.append(parts.contender("stochastic-depth-pruned", label, "elastic", teacher, cut))
    result = contenders[0]
    if parts.digest("transformer") != parts.digest("original") or final.contract != teacher:
        label = f"student, {final.contract.num_inference_steps} steps"
        result = parts.contender("student", label, "transformer", final.contract)
        contenders.append(result)
        contenders += [_behind(backend, result, Samplers(run, final, backend), parts) for backend in backends]
    elif backends:
        raise RequestError(f"--backend: {backends[0].name} given, but {run.path} has trained no student to run")
    if frame_local is not None:
        blocks = frame_local_blocks(final.graph, frame_local, run.path)
        label = f"{result.label}, {len(blocks)} of {len(final.graph.blocks)} blocks frame-local"
        name = f"frame-local-{frame_local:g}"
        contenders.append(parts.contender(name, label, "transformer", final.contract, local=blocks))
    return contenders


def _behind(backend: Backend, student: Contender, samplers: Samplers, parts: _Transformers) -> Contender:
    """Return the student behind a backend, which is checked now and loaded at first use."""
    samplers.check(backend)
    loaded: list[Sampler] = []

    def network(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        if not loaded:
            parts.release()
            loaded.append(samplers.student(backend))
        at_once = len(x) if backend.stock else 1  # a clip at a time is what every export takes
        clips = [slice(start, start + at_once) for start in range(0, len(x), at_once)]
        run = loaded[0].network
        return torch.cat([run(x[index], timestep[index], select(conditioning, index)) for index in clips])

    def release() -> None:
        loaded.clear()
        samplers.release()

    return replace(
        student,
        name=f"{student.name}-{backend.name}",
        label=f"{student.label}, {backend.label}",
        network=network,
        identity=samplers.identity(backend),
        release=release,
    )


class _Transformers:
    """Transformers of a program, each loaded once, and only if it is sampled."""

    def __init__(self, program: Program, unpruned: BlockGraph, device: str) -> None:
        self._components = program.components
        self._unpruned = unpruned
        self._device = device
        self._room = 1 if program.contract.experts is None else 2
        self._loaded: dict[Path, Any] = {}

    def _load(self, folder: Path) -> Any:
        """Load once; on a GPU in bf16, and of other contenders' transformers none stays in memory."""
        if folder not in self._loaded:
            if self._device != "cpu":
                while len(self._loaded) >= self._room:
                    del self._loaded[next(iter(self._loaded))]
                free_gpu_memory()
            half = None if self._device == "cpu" else torch.bfloat16
            self._loaded[folder] = load_transformer(folder, self._device, half)
        return self._loaded[folder]

    def release(self) -> None:
        self._loaded.clear()
        free_gpu_memory()

    def _run(self, network: Network, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning) -> torch.Tensor:
        return network(x.to(self._device), timestep.to(self._device), to_device(given, self._device)).to(x)

    def digest(self, component: str) -> str:
        return folder_digest(self._components[component])

    def contender(
        self,
        name: str,
        label: str,
        component: str,
        contract: SamplingContract,
        skipped: tuple[str, ...] = (),
        local: tuple[str, ...] = (),
    ) -> Contender:
        """Return a transformer without the skipped blocks, or one whose local blocks attend within latent frames."""
        folder = self._components[component]
        shape = meta_transformer(folder)
        skipped_parameters = {id(p) for path in skipped for p in shape.get_submodule(path).parameters()}

        guidance, experts = contract.embedded_guidance, contract.experts

        def own(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            model = self._load(folder)
            if skipped:
                run = skipping_network(model, skipped, self._unpruned, guidance)
            else:
                run = frame_local_network(model, local, guidance) if local else as_network(model, guidance)
            return self._run(run, x, timestep, conditioning)

        def partner(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            run = as_network(self._load(self._components[partner_component]), guidance)
            return self._run(run, x, timestep, conditioning)

        # A few-step student has the partner that its recipe names; teachers have the model's own.
        partner_component = "partner" if component == "transformer" else "original_partner"
        network = own if experts is None else experts.combine(own, partner)
        changed = (*skipped, *(("frame-local", *local) if local else ()))
        decisive = (self.digest(component), *changed, *((self.digest(partner_component),) if experts else ()))
        return Contender(
            name=name,
            label=label,
            network=network,
            contract=contract,
            parameters=sum(p.numel() for p in shape.parameters() if id(p) not in skipped_parameters),
            identity=" ".join(decisive),
            release=self.release,
        )

    def well_guided(self, guidance: Guidance, teacher: SamplingContract, skipped: tuple[str, ...]) -> Contender:
        """Return the teacher at other guidance: by text, and away from itself without the skipped blocks."""
        by_text, intra = guidance
        experts = teacher.experts and replace(teacher.experts, guidance_scale=by_text)
        contract = replace(teacher, guidance_scale=by_text, experts=experts)
        name, label = f"guided-{by_text:g}-{intra:g}", f"teacher, b1 = {by_text:g}, b2 = {intra:g}"
        contender = self.contender(name, label, "original", contract)
        if intra == 0.0:
            return contender
        if not skipped:
            raise RequestError(
                f"--guidance: {by_text:g} {intra:g} given, but the run prunes no block to guide away from; give b2 = 0"
            )
        weak = self.contender(name, label, "original", contract, skipped)
        identity = f"{contender.identity} {weak.identity} {intra:g}"
        return replace(contender, intra=IntraGuidance(weak.network, intra), identity=identity)
