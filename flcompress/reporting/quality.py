"""The quality table: what was measured, and which differences one may speak of.

Every contender met the same prompts and noises, so a difference is judged by its own interval, paired seed by seed. It
is narrower than what two intervals that overlap, or do not, can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flcompress.reporting.record import Record, ReportError
from flcompress.stats import Interval

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
class Differences:
    """What `results` hold of pairs: (contender, other, metric) -> contender minus other, both ways round."""

    results: Record
    found: Mapping[tuple[str, str, str], Interval]

    @classmethod
    def read(cls, results: Record) -> Differences:
        found: dict[tuple[str, str, str], Interval] = {}
        for row in results.each("paired"):
            a, b, metric = row.text("a"), row.text("b"), row.text("metric")
            difference = Interval(row.number("mean"), row.number("low"), row.number("high"))
            found[a, b, metric], found[b, a, metric] = difference, -difference
        return cls(results=results, found=found)

    def of(self, name: str, other: str, metric: str) -> Interval:
        if (name, other, metric) not in self.found:
            raise ReportError(f"{self.results.file}: paired has no {metric} of {name} and {other}; make the file again")
        return self.found[name, other, metric]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement. "best": the best mean of its column; "tied": its paired difference from that one may be 0."""

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
    """The student beside another contender on one metric.

    Attributes:
        difference: student minus other, paired by seed.
        verdict: "better" or "worse" where the interval of `difference` excludes 0, else "not told apart".
    """

    metric: str
    other: str
    student: Interval
    against: Interval
    difference: Interval
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
    differences = Differences.read(results)
    names = [row.text("name") for row in rows]
    columns = [
        _marked(metric, {name: _value(row, metric.key) for name, row in zip(names, rows, strict=True)}, differences)
        for metric in metrics
    ]
    contenders = [
        Contender(
            name=names[place],
            label=row.text("label") if row.has("label") else names[place],
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
        comparisons=_comparisons(metrics, contenders, differences),
    )


def _value(row: Record, key: str) -> Interval | None:
    return row.interval(key) if row.has(key) else None


def _whole(row: Record, key: str) -> int | None:
    return int(row.number(key)) if row.has(key) else None


def _marked(metric: Metric, values: Mapping[str, Interval | None], differences: Differences) -> list[Cell]:
    """Mark the best mean, and every value whose difference from it may be 0: those are not known to be worse."""
    present = {name: value for name, value in values.items() if value is not None}
    if not metric.better or len(present) < 2:
        return [Cell(value=value) for value in values.values()]
    best = max(present, key=lambda name: metric.better * present[name].mean)

    def mark(name: str) -> Mark:
        if name not in present:
            return ""
        if present[name].mean == present[best].mean:
            return "best"
        return "tied" if differences.of(name, best, metric.key).holds(0.0) else ""

    return [Cell(value=value, mark=mark(name)) for name, value in values.items()]


def _comparisons(metrics: list[Metric], contenders: list[Contender], differences: Differences) -> list[Comparison]:
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
            difference = differences.of(student.name, other.name, metric.key)
            ahead = metric.better * difference.mean > 0
            found.append(
                Comparison(
                    metric=metric.label,
                    other=other.label,
                    student=ours,
                    against=theirs,
                    difference=difference,
                    verdict="not told apart" if difference.holds(0.0) else "better" if ahead else "worse",
                )
            )
    return found
