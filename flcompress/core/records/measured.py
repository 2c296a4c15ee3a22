"""What `flcompress eval` and `bench` write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, FiniteFloat

from flcompress.core.records.base import Part, Record
from flcompress.stats import Interval


class Measured(Part):
    """A mean over seeds with its confidence interval."""

    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    values: list[FiniteFloat] = Field(default_factory=list)

    @property
    def interval(self) -> Interval:
        """The same without the seeds' values."""
        return Interval(self.mean, self.low, self.high)


class ContenderRow(Part):
    """One contender of `eval/results.json`; further keys are its figures, `folder` has its clip files."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Measured]

    name: str
    label: str
    steps: int
    guidance: FiniteFloat
    evaluations: int
    parameters: int
    strip: str | None = None
    folder: str | None = None

    @property
    def figures(self) -> Mapping[str, Measured]:
        """Figure -> measurement."""
        return self.__pydantic_extra__


class PairedRow(Part):
    """The difference a - b of one figure, paired by seed."""

    a: str
    b: str
    metric: str
    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class FigurePart(Part):
    """A figure of a suite: `better` is -1 where lower is better, 1 where higher is, 0 where neither is in itself."""

    key: str
    label: str
    better: int
    headline: bool = False


class JudgePart(Part):
    """What judged the clips, where that is not flcompress itself.

    Attributes:
        name: its name.
        commit: of its checkout, if it is one.
        versions: library -> version.
        weights: file -> SHA-256.
    """

    name: str
    commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, str] = Field(default_factory=dict)


class EvalFile(Record):
    """`eval/results.json`, and `eval/SUITE/results.json`; `program` is the key of the student's last result.

    Attributes:
        benchmark: the suite.
        figures: its figures, in order; none for the embedded benchmark, whose figures the report knows.
        warnings: what a person should look at first, a line each.
        source: where the prompts come from.
        judge: what judged the clips; None where flcompress did.
        seconds: "sampling", "decoding" and "judging" -> what it took over all clips and processes, whenever that was.
    """

    program: str | None = None
    benchmark: str
    clips: int
    seeds: int
    prompts: int
    reference_clips: int | None = None
    classifier: dict[str, FiniteFloat] = Field(default_factory=dict)
    floor: dict[str, Measured]
    contenders: list[ContenderRow]
    paired: list[PairedRow]
    figures: list[FigurePart] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    source: str | None = None
    judge: JudgePart | None = None
    seconds: dict[str, FiniteFloat] = Field(default_factory=dict)


class Spread(Part):
    """Median and extremes over the rounds."""

    median: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat

    @property
    def interval(self) -> Interval:
        """The median as the mean of an interval."""
        return Interval(self.median, self.low, self.high)


class SpeedRow(Part):
    """One backend: times in seconds, the ratio of those of a round, and peaks of memory in bytes."""

    backend: str
    what: str
    precision: str | None = None
    teacher_seconds: Spread
    student_seconds: Spread
    ratio: Spread
    teacher_memory: int | None = None
    student_memory: int | None = None


class WorkPart(Part):
    """Counted work of one model for one batch of clips; of two experts `evaluations` and `flops` are of both."""

    parameters: int
    evaluations: int
    own_evaluations: int | None = None
    flops: int
    partner: WorkPart | None = None


class ClipPart(Part):
    """The size of a clip in frames and pixels."""

    frames: int
    height: int
    width: int


class BenchFile(Record):
    """`bench/results.json`; `program` is the key of the student's last result."""

    program: str | None = None
    family: str | None = None
    pipeline: str | None = None
    size: ClipPart | None = None
    latents: list[int] | None = None
    batch: int
    device: str | None = None
    precision: str | None = None
    machine: dict[str, Any] = Field(default_factory=dict)
    rounds: int
    work_ratio: FiniteFloat
    teacher: WorkPart | None = None
    student: WorkPart | None = None
    rows: list[SpeedRow]
    skipped: list[dict[str, str]] = Field(default_factory=list)
