"""The speed table: the counted work ratio next to the measured times."""

from __future__ import annotations

from dataclasses import dataclass

from flcompress.core.records import BenchFile
from flcompress.stats import Interval


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """A backend; times in seconds for one sample batch, median with the spread of the rounds."""

    backend: str
    what: str
    teacher: Interval
    student: Interval
    ratio: Interval


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The table, with what it was measured on."""

    rounds: int
    batch: int
    work_ratio: float
    rows: list[SpeedRow]
    machine: dict[str, str]


def speed(results: BenchFile) -> Speed:
    """Return the table of `bench/results.json`."""
    return Speed(
        rounds=results.rounds,
        batch=results.batch,
        work_ratio=results.work_ratio,
        rows=[
            SpeedRow(
                backend=row.backend,
                what=row.what,
                teacher=row.teacher_seconds.interval,
                student=row.student_seconds.interval,
                ratio=row.ratio.interval,
            )
            for row in results.rows
        ],
        machine={key: str(value) for key, value in results.machine.items() if value not in (None, "")},
    )
