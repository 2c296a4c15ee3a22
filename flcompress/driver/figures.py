"""The speed of a pass that trains, while it runs and when it is done, and the plan that it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flcompress.core.records import MetricsLine, PlannedFigures
from flcompress.core.steps import Pass
from flcompress.errors import RecordError, first_line
from flcompress.frontend.recipe import Recipe
from flcompress.progress import ProgressSink

Planner = Callable[[Recipe, str, int], Sequence[PlannedFigures | None]]
"""Plans every pass of a recipe for (device, number of processes); None for a pass that costs nothing."""


def plan_run(
    planner: Planner | None, recipe: Recipe, device: str, processes: int, say: Callable[[str], None]
) -> Sequence[PlannedFigures | None]:
    """Return the plan of each pass; none where there is no planner, or where it fails, which is reported."""
    nothing = [None] * len(recipe.passes)
    if planner is None:
        return nothing
    try:
        return planner(recipe, device, processes)
    except Exception as error:  # noqa: BLE001 (whatever it was: a run does not depend on its plan)
        say(f"warning: no plan to compare this run with, it continues: {type(error).__name__}: {first_line(error)}")
        return nothing


def speed_of(
    step: Pass, planned: PlannedFigures | None, folder: Path, seconds: float, *, one_size: bool
) -> dict[str, float]:
    """Return clips a second and, on a GPU of known speed, the model FLOP utilisation of a pass that has trained.

    Both are over the whole time of the pass, with held-out evaluations and checkpoints, and of the steps that were
    trained: a pass may end early. The utilisation counts no forwards that gradient checkpointing repeats.

    Args:
        step: the pass.
        planned: its plan.
        folder: its folder, with the figures of its steps.
        seconds: duration of all its attempts.
        one_size: whether all clips have the size that the plan counts FLOPs for; else there is no utilisation.
    """
    cost = step.cost(1.0, 1, 1.0)
    try:
        done = max((line.step for line in MetricsLine.read_lines(folder / "metrics.jsonl")), default=0)
    except RecordError:  # a file of another package's pass
        return {}
    if not cost.steps or not done or not seconds:
        return {}
    return _rounded(_speeds(cost.batch, planned if one_size else None, done / cost.steps, done, seconds))


def showing_speed(
    progress: ProgressSink, step: Pass, planned: PlannedFigures | None, one_size: Callable[[], bool]
) -> ProgressSink:
    """Return a sink that shows the speed of a training's steps so far, from the end of this attempt's first."""
    cost = step.cost(1.0, 1, 1.0)
    began: tuple[int, float] | None = None

    def sink(done: int, total: int, values: Mapping[str, float]) -> None:
        nonlocal began
        now = time.monotonic()
        if total == cost.steps and (began is None or done <= began[0]):
            began = done, now
        elif total == cost.steps and began is not None and now > began[1]:
            steps = done - began[0]
            counted = planned if one_size() else None
            values = {**values, **_speeds(cost.batch, counted, steps / total, steps, now - began[1])}
        progress(done, total, values)

    return sink


def _speeds(batch: int, planned: PlannedFigures | None, share: float, steps: int, seconds: float) -> dict[str, float]:
    speeds = {"clips_per_second": steps * batch / seconds}
    if planned is not None and planned.peak_flops:
        speeds["utilisation"] = planned.flops * share / seconds / planned.peak_flops
    return speeds


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in figures.items()}
