"""What a pass is. The passes themselves live in `passes/`, one file each; see docs/writing-a-pass.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from flcompress.errors import PreconditionError
from flcompress.pipeline.program import Fact, Program

if TYPE_CHECKING:
    from flcompress.data.latents import LatentDataset

ProgressSink = Callable[[int, int, Mapping[str, float]], None]
"""Called with (done, total, values to show)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the pass manager hands a pass for one application.

    Attributes:
        directory: the pass's own folder. It writes new components ("transformer/", ...), `result.json` (a summary the
            report reads) and `metrics.jsonl` (one object a step) here; whatever is left of a killed attempt is still
            here on the next. On success the whole folder becomes the stored result.
        seed: the recipe's seed.
        data: gives the recipe's clips and captions as latents, encoded with a program's autoencoder and text encoder
            (cached). Raises DataError where the recipe has no data.
        progress: told how far the work is.
        device: "cpu" or "cuda".
    """

    directory: Path
    seed: int
    data: Callable[[Program], LatentDataset]
    progress: ProgressSink
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a pass will take, for the plan of a dry run.

    Attributes:
        steps: training steps, or 0.
        forwards: forwards of one sample through the full transformer, in total; a backward counts as two.
        batch: samples that are in memory at once.
        trained: parameters of trained models held at once (weights, gradients, two moments).
        averaged: parameters of which a moving average is held.
        frozen: parameters of frozen models held at once.
    """

    steps: int = 0
    forwards: float = 0.0
    batch: int = 1
    trained: float = 0.0
    averaged: float = 0.0
    frozen: float = 0.0


class Pass(BaseModel, ABC):
    """One rewrite of a program; its validated, frozen fields are its recipe arguments.

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

    @property
    def needs(self) -> frozenset[Fact]:
        """Facts that must hold before. A property, since it may depend on the arguments."""
        return frozenset()

    @property
    def needs_clips(self) -> bool:
        """Whether prompts alone do not do. A property, since it may depend on the arguments."""
        return self.needs_data

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
        """What this pass will take, for the plan.

        Args:
            parameters: of the transformer as the pass meets it.
            blocks: of the same.
            original: parameters of the transformer that the recipe started from.
        """
        return Cost()

    @abstractmethod
    def apply(self, program: Program, work: Work) -> Program:
        """Do the work. Facts are set by `__call__`, not here."""

    def __call__(self, program: Program, work: Work) -> Program:
        """Check the needs, apply, verify the result's graph, set its facts."""
        facts = self.flow(program.facts)
        result = self.apply(program, work)
        result.graph.verify()
        return replace(result, facts=facts)
