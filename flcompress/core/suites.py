"""What an evaluation suite is, and what it is asked for. The suites themselves are in `evaluation/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from flcompress.core.backend import Backend
from flcompress.errors import RequestError
from flcompress.progress import Display


@dataclass(frozen=True, kw_only=True)
class SuiteRequest:
    """What `flcompress eval` was asked for.

    Attributes:
        run: the run directory.
        model: the model folder that the run started from, if it has moved.
        clips_per_prompt: clips of each prompt for each seed; the recipe's number by default.
        seeds: repetitions; the recipe's number by default.
        prompts: file of prompts, one a line; the data's held-out ones by default.
        images: folder of first frames, for models that start from one.
        against: runs, stock pipeline folders, or files that name one, to compare with.
        backends: further ones that run the student, each judged beside torch's.
        guidances: (b1, b2) of well-guided teachers that are judged too.
        stages: whether the pruned model without training and Stage II's are judged; as the recipe has it by default.
        frame_local: share of the parameters whose blocks attend within latent frames in one more contender.
        dry_run: whether to count the work and do none.
        own: options of the suite's own, name -> value.
        display: where progress is shown.
    """

    run: Path
    display: Display
    model: Path | None = None
    clips_per_prompt: int | None = None
    seeds: int | None = None
    prompts: Path | None = None
    images: Path | None = None
    against: tuple[Path, ...] = ()
    backends: tuple[Backend, ...] = ()
    guidances: tuple[tuple[float, float], ...] = ()
    stages: bool | None = None
    frame_local: float | None = None
    dry_run: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)


class Suite(ABC):
    """A way to measure a run's models.

    Attributes:
        name: its name on the command line.
        options: names of the request's `own` options that it reads.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()

    def run(self, request: SuiteRequest) -> dict[str, Any]:
        """Return `evaluate` of the request.

        Raises:
            RequestError: an option was given that this suite does not read.
        """
        for name, value in request.own.items():
            if name not in self.options:
                option = f"--{name.replace('_', '-')}"
                raise RequestError(f"{option}: {value} given, but the suite {self.name} does not read it; leave it out")
        return self.evaluate(request)

    @abstractmethod
    def evaluate(self, request: SuiteRequest) -> dict[str, Any]:
        """Measure the models of a run, write the results below `RUN/eval`, and return them.

        Raises:
            RequestError: the run is not finished, or cannot be measured by this suite.
        """
