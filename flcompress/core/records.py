"""The JSON files of a run directory as frozen records, which writers build and readers check.

Formats and old runs: a key that older versions did not write is optional and keeps the meaning that its absence had.
No file says its format while that is 1, so the bytes of existing files and everything hashed from them stay as they
are; the first incompatible change writes `"format": 2`, which this version refuses by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from flcompress.core.record_faults import fault_in
from flcompress.errors import RecordError
from flcompress.files import lines_of, write_text
from flcompress.stats import Interval

FORMAT = 1
"""Newest format of these files that this version reads; files without the key `format` have format 1."""

Fields = Mapping[str, Any]
Row = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


class _Part(BaseModel):
    """An object inside a record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(_Part):
    """One JSON file, or one line of a JSON-lines file."""

    FIX: ClassVar[str] = "make the file again"
    format: Annotated[int, Field(exclude=True)] = 1

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return the record in `file`.

        Raises:
            RecordError: unreadable, damaged, or written by a newer flcompress.
        """
        try:
            text = file.read_text(encoding="utf-8")
            value = json.loads(text)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RecordError(f"{file}: cannot be read as JSON ({error}); {cls.FIX}") from error
        return cls.parse(text, value, str(file))

    @classmethod
    def read_optional(cls, file: Path) -> Self | None:
        """Return the record in `file`, or None if there is no such file."""
        return cls.read(file) if file.is_file() else None

    @classmethod
    def read_lines(cls, file: Path) -> list[Self]:
        """Return the records of a JSON-lines file; none if there is no such file.

        A last line that a killed run left incomplete is skipped; any other bad line is a RecordError.
        """
        if not file.is_file():
            return []
        try:
            lines = lines_of(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"{file}: cannot be read ({error}); {cls.FIX}") from error
        records: list[Self] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break
                raise RecordError(f"{file}: line {number} is not JSON ({error}); {cls.FIX}") from error
            records.append(cls.parse(line, value, f"{file}: line {number}"))
        return records

    @classmethod
    def parse(cls, text: str, value: object, where: str) -> Self:
        """Check one JSON text, which `value` is decoded from; `where` begins the RecordError's message."""
        if not isinstance(value, dict):
            raise RecordError(f"{where}: holds {type(value).__name__}, expected an object; {cls.FIX}")
        written = value.get("format", 1)
        if isinstance(written, int) and written > FORMAT:
            raise RecordError(
                f"{where}: written by a newer flcompress: format {written}, this one reads up to {FORMAT}; "
                "update flcompress"
            )
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise RecordError(f"{where}: {fault_in(error, cls, value)}; {cls.FIX}") from error

    def dump(self) -> dict[str, Any]:
        """Return the plain JSON object: the keys that were set, in the order of the fields."""
        return self.model_dump(mode="json", exclude_unset=True)

    def write(self, file: Path, *, indent: int | None = 1) -> None:
        """Write the file in one piece; ValueError for a number that is not finite."""
        write_text(file, json.dumps(self.dump(), indent=indent, allow_nan=False) + "\n")

    def line(self) -> str:
        """Return the record as one line of a JSON-lines file."""
        return json.dumps(self.dump())


AnyRecord = TypeVar("AnyRecord", bound=Record)


class _Open(Record):
    """A record to which passes, exporters and plug-ins add keys of their own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def more(self) -> Fields:
        """The keys that are not fields."""
        return self.model_extra or {}


class RunFile(Record):
    """`run.json`: whose run directory this is, and which stored results make up the run."""

    FIX = "give flcompress apply RECIPE again"

    name: str
    recipe_path: str
    created: str
    entries: list[str]
    finished: bool


class EntryFile(Record):
    """`entry.json` of a stored result: everything that decides it, and what it took over all attempts."""

    FIX = "remove its folder, then give flcompress apply RECIPE again"

    key: str
    name: str
    index: int
    arguments: dict[str, Any] = Field(default_factory=dict)
    seconds: FiniteFloat = 0.0
    peak_rss_mb: FiniteFloat | None = None
    attempts: int = 1


class Attempt(_Part):
    """Time and peak memory of one attempt."""

    seconds: FiniteFloat
    peak_rss_mb: FiniteFloat


class AttemptsFile(Record):
    """`attempts.json`: every attempt at the work whose key this is."""

    key: str
    attempts: list[Attempt]


class Event(_Open):
    """One line of `journal.jsonl`. Passes add keys of their own."""

    time: str | FiniteFloat | None = None
    event: str
    name: str = ""
    key: str = ""
    folder: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)
    status: str = ""
    seconds: FiniteFloat | None = None
    peak_rss_mb: FiniteFloat | None = None
    attempts: int = 1
    error: str = ""
    threads: int | None = None


class MetricsLine(_Open):
    """One line of `metrics.jsonl`: the figures of a step, or those of a held-out evaluation."""

    step: FiniteFloat

    @property
    def figures(self) -> Fields:
        """Figure -> value."""
        return self.more


class ExportFile(_Open):
    """`exports/NAME.json`: what the exporter returned, and what it took."""

    key: str = ""
    seconds: FiniteFloat | None = None
    peak_rss_mb: FiniteFloat | None = None
    attempts: int | None = None


class ContractPart(_Part):
    """A sampling contract as `SamplingContract.to_dict` gives it."""

    prediction: str = "flow"
    scheduler_class: str = "FlowMatchEulerDiscreteScheduler"
    scheduler: dict[str, Any]
    num_inference_steps: int
    sigmas: list[FiniteFloat]
    timesteps: list[FiniteFloat]
    guidance_scale: FiniteFloat
    max_sequence_length: int
    given_sigmas: list[FiniteFloat] | None = None
    embedded_guidance: FiniteFloat | None = None
    experts: dict[str, Any] | None = None
    guidance_convention: str = ""
    mu: FiniteFloat | None = None
    ends: list[FiniteFloat] | None = None
    negative_prompt: str = ""

    def dump(self) -> dict[str, Any]:
        """Return the plain JSON object that `SamplingContract.from_dict` reads."""
        return self.model_dump(mode="json", exclude_unset=True)


class ProgramFile(Record):
    """`program.json`: a program without its block graph."""

    FIX = EntryFile.FIX

    components: dict[str, str]
    contract: ContractPart
    teacher_contract: ContractPart
    facts: list[str]
    prune_set: list[str]
    kept: dict[str, str]
    index: dict[str, Any]
    latents: list[int]


class BlockScore(_Part):
    """Importance of one block; a level is (lowest, highest noise level, mean, standard error)."""

    path: str
    mean: FiniteFloat
    standard_error: FiniteFloat
    per_level: list[Row] = Field(default_factory=list)


class ImportanceResult(Record):
    """`result.json` of importance."""

    weighting: str
    draws: int
    levels: list[tuple[FiniteFloat, FiniteFloat]]
    blocks: list[BlockScore]
    u_index: FiniteFloat
    seconds: FiniteFloat
    forwards_equivalent: FiniteFloat


class PruneResult(Record):
    """`result.json` of prune; `kept` maps each remaining block to its path before the cut."""

    removed: list[str]
    kept: dict[str, str]
    parameters_before: int
    parameters_after: int
    share: FiniteFloat
    certificate: dict[str, Any]
    certified_on: str | dict[str, Any] = ""
    reasons: dict[str, str] = Field(default_factory=dict)


class StochasticDepthResult(Record):
    """`result.json` of stochastic-depth; `monitor` repeats the held-out evaluations of `metrics.jsonl`."""

    prune_set: list[str]
    removed_share: FiniteFloat
    by: str
    target: str
    monitor: list[MetricsLine] = Field(default_factory=list)


class StepsResult(Record):
    """`result.json` of a pass that only trains."""

    steps: int
    heldout_mean_square_error: FiniteFloat | None = None


class DmdResult(Record):
    """`result.json` of dmd: the student's schedule."""

    sigmas: list[FiniteFloat]
    timesteps: list[FiniteFloat]
    steps: int
    seconds: FiniteFloat


class LimitPart(_Part):
    """Healthy range of one figure, the setting that holds it, and what to do beyond it."""

    setting: str
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    mend: str = ""


class HealthFile(Record):
    """`health.json`: the limits of a training, and the settings of `training.health` that gave them."""

    held_out: str
    limits: dict[str, LimitPart]
    every: int | None = None
    on_breach: str | None = None
    samples: int | None = None
    max_worsening: FiniteFloat | None = None
    max_drift: FiniteFloat | None = None
    deviation: tuple[FiniteFloat, FiniteFloat] | None = None
    motion: tuple[FiniteFloat, FiniteFloat] | None = None
    max_saturation: FiniteFloat | None = None
    max_critic_lag: FiniteFloat | None = None
    min_normaliser: FiniteFloat | None = None
    max_grad_norm: FiniteFloat | None = None


class BreachLine(Record):
    """One line of `breaches.jsonl`; a value that is not finite is null."""

    step: int
    figure: str
    value: FiniteFloat | None = None
    redrawn: list[FiniteFloat | None] = Field(default_factory=list)
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    setting: str
    mend: str
    action: str
    best_step: int


class RedrawsLine(Record):
    """One line of `redraws.jsonl`: the figures of a held-out evaluation on other draws."""

    step: FiniteFloat
    draws: list[dict[str, float]]
    reference: list[dict[str, float]] = Field(default_factory=list)


class Measured(_Part):
    """A mean over seeds with its confidence interval."""

    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    values: list[FiniteFloat] = Field(default_factory=list)

    @property
    def interval(self) -> Interval:
        """The same without the seeds' values."""
        return Interval(self.mean, self.low, self.high)


class ContenderRow(_Part):
    """One contender of `eval/results.json`; further keys are its figures."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Measured]

    name: str
    label: str
    steps: int
    guidance: FiniteFloat
    evaluations: int
    parameters: int
    strip: str | None = None

    @property
    def figures(self) -> Mapping[str, Measured]:
        """Figure -> measurement."""
        return self.__pydantic_extra__


class PairedRow(_Part):
    """The difference a - b of one figure, paired by seed."""

    a: str
    b: str
    metric: str
    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class EvalFile(Record):
    """`eval/results.json`; `program` is the key of the student's last result."""

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


class Spread(_Part):
    """Median and extremes over the rounds."""

    median: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat

    @property
    def interval(self) -> Interval:
        """The median as the mean of an interval."""
        return Interval(self.median, self.low, self.high)


class SpeedRow(_Part):
    """One backend: times in seconds, the ratio of those of a round, and peaks of memory in bytes."""

    backend: str
    what: str
    teacher_seconds: Spread
    student_seconds: Spread
    ratio: Spread
    precision: str | None = None
    teacher_memory: int | None = None
    student_memory: int | None = None


class WorkPart(_Part):
    """Counted work of one model for one batch of clips; of two experts `evaluations` and `flops` are of both."""

    parameters: int
    evaluations: int
    own_evaluations: int | None = None
    flops: int
    partner: WorkPart | None = None


class ClipPart(_Part):
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
    device: str | None = None
    precision: str | None = None
    machine: dict[str, Any] = Field(default_factory=dict)
    rounds: int
    batch: int
    work_ratio: FiniteFloat
    teacher: WorkPart | None = None
    student: WorkPart | None = None
    rows: list[SpeedRow]
    skipped: list[dict[str, str]] = Field(default_factory=list)
