"""What an evaluation suite is, and what it is asked for. The suites themselves are in `evaluation/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flcompress.core.backend import Backend
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
        dry_run: whether to count the work and do none.
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
    dry_run: bool = False


class Suite(ABC):
    """A way to measure a run's models.

    Attributes:
        name: its name on the command line.
    """

    name: ClassVar[str]

    @abstractmethod
    def evaluate(self, request: SuiteRequest) -> dict[str, Any]:
        """Measure the models of a run, write the results below `RUN/eval`, and return them.

        Raises:
            RequestError: the run is not finished, or cannot be measured by this suite.
        """
