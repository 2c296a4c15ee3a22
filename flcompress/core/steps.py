"""Passes and exporters; see docs/writing-a-pass.md. They themselves live in `passes/` and `exporters/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict

from flcompress.core.program import Fact, Program
from flcompress.core.settings import AttentionName, EngineName, Health, LogName, OffloadName, Precision, Training
from flcompress.distributed.world import World
from flcompress.errors import PreconditionError
from flcompress.progress import ProgressSink

if TYPE_CHECKING:
    from flcompress.data.dataset import LatentDataset
    from flcompress.diffusion.contract import SamplingContract


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """The context in which the pass manager applies a pass.

    Attributes:
        directory: the pass's own folder. It writes new components ("transformer/", ...), `result.json` (a summary the
            report reads) and `metrics.jsonl` (one object a step) here; whatever is left of a killed attempt is still
            here on the next. On success the whole folder becomes the stored result.
        seed: the recipe's seed.
        data: gives the recipe's clips and captions as latents, encoded with a program's autoencoder and text encoder
            (cached). Raises DataError where the recipe has no data.
        progress: called with the steps that are done.
        say: shows one line.
        device: "cpu" or "cuda".
        world: the processes that share the work; one, but for passes that are `distributed`.
        engine: how they share a training.
        precision: precision of forwards and backwards in training: "fp32", or "bf16" (autocast over fp32 weights).
        gradient_checkpointing: whether trained models recompute their blocks in the backward pass.
        compile: whether blocks run through torch.compile.
        attention: kernel of attention; see `training.attention`.
        offload: what a training keeps in host memory; see `training.offload`.
        health: how its training is watched.
        log_to: destinations of its figures, in addition to the report.
        note: adds an event to the run's journal.
        checkpoint_seconds: between two checkpoints of a training; 0 writes one after every step.
        background_checkpoints: whether they are written while the training continues.
        micro_batch: samples that are in memory at once in one process, at most; see `at_once`.
        earlier_seconds: what attempts that were ended before took; for the main process, which writes what a pass took.
    """

    directory: Path
    seed: int
    data: Callable[[Program], LatentDataset]
    progress: ProgressSink
    say: Callable[[str], None] = lambda text: None
    device: str = "cpu"
    world: World = field(default_factory=World)
    engine: EngineName = "local"
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    attention: AttentionName = "native"
    offload: tuple[OffloadName, ...] = ()
    health: Health = field(default_factory=Health)
    log_to: tuple[LogName, ...] = ()
    note: Callable[..., None] = lambda event, name, **values: None
    checkpoint_seconds: float = 60.0
    background_checkpoints: bool = False
    micro_batch: int | None = None
    earlier_seconds: float = 0.0

    def at_once(self, batch: int) -> int:
        """Samples in one forward of a process, of a batch over all of them."""
        own = max(1, batch // self.world.data_size)
        return min(own, self.micro_batch or own)


@dataclass(frozen=True, slots=True)
class Role:
    """A model that a pass holds in memory.

    Attributes:
        name: what it is for: "generator", "real score", ...
        parameters: how many are its own. Weights that several roles share (a LoRA's base) are a role of their own.
        trained: whether it has gradients and optimiser moments.
        moments: what the optimiser keeps of a trained parameter: two numbers, one where beta1 is 0.
        averaged: whether a moving average of it is kept.
        updates: optimiser steps in each of the pass's steps.
        runs: parameters of all that its update keeps activations of, a shared base's included; its own where None.
        forwards: forwards in each of the pass's steps that no backward follows, in forwards of all its blocks.
        backwards: those that a backward follows; its updates where None, and none if it is not trained.
        blockless: whether it is no transformer with blocks: a LoRA, a discriminator.
    """

    name: str
    parameters: float
    trained: bool = False
    moments: int = 2
    averaged: bool = False
    updates: int = 1
    runs: float | None = None
    forwards: float = 0.0
    backwards: float | None = None
    blockless: bool = False


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a pass, for the plan.

    Attributes:
        steps: training steps, or 0.
        forwards: forwards of one sample through the full transformer, in total; a backward counts as two.
        recomputed: how many of these forwards gradient checkpointing repeats.
        batch: samples of a step, over all processes; of a pass that does not train, those in memory at once in each.
        roles: the models that are in memory at once.
        half: whether a pass that does not train computes in the training's precision where there is a GPU.
        keeps_activations: whether it keeps what every block returned in host memory, for the samples in memory at once.
        keeps_features: whether it keeps what every block of a frozen model returned beside the trained one's.
    """

    steps: int = 0
    forwards: float = 0.0
    recomputed: float = 0.0
    batch: int = 1
    roles: tuple[Role, ...] = ()
    half: bool = False
    keeps_activations: bool = False
    keeps_features: bool = False


class Pass(BaseModel, ABC):
    """A rewrite of a program; its validated, frozen fields are its recipe arguments.

    In a recipe `- prune: {remove: 0.3}` becomes `Prune(remove=0.3)`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raise it when the pass's result changes for the same arguments: it is part of the cache key."""
    gives: ClassVar[frozenset[Fact]] = frozenset()
    voids: ClassVar[frozenset[Fact]] = frozenset()
    needs_data: ClassVar[bool] = False
    """Whether it reads clips or prompts: a recipe without `data:` is then refused before any work."""
    own_clips: ClassVar[str | None] = None
    """The kind of `data:` whose clips it draws itself: a recipe with any other kind is then refused before any work."""
    added: ClassVar[tuple[str, ...]] = ()
    """Arguments that an earlier release did not have: no part of a cache key while they have their default."""
    whole_clips: ClassVar[bool] = False
    """Whether it needs whole clips in each process: `training.sequence_parallel` is then refused."""
    distributed: ClassVar[bool] = False
    """Whether all processes apply it together (see `PassContext.world`); else the main one does and the others wait.

    Every process gets the same arguments and must return the same program; only the main one writes results.
    """

    @property
    def needs(self) -> frozenset[Fact]:
        """Facts that must hold before. A property, since it may depend on the arguments."""
        return frozenset()

    @property
    def engines(self) -> tuple[EngineName, ...]:
        """Engines that it can train with. A property, since it may depend on the arguments."""
        return get_args(EngineName)

    @property
    def guides(self) -> bool:
        """Whether it guides by text itself, so that a negative prompt has an effect whatever the model's own scale."""
        return False

    @property
    def needs_clips(self) -> bool:
        """Whether the pass needs clips, not only prompts. A property, since it may depend on the arguments."""
        return self.needs_data

    def held_out(self, clips: int, training: Training) -> int:
        """Return how many of the last of `clips` clips it does not train on; all of them if it does not train."""
        return 0 if self.needs_data else clips

    def flow(self, facts: frozenset[Fact]) -> frozenset[Fact]:
        """The facts after this pass. Used to check a whole recipe before any work.

        Raises:
            PreconditionError: a needed fact does not hold.
        """
        missing = sorted(self.needs - facts)
        if missing:
            raise PreconditionError(
                f"{self.name}: needs the program to be {', '.join(missing)}; it is {', '.join(sorted(facts)) or 'not'}"
            )
        return (facts - self.voids) | self.gives

    def remaining(self, parameters: float) -> float:
        """Expected share of the transformer's parameters that this pass leaves; for the plan."""
        return parameters

    def evaluations(self, evaluations: int) -> int:
        """Network evaluations for one sample after this pass, given those before; for the plan."""
        return evaluations

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        """Return the cost of this pass, for the plan.

        Args:
            parameters: parameters of the transformer before the pass.
            blocks: its number of blocks.
            original: parameters of the transformer that the recipe started from.
        """
        return Cost()

    def evaluation_forwards(self, parameters: float, original: float, teacher: int, health: Health) -> float:
        """Return the forwards of one sample through the full transformer that all held-out evaluations take.

        Args:
            parameters: parameters of the transformer before the pass.
            original: parameters of the transformer that the recipe started from.
            teacher: network evaluations of one of the teacher's samples.
            health: how often, and on how many samples.
        """
        return 0.0

    def check(self, training: Training) -> None:
        """Refuse, before any work, a training that this pass cannot be part of. Raises RequestError."""

    def check_model(self, contract: SamplingContract) -> None:
        """Refuse, before any work, a model that is sampled in a way that this pass cannot follow. Raises RequestError.

        Args:
            contract: how the recipe's model is sampled.
        """

    @abstractmethod
    def apply(self, program: Program, context: PassContext) -> Program:
        """Do the work. Facts are set by `__call__`, not here."""

    def __call__(self, program: Program, context: PassContext) -> Program:
        """Check the needs, apply, free what it leaves, verify the result's graph, set its facts."""
        from flcompress.models.tensor_memory import free_gpu_memory

        facts = self.flow(program.facts)
        result = self.apply(program, context)
        free_gpu_memory()
        result.graph.verify()
        return replace(result, facts=facts)


class Exporter(BaseModel, ABC):
    """Turns the last program of a recipe into something that runs; its fields are its recipe arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    version: ClassVar[int] = 1
    after: ClassVar[tuple[str, ...]] = ()
    """Exporters whose output this one reads; they must stand before it in the recipe."""
    added: ClassVar[tuple[str, ...]] = ()
    """Arguments that an earlier release did not have: no part of a cache key while they have their default."""

    def check(self) -> None:
        """Raise UnavailableError if this machine lacks what the export needs. Called before any work of a recipe."""

    def fingerprint(self) -> str:
        """Return what else decides the output than program, arguments and version, such as a builder's version."""
        return ""

    @abstractmethod
    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        """Write the export.

        Args:
            program: the last program of the recipe.
            folder: empty folder to write to; it is moved to `exports / name` on success.
            exports: `RUN/exports`, which holds the exports named by `after`.
            progress: reports how far the work is.

        Returns:
            A summary for the terminal and the report (file sizes, measured differences, ...).

        Raises:
            PostconditionError: the export fails its own check.
        """
