"""The speed table: the counted work ratio next to the measured times, and peaks of memory."""

from __future__ import annotations

from dataclasses import dataclass

from flcompress.core.records import BenchFile
from flcompress.stats import Interval


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """A backend; times in seconds for one batch of clips, median with the spread of the rounds.

    Memory is the peak in bytes, the weights of that side included; None where it was not measured.
    """

    backend: str
    what: str
    precision: str
    teacher: Interval
    student: Interval
    ratio: Interval
    teacher_memory: int | None
    student_memory: int | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The table, with what it was measured on."""

    rounds: int
    batch: int
    size: str
    work_ratio: float
    rows: list[SpeedRow]
    machine: dict[str, str]

    @property
    def memory(self) -> bool:
        """Whether a peak of memory was measured."""
        return any(row.teacher_memory or row.student_memory for row in self.rows)


def speed(results: BenchFile) -> Speed:
    """Return the table of `bench/results.json`."""
    return Speed(
        rounds=results.rounds,
        batch=results.batch,
        size=f"{size.frames} x {size.height} x {size.width}" if (size := results.size) else "",
        work_ratio=results.work_ratio,
        rows=[
            SpeedRow(
                backend=row.backend,
                what=row.what,
                precision=row.precision or results.precision or "",
                teacher=row.teacher_seconds.interval,
                student=row.student_seconds.interval,
                ratio=row.ratio.interval,
                teacher_memory=row.teacher_memory,
                student_memory=row.student_memory,
            )
            for row in results.rows
        ],
        machine={key: str(value) for key, value in results.machine.items() if value not in (None, "")},
    )
