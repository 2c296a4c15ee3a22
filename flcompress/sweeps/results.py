"""From the results of the cells to one table: intervals, paired differences, and what nothing of its cost beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from flcompress.core.records import (
    BenchFile,
    CellResult,
    ContenderRow,
    Front,
    Measured,
    Spread,
    SweepCell,
    SweepFile,
)
from flcompress.reporting.quality import METRICS
from flcompress.stats import interval
from flcompress.sweeps.request import Cell, Request

BETTER = {metric.key: metric.better for metric in METRICS}
"""Figure -> -1 where lower is better, 1 where higher is."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a cell: its result for every training seed and the time of its clips, or why it failed."""

    results: Sequence[CellResult] = field(default_factory=tuple)
    bench: BenchFile | None = None
    failed: str | None = None


def summary(request: Request, teachers: Sequence[ContenderRow], outcomes: Mapping[str, Outcome]) -> SweepFile:
    """Return the results of a sweep.

    Args:
        request: the sweep.
        teachers: the teacher's figures, at all its steps first.
        outcomes: of every cell, by name.
    """
    base = outcomes[request.base.name]
    cells = [_cell(cell, outcomes[cell.name], base, teachers[0]) for cell in request.cells]
    return SweepFile(
        name=request.name,
        source=str(request.source),
        seeds=request.seeds,
        clips_per_prompt=request.evaluation.clips_per_prompt,
        evaluation_seeds=request.evaluation.seeds,
        axes={key: list(values) for key, values in request.axes.items()},
        base=request.base.name,
        teachers=list(teachers),
        cells=[cell.model_copy(update={"best_of": _best_of(cell, cells)}) for cell in cells],
    )


def samples(results: Sequence[CellResult], figure: str) -> list[float]:
    """Return the independent values of a figure: one a training seed, or one an evaluation seed where there is one.

    Clips of one training share its weights, so several of them are no more than one draw of what a training gives.
    """
    if len(results) == 1:
        return list(results[0].figures[figure])
    return [sum(result.figures[figure]) / len(result.figures[figure]) for result in results]


def _cell(cell: Cell, outcome: Outcome, base: Outcome, teacher: ContenderRow) -> SweepCell:
    identity = {"name": cell.name, "question": cell.question, "settings": dict(cell.settings)}
    if not outcome.results:
        return SweepCell(**identity, failed=outcome.failed)
    first = outcome.results[0]
    shared = [name for name in first.figures if not base.results or name in base.results[0].figures]
    speed_up, seconds = _times(outcome.bench)
    return SweepCell(
        **identity,
        steps=first.steps,
        evaluations=first.evaluations,
        parameters=first.parameters,
        front=_front(first, teacher),
        work_ratio=teacher.evaluations * teacher.parameters / (first.evaluations * first.parameters),
        calls=first.calls,
        seconds=sum(result.seconds for result in outcome.results) / len(outcome.results),
        speed_up=speed_up,
        student_seconds=seconds,
        figures={name: _measured(samples(outcome.results, name)) for name in first.figures},
        against_base={
            name: _measured(
                [a - b for a, b in zip(samples(outcome.results, name), samples(base.results, name), strict=True)]
            )
            for name in shared
            if base.results and base is not outcome
        },
    )


def _measured(values: Sequence[float]) -> Measured:
    return Measured(**asdict(interval(values)), values=list(values))


def _times(bench: BenchFile | None) -> tuple[Spread | None, Spread | None]:
    """Return the measured speed-up of the denoising and the student's seconds, in torch."""
    rows = [row for row in bench.rows if row.what == "denoising"] if bench is not None else []
    return (rows[0].ratio, rows[0].student_seconds) if rows else (None, None)


def _front(result: CellResult, teacher: ContenderRow) -> Front:
    if result.parameters >= teacher.parameters:
        return "steps"
    return "size" if result.evaluations >= teacher.evaluations else "joint"


def _best_of(cell: SweepCell, cells: Sequence[SweepCell]) -> list[str]:
    """Return the figures in which no cell that saves as much work is better: Pareto's non-dominated set."""
    return [name for name in cell.figures if BETTER.get(name) and not any(_beats(o, cell, name) for o in cells)]


def _beats(other: SweepCell, cell: SweepCell, figure: str) -> bool:
    """Return whether another cell is no worse in work and figure, and better in one of them."""
    if other.work_ratio is None or cell.work_ratio is None or figure not in other.figures:
        return False
    ahead = BETTER[figure] * (other.figures[figure].mean - cell.figures[figure].mean)
    saved = other.work_ratio - cell.work_ratio
    return ahead >= 0 and saved >= 0 and (ahead > 0 or saved > 0)
