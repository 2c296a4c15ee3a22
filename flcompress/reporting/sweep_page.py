"""What a sweep shows: the page `report.html`, with every cell's cost against its quality, and the terminal's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flcompress import wording
from flcompress.core.records import SweepCell, SweepFile
from flcompress.files import write_text
from flcompress.reporting import plots
from flcompress.reporting.html import render_page
from flcompress.reporting.quality import METRICS, Metric

FRONTS = {"steps": "fewer steps alone", "size": "fewer blocks alone", "joint": "both"}
"""How a cell saves work, in words."""

DRAWN = ("frechet", "average")
"""Figures that are drawn against cost, of those that were measured."""


def write_sweep_page(results: SweepFile, target: Path) -> None:
    """Write the page: one file, nothing fetched."""
    page = render_page(
        "sweep.html.j2",
        sweep=results,
        metrics=measured_metrics(results),
        fronts=FRONTS,
        pictures=[Markup(plots.fronts(panel)) for panel in _panels(results)],
        cells=[cell for cell in results.cells if cell.failed is None],
        failed=[cell for cell in results.cells if cell.failed is not None],
    )
    write_text(target, page)


def measured_metrics(results: SweepFile) -> list[Metric]:
    """Return the figures that at least one cell has, in the order of the tables."""
    return [metric for metric in METRICS if any(metric.key in cell.figures for cell in results.cells)]


def sweep_table(results: SweepFile) -> list[str]:
    """Return the lines of the terminal's table: cost, mean and interval of each figure, and the difference to base."""
    metrics = [metric for metric in measured_metrics(results) if metric.key in (*DRAWN, "prompt_accuracy")]
    rows = [["", "parameters", "calls", "less work", "training calls", *(_heading(metric) for metric in metrics)]]
    for teacher in results.teachers:
        figures = [wording.around(teacher.figures[m.key].interval) if m.key in teacher.figures else "" for m in metrics]
        work = results.teachers[0].evaluations * results.teachers[0].parameters
        saved = wording.ratio(work / (teacher.evaluations * teacher.parameters))
        rows.append([teacher.label, wording.count(teacher.parameters), str(teacher.evaluations), saved, "", *figures])
    for cell in results.cells:
        rows.append([cell.name, *_costs(cell), *(_figure(cell, metric, results) for metric in metrics)])
    return wording.table(rows)


def _heading(metric: Metric) -> str:
    return f"{metric.label} {'(lower is better)' if metric.better < 0 else ''}".strip()


def _costs(cell: SweepCell) -> list[str]:
    if cell.parameters is None or cell.work_ratio is None or cell.calls is None:
        return ["failed", "", "", ""]
    return [
        wording.count(cell.parameters), str(cell.evaluations), wording.ratio(cell.work_ratio), wording.count(cell.calls)
    ]  # fmt: skip


def _figure(cell: SweepCell, metric: Metric, results: SweepFile) -> str:
    if metric.key not in cell.figures:
        return ""
    text = wording.around(cell.figures[metric.key].interval)
    if (difference := cell.against_base.get(metric.key)) is None:
        return text
    return f"{text} ({'+' if difference.mean > 0 else ''}{wording.around(difference.interval)})"


def _panels(results: SweepFile) -> list[plots.Fronts]:
    """Return a plot for each drawn figure and each measure of cost."""
    metrics = [metric for metric in measured_metrics(results) if metric.key in DRAWN]
    panels = []
    for metric in metrics:
        for cost, label in (("work", "times less work, counted"), ("time", "times faster, measured")):
            points = [point for cell in results.cells if (point := _point(cell, metric, cost)) is not None]
            if points:
                panels.append(
                    plots.Fronts(
                        title=f"{metric.label} against {'counted work' if cost == 'work' else 'measured time'}",
                        cost=label,
                        figure=metric.label,
                        better=metric.better,
                        points=points,
                        lines=_teacher_lines(results, metric),
                    )
                )
    return panels


def _point(cell: SweepCell, metric: Metric, cost: str) -> plots.FrontPoint | None:
    saved: Any = cell.work_ratio if cost == "work" else cell.speed_up.median if cell.speed_up is not None else None
    if saved is None or metric.key not in cell.figures or cell.front is None:
        return None
    return plots.FrontPoint(name=cell.name, saved=saved, value=cell.figures[metric.key].interval, front=cell.front)


def _teacher_lines(results: SweepFile, metric: Metric) -> Sequence[tuple[str, float]]:
    return [
        (teacher.label, teacher.figures[metric.key].mean)
        for teacher in results.teachers
        if metric.key in teacher.figures
    ]
