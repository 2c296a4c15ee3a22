"""The quality table: what was measured, and which differences one may speak of.

Every contender met the same prompts and noises, so a difference is judged by its own interval, paired seed by seed. It
is narrower than what two intervals that overlap, or do not, can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flcompress.core.records import EvalFile, JudgePart, Measured
from flcompress.errors import RecordError
from flcompress.stats import Interval

Mark = Literal["best", "tied", ""]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column.

    Attributes:
        better: -1 where lower is better, 1 where higher is, 0 where neither is better in itself.
        shown: whether the terminal shows it, too.
        compared: whether the student is compared with every other model by it.
    """

    key: str
    label: str
    better: int
    shown: bool = False
    compared: bool = False


METRICS = (
    Metric(key="frechet", label="Fréchet distance", better=-1, shown=True, compared=True),
    Metric(key="prompt_accuracy", label="Prompt accuracy", better=1, shown=True, compared=True),
    Metric(key="digit_accuracy", label="Digit", better=1),
    Metric(key="direction_accuracy", label="Direction", better=1),
    Metric(key="motion_smoothness", label="Smoothness", better=1),
    Metric(key="dynamic_degree", label="Dynamic degree", better=0),
    Metric(key="imaging_quality", label="Imaging quality", better=1),
    Metric(key="average", label="Average", better=1, shown=True, compared=True),
    Metric(key="identity", label="Identity", better=1),
    Metric(key="frechet_fixed", label="Fréchet, fixed features", better=-1),
)


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Paired differences of `eval/results.json`: (contender, other, metric) -> contender minus other, both ways."""

    intervals: Mapping[tuple[str, str, str], Interval]

    @classmethod
    def read(cls, results: EvalFile) -> Differences:
        """Return the differences of the results."""
        intervals: dict[tuple[str, str, str], Interval] = {}
        for row in results.paired:
            difference = Interval(row.mean, row.low, row.high)
            intervals[row.a, row.b, row.metric], intervals[row.b, row.a, row.metric] = difference, -difference
        return cls(intervals=intervals)

    def between(self, name: str, other: str, metric: str) -> Interval:
        """Return the interval of `name` minus `other`; RecordError if the file lacks the pair."""
        if (name, other, metric) not in self.intervals:
            raise RecordError(f"eval/results.json: paired has no {metric} of {name} and {other}; make the file again")
        return self.intervals[name, other, metric]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measurement. "best": the best mean of its column; "tied": its paired difference from that one may be 0."""

    value: Interval | None
    mark: Mark = ""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of the quality table: one model and its figures."""

    name: str
    label: str
    evaluations: int
    parameters: int
    cells: list[Cell]
    strip: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The student against another contender on one metric.

    Attributes:
        difference: student minus other, paired by seed.
        verdict: "better" or "worse" where the interval of `difference` excludes 0, "higher" or "lower" for a metric of
            which neither is better, else "not told apart".
    """

    metric: str
    other: str
    student: Interval
    against: Interval
    difference: Interval
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The table. `metrics` are the columns that at least one contender has; `floor` is one cell a column.

    `warnings` are the suite's own; `source` says where its prompts come from; `seconds` is part -> time; `judge` names
    what judged the clips where flcompress did not.
    """

    benchmark: str
    clips: int
    seeds: int
    prompts: int
    metrics: list[Metric]
    contenders: list[Contender]
    floor: list[Cell]
    classifier: dict[str, float]
    comparisons: list[Comparison]
    warnings: list[str]
    source: str
    seconds: Mapping[str, float]
    judge: str


def quality(results: EvalFile) -> Quality:
    """Return the table of `eval/results.json`; RecordError if a pair of contenders is missing."""
    rows = results.contenders
    metrics = [metric for metric in _known(results) if any(metric.key in row.figures for row in rows)]
    differences = Differences.read(results)
    names = [row.name for row in rows]
    columns = [
        _mark_cells(metric, {row.name: _interval(row.figures, metric.key) for row in rows}, differences)
        for metric in metrics
    ]
    contenders = [
        Contender(
            name=names[index],
            label=row.label,
            evaluations=row.evaluations,
            parameters=row.parameters,
            cells=[column[index] for column in columns],
            strip=row.strip,
        )
        for index, row in enumerate(rows)
    ]
    return Quality(
        benchmark=results.benchmark,
        clips=results.clips,
        seeds=results.seeds,
        prompts=results.prompts,
        metrics=metrics,
        contenders=contenders,
        floor=[Cell(value=_interval(results.floor, metric.key)) for metric in metrics],
        classifier=results.classifier,
        comparisons=_comparisons(metrics, contenders, differences),
        warnings=results.warnings,
        source=results.source or "",
        seconds=results.seconds,
        judge=_judge(results.judge) if results.judge is not None else "",
    )


def _judge(judge: JudgePart) -> str:
    commit = f", commit {judge.commit[:12]}" if judge.commit else ""
    return f"{judge.name}{commit}; SHA-256 of {len(judge.weights)} weight files in results.json"


def _known(results: EvalFile) -> tuple[Metric, ...]:
    """Return the metrics of a suite, as its file says; those of the embedded benchmark are known here."""
    if not results.figures:
        return METRICS
    return tuple(
        Metric(key=each.key, label=each.label, better=each.better, shown=each.headline, compared=each.headline)
        for each in results.figures
    )


def _interval(figures: Mapping[str, Measured], key: str) -> Interval | None:
    return figures[key].interval if key in figures else None


def _mark_cells(metric: Metric, values: Mapping[str, Interval | None], differences: Differences) -> list[Cell]:
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
        return "tied" if differences.between(name, best, metric.key).holds(0.0) else ""

    return [Cell(value=value, mark=mark(name)) for name, value in values.items()]


def _comparisons(metrics: list[Metric], contenders: list[Contender], differences: Differences) -> list[Comparison]:
    """Compare the student with every other model by the metrics that are for it."""
    student = next((contender for contender in contenders if contender.name == "student"), None)
    if student is None:
        return []
    comparisons: list[Comparison] = []
    for index, metric in enumerate(metrics):
        if not metric.compared:
            continue
        for other in contenders:
            ours, theirs = student.cells[index].value, other.cells[index].value
            if other is student or ours is None or theirs is None:
                continue
            difference = differences.between(student.name, other.name, metric.key)
            comparisons.append(
                Comparison(
                    metric=metric.label,
                    other=other.label,
                    student=ours,
                    against=theirs,
                    difference=difference,
                    verdict=_verdict(metric, difference),
                )
            )
    return comparisons


def _verdict(metric: Metric, difference: Interval) -> str:
    if difference.holds(0.0):
        return "not told apart"
    if not metric.better:
        return "higher" if difference.mean > 0 else "lower"
    return "better" if metric.better * difference.mean > 0 else "worse"
