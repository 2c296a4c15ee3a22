"""What `flcompress sweep` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from flcompress.core.records.base import Part, Record
from flcompress.core.records.measured import ContenderRow, Measured, Spread

Front = Literal["steps", "size", "joint"]
"""How a cell saves work: fewer steps at full size, fewer parameters at all steps, or both."""


class CellResult(Record):
    """`cells/NAME/seed-N/result.json`: what one training of a cell gave. `key` is of everything that decides it."""

    key: str
    steps: int
    evaluations: int
    parameters: int
    calls: FiniteFloat
    seconds: FiniteFloat
    figures: dict[str, list[FiniteFloat]]


class TeacherResult(Record):
    """`teacher/result.json`: the base's teacher at all its steps and at the student's."""

    key: str
    contenders: list[ContenderRow]


class SweepCell(Part):
    """One cell of a sweep.

    Attributes:
        name: its name.
        question: what it asks.
        settings: key -> value of every axis.
        failed: why it has no figures; the other attributes are then missing.
        steps: steps of the student.
        evaluations: its network evaluations for one clip.
        parameters: its parameters.
        front: how it saves work.
        work_ratio: teacher's work over the student's, work being evaluations times parameters.
        calls: network calls of one training: forwards of one sample, a backward counting as two.
        seconds: what one training took, passes that it shares with other cells included; the mean over its seeds.
        speed_up: measured ratio of the teacher's time of a clip to the student's.
        student_seconds: measured time of the student's clip.
        figures: figure -> mean and interval over training seeds, and each seed's value; over evaluation seeds where
            there is one training seed.
        against_base: figure -> difference from the base, paired by seed.
        best_of: figures in which no cell with as little work is better.
    """

    name: str
    question: str
    settings: dict[str, Any]
    failed: str | None = None
    steps: int | None = None
    evaluations: int | None = None
    parameters: int | None = None
    front: Front | None = None
    work_ratio: FiniteFloat | None = None
    calls: FiniteFloat | None = None
    seconds: FiniteFloat | None = None
    speed_up: Spread | None = None
    student_seconds: Spread | None = None
    figures: dict[str, Measured] = Field(default_factory=dict)
    against_base: dict[str, Measured] = Field(default_factory=dict)
    best_of: list[str] = Field(default_factory=list)


class SweepFile(Record):
    """`results.json` of a sweep; cells are in the order of the request, the base first."""

    name: str
    source: str
    seeds: int
    clips_per_prompt: int
    evaluation_seeds: int
    axes: Mapping[str, list[Any]]
    base: str
    teachers: list[ContenderRow]
    cells: list[SweepCell]
