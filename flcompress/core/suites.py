"""What an evaluation suite is, and what it is asked for. The suites themselves are in `evaluation/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
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
        dry_run: whether to count the work and do none.
        sample: how many of a suite's own prompts, evenly from every kind of them; all by default.
        vbench_python: Python of the environment that VBench is installed in.
        vbench_repo: checkout of VBench.
        features: TorchScript or ONNX file of a network that gives the features of a clip.
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
    sample: int | None = None
    vbench_python: Path | None = None
    vbench_repo: Path | None = None
    features: Path | None = None


OWN_OPTIONS = ("sample", "vbench_python", "vbench_repo", "features")
"""Fields of a request that only the suites read which name them."""


class Suite(ABC):
    """A way to measure a run's models.

    Attributes:
        name: its name on the command line.
        options: those of `OWN_OPTIONS` that it reads.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()

    def check_options(self, request: SuiteRequest) -> None:
        """Raise RequestError where an option was given that this suite does not read."""
        for field in OWN_OPTIONS:
            value = getattr(request, field)
            if value is not None and field not in self.options:
                option = f"--{field.replace('_', '-')}"
                raise RequestError(f"{option}: {value} given, but the suite {self.name} does not read it; leave it out")

    @abstractmethod
    def evaluate(self, request: SuiteRequest) -> dict[str, Any]:
        """Measure the models of a run, write the results below `RUN/eval`, and return them.

        Raises:
            RequestError: the run is not finished, or cannot be measured by this suite.
        """
