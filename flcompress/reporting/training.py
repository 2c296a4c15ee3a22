"""The trainings of a run, finished, running or stopped: curves with their limits, figures, breaches, sample strips."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from flcompress.core.records import (
    DRAWN_FILE,
    BreachLine,
    DrawnLine,
    HealthFile,
    MetricsLine,
    RedrawsLine,
    StochasticDepthResult,
)
from flcompress.core.settings import highest
from flcompress.reporting.reading import Entry, RunRecord

Curve = list[tuple[float, float]]
Draw = Mapping[str, float]
Bounds = tuple[float | None, float | None]

MOST_PANELS = 12
"""Plots a pass may have; a pass that logs more numbers still has them all in its metrics.jsonl."""

DRAWN = (
    ("flow", "Samples: motion, pixels at 256"),
    ("saturation", "Samples: saturation"),
    ("diversity", "Samples: diversity of prompts"),
)
"""What is plotted of the samples that are drawn, in addition."""

MOST_STRIPS = 9
"""Evaluations whose samples are shown, the first and the last among them."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot: curve label -> (step, value), and the limits that hold for them."""

    title: str
    lines: dict[str, Curve]
    bounds: Bounds = (None, None)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the held-out evaluations.

    `redraw_range` is its range on other draws at the latest evaluation, if it has any.
    """

    name: str
    first: float
    latest: float
    redraw_range: Bounds
    best: float | None
    bounds: Bounds
    healthy: bool
    decides: bool


@dataclass(frozen=True, kw_only=True)
class Breach:
    """A figure that exceeded its limit, and what followed: "warn", "stop" or "rollback".

    `redraw_range` is its range on other draws, where it has one.
    """

    step: int
    figure: str
    value: float | None
    redraw_range: Bounds
    bounds: Bounds
    setting: str
    fix: str
    action: str
    best_step: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """A pass that trains.

    Attributes:
        entry: its folder and arguments.
        status: "done", "running", or "stopped": begun, but no process works on it.
        step: the last one logged.
        steps: how many it is to have, where its arguments say so.
        best_step: step of the evaluation with the best held-out figure.
        strips: label -> picture, the teacher's first.
    """

    entry: Entry
    status: str
    step: int
    steps: int | None
    panels: list[Panel]
    figures: list[Figure]
    breaches: list[Breach]
    best_step: int | None
    strips: list[tuple[str, Path]]


def trainings(run: RunRecord) -> list[Training]:
    """Return the trainings of the stored passes, and the one that is under way."""
    trained = [training for entry in run.entries if (training := _training(entry, "done")) is not None]
    if run.unfinished is not None:
        status = "running" if run.unfinished.running else "stopped"
        trained += [training for training in [_training(run.unfinished.entry, status)] if training is not None]
    return trained


def _training(entry: Entry, status: str) -> Training | None:
    records = entry.metrics()
    if entry.name == "stochastic-depth" and not any("elbo_full" in record.figures for record in records):
        result = entry.result(StochasticDepthResult)
        records = [*records, *(result.monitor if result is not None else [])]
    fields = _fields(records)
    if not fields:
        return None
    health = HealthFile.read_optional(entry.folder / "health.json")
    breaches = [_breach(line) for line in BreachLine.read_lines(entry.folder / "breaches.jsonl")]
    held_out = health.held_out if health is not None else ""
    evaluations = dict(fields.get(held_out, []))
    lines = RedrawsLine.read_lines(entry.folder / "redraws.jsonl")
    redraws: dict[float, Sequence[Draw]] = {line.step: line.draws for line in lines}
    reference = lines[-1].reference if lines else []
    means = _means(held_out, evaluations, redraws)
    ended = [breach.best_step for breach in breaches if breach.action == "rollback"]
    best = int(ended[-1] if ended else min(means, key=lambda step: means[step])) if evaluations else None
    of_best = evaluations.get(best) if best is not None else None
    bounds = {name: _bounds(name, health, of_best, _redrawn(name, reference)) for name in fields}
    beyond = {breach.figure for breach in breaches}
    return Training(
        entry=entry,
        status=status,
        step=int(max(record.step for record in records)),
        steps=int(entry.argument_values["steps"]) if isinstance(entry.argument_values.get("steps"), int) else None,
        panels=_panels(fields, bounds) + _drawn_panels(DrawnLine.read_lines(entry.folder / DRAWN_FILE)),
        figures=[
            Figure(
                name=_words(name),
                first=curve[0][1],
                latest=curve[-1][1],
                redraw_range=_redraw_range(name, redraws.get(curve[-1][0], [])),
                best=dict(curve).get(best) if best is not None else None,
                bounds=bounds[name],
                healthy=_words(name) not in beyond or _within(curve[-1][1], bounds[name]),
                decides=name == held_out,
            )
            for name, curve in fields.items()
            if evaluations and {step for step, _ in curve} <= evaluations.keys()
        ],
        breaches=breaches,
        best_step=best,
        strips=_strips(entry.folder / "samples"),
    )


def _means(
    figure: str, evaluations: Mapping[float, float], redraws: Mapping[float, Sequence[Draw]]
) -> dict[float, float]:
    """Return {step: mean of a figure over all draws}; evaluations without redraws count if none has any."""
    counted = evaluations.keys() & redraws.keys() or evaluations.keys()
    return {step: fmean([evaluations[step], *_redrawn(figure, redraws.get(step, []))]) for step in sorted(counted)}


def _redrawn(figure: str, draws: Iterable[Draw]) -> list[float]:
    """Return the figure on each of the other draws."""
    return [draw[figure] for draw in draws if figure in draw]


def _redraw_range(figure: str, draws: Iterable[Draw]) -> Bounds:
    values = _redrawn(figure, draws)
    return (min(values), max(values)) if values else (None, None)


def _fields(records: Iterable[MetricsLine]) -> dict[str, Curve]:
    fields: dict[str, Curve] = {}
    for record in records:
        for key, value in record.figures.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and math.isfinite(value):
                fields.setdefault(key, []).append((record.step, float(value)))
    return fields


def _panels(fields: Mapping[str, Curve], bounds: Mapping[str, Bounds]) -> list[Panel]:
    lines: dict[str, dict[str, Curve]] = {}
    limits: dict[str, Bounds] = {}
    for field, curve in fields.items():
        title, label = _panel(field)
        lines.setdefault(title, {})[label] = curve
        if bounds[field] != (None, None):
            limits[title] = bounds[field]
    order = sorted(lines, key=lambda title: (title == "Gradient norms", not title.endswith("loss")))
    return [
        Panel(title=title, lines=lines[title], bounds=limits.get(title, (None, None))) for title in order[:MOST_PANELS]
    ]


def _drawn_panels(lines: Sequence[DrawnLine]) -> list[Panel]:
    """Return motion, saturation and diversity of the drawn samples over the steps, next to the teacher's."""
    steps = {line.step: line for line in lines if line.step is not None}  # of a step that was repeated, the latest
    teacher = next((line for line in reversed(lines) if line.step is None), None)
    panels = []
    for name, title in DRAWN:
        curve = [(float(step), value) for step in sorted(steps) if (value := getattr(steps[step], name)) is not None]
        level = getattr(teacher, name, None)
        drawn = {"student": curve}
        if level is not None and curve:
            drawn["teacher"] = [(curve[0][0], level), (curve[-1][0], level)]
        if curve:
            panels.append(Panel(title=title, lines=drawn))
    return panels


def _panel(field: str) -> tuple[str, str]:
    if field.startswith("elbo_"):
        return "Monitor: held-out ELBO loss", field.removeprefix("elbo_").replace("_", " ")
    if field.endswith("_grad_norm"):
        return "Gradient norms", field.removesuffix("_grad_norm").replace("_", " ")
    if field.startswith("normaliser_"):
        return "Gradient normaliser |x_g - x_real|", field.removeprefix("normaliser_")
    words = _words(field)
    return words[:1].upper() + words[1:], words


def _words(field: str) -> str:
    return field.replace("_", " ").replace(".", " ").strip()


def _bounds(field: str, health: HealthFile | None, best: float | None, reference: Sequence[float]) -> Bounds:
    """Return the limits of a figure.

    `best` is the held-out figure at the best evaluation, `reference` the teacher's own on other draws.
    """
    if health is None:
        return None, None
    if field == health.held_out and health.max_worsening is not None and best is not None:
        return None, highest(best, health.max_worsening, fmean(reference) if reference else 0.0)
    if field.endswith("_grad_norm"):
        return None, health.max_grad_norm
    limit = health.limits.get(field)
    low, high = (limit.low, limit.high) if limit is not None else (None, None)
    return low and min([low, *reference]), high and max([high, *reference])


def _within(value: float, bounds: Bounds) -> bool:
    low, high = bounds
    return (low is None or value >= low) and (high is None or value <= high)


def _breach(line: BreachLine) -> Breach:
    redrawn = [value for value in line.redrawn if value is not None]
    return Breach(
        step=line.step,
        figure=_words(line.figure),
        value=line.value,
        redraw_range=(min(redrawn), max(redrawn)) if redrawn else (None, None),
        bounds=(line.low, line.high),
        setting=line.setting,
        fix=line.mend,
        action=line.action,
        best_step=line.best_step,
    )


def _strips(folder: Path) -> list[tuple[str, Path]]:
    steps = sorted(folder.glob("step-*.png"))
    if len(steps) > MOST_STRIPS:
        steps = [steps[round(number * (len(steps) - 1) / (MOST_STRIPS - 1))] for number in range(MOST_STRIPS)]
    teacher = folder / "teacher.png"
    shown = [("teacher", teacher)] if teacher.is_file() else []
    return shown + [(f"step {int(path.stem.removeprefix('step-'))}", path) for path in steps]
