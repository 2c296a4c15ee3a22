"""The speed table: what the work ratio promises beside what the clock said."""

from __future__ import annotations

from dataclasses import dataclass

from flcompress.reporting.record import Record
from flcompress.stats import Interval


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One backend; times in seconds for one sample batch, median with the spread of the rounds."""

    backend: str
    what: str
    teacher: Interval
    student: Interval
    ratio: Interval


@dataclass(frozen=True, kw_only=True)
class Speed:
    rounds: int
    batch: int | None
    work_ratio: float
    rows: list[SpeedRow]
    machine: dict[str, str]


def speed(results: Record) -> Speed:
    """Read `bench/results.json`; ReportError names the place where it is damaged."""
    machine = results.sub("machine").values if results.has("machine") else {}
    return Speed(
        rounds=int(results.number("rounds")),
        batch=int(results.number("batch")) if results.has("batch") else None,
        work_ratio=results.number("work_ratio"),
        rows=[
            SpeedRow(
                backend=row.text("backend"),
                what=row.text("what"),
                teacher=row.interval("teacher_seconds", "median"),
                student=row.interval("student_seconds", "median"),
                ratio=row.interval("ratio", "median"),
            )
            for row in results.each("rows")
        ],
        machine={str(key): str(value) for key, value in machine.items() if value not in (None, "")},
    )
