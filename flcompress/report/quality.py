"""The quality table: what was measured, and which differences the intervals allow one to speak of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flcompress.report.record import Interval, Record

Mark = Literal["best", "tied", ""]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column. `better` is -1 where lower is better, 1 where higher is, 0 where neither is better in itself."""

    key: str
    label: str
    better: int


METRICS = (
    Metric(key="frechet", label="Fréchet distance", better=-1),
    Metric(key="prompt_accuracy", label="Prompt accuracy", better=1),
    Metric(key="digit_accuracy", label="Digit", better=1),
    Metric(key="direction_accuracy", label="Direction", better=1),
    Metric(key="motion_smoothness", label="Smoothness", better=1),
    Metric(key="dynamic_degree", label="Dynamic degree", better=0),
    Metric(key="imaging_quality", label="Imaging quality", better=1),
    Metric(key="average", label="Average", better=1),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement. "best": the best mean of its column; "tied": its interval overlaps the best one's."""

    value: Interval | None
    mark: Mark = ""


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    label: str
    evaluations: int | None
    parameters: int | None
    cells: list[Cell]
    strip: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The student beside another contender on one metric, in words: "better", "worse" or "not told apart"."""

    metric: str
    other: str
    student: Interval
    against: Interval
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The table. `metrics` are the columns that at least one contender has; `floor` is one cell a column."""

    benchmark: str
    clips: int | None
    seeds: int | None
    prompts: int | None
    metrics: list[Metric]
    contenders: list[Contender]
    floor: list[Cell] | None
    classifier: dict[str, float]
    comparisons: list[Comparison]


def quality(results: Record) -> Quality:
    """Read `eval/results.json`; ReportError names the place where it is damaged."""
    rows = results.each("contenders")
    floor = results.sub("floor") if results.has("floor") else None
    metrics = [metric for metric in METRICS if any(row.has(metric.key) for row in rows)]
    columns = [_marked(metric, [_value(row, metric.key) for row in rows]) for metric in metrics]
    contenders = [
        Contender(
            name=row.text("name"),
            label=row.text("label") if row.has("label") else row.text("name"),
            evaluations=_whole(row, "evaluations"),
            parameters=_whole(row, "parameters"),
            cells=[column[place] for column in columns],
            strip=row.text("strip") if row.has("strip") else None,
        )
        for place, row in enumerate(rows)
    ]
    accuracies = results.sub("classifier").values if results.has("classifier") else {}
    return Quality(
        benchmark=results.text("benchmark") if results.has("benchmark") else "",
        clips=_whole(results, "clips"),
        seeds=_whole(results, "seeds"),
        prompts=_whole(results, "prompts"),
        metrics=metrics,
        contenders=contenders,
        floor=[Cell(value=_value(floor, metric.key)) for metric in metrics] if floor is not None else None,
        classifier={key: float(value) for key, value in accuracies.items() if isinstance(value, int | float)},
        comparisons=_comparisons(metrics, contenders),
    )


def _value(row: Record, key: str) -> Interval | None:
    return row.interval(key) if row.has(key) else None


def _whole(row: Record, key: str) -> int | None:
    return int(row.number(key)) if row.has(key) else None


def _marked(metric: Metric, values: list[Interval | None]) -> list[Cell]:
    """Mark the best mean, and every value whose interval overlaps it: those are not known to be worse."""
    present = [value for value in values if value is not None]
    if not metric.better or len(present) < 2:
        return [Cell(value=value) for value in values]
    best = max(present, key=lambda value: metric.better * value.mean)
    marks: list[Mark] = [
        "" if value is None else "best" if value.mean == best.mean else "tied" if value.overlaps(best) else ""
        for value in values
    ]
    return [Cell(value=value, mark=mark) for value, mark in zip(values, marks, strict=True)]


def _comparisons(metrics: list[Metric], contenders: list[Contender]) -> list[Comparison]:
    """The claims a reader looks for: the student against every other model on distance and prompt accuracy."""
    student = next((contender for contender in contenders if contender.name == "student"), None)
    if student is None:
        return []
    found: list[Comparison] = []
    for place, metric in enumerate(metrics):
        if metric.key not in ("frechet", "prompt_accuracy"):
            continue
        for other in contenders:
            ours, theirs = student.cells[place].value, other.cells[place].value
            if other is student or ours is None or theirs is None:
                continue
            ahead = metric.better * (ours.mean - theirs.mean) > 0
            verdict = "not told apart" if ours.overlaps(theirs) else "better" if ahead else "worse"
            found.append(
                Comparison(metric=metric.label, other=other.label, student=ours, against=theirs, verdict=verdict)
            )
    return found
