"""The plan of a run that is about to begin, pass by pass, to be compared with what is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flcompress.core.records import PlannedFigures
from flcompress.core.steps import Pass
from flcompress.frontend.recipe import Recipe
from flcompress.planning.machines import Gpu, running_machine
from flcompress.planning.plan import Plan, PlannedPass, make_plan


def running_plan(recipe: Recipe, device: str, processes: int) -> Sequence[PlannedFigures | None]:
    """Return what is planned for each pass under the recipe's own setting; None for passes that cost nothing.

    Args:
        recipe: the recipe; its checks have passed.
        device: "cpu", whose speed is measured, or "cuda".
        processes: number of processes.
    """
    busy = [_busy(step) for step in recipe.passes]
    if not any(busy):
        return [None] * len(busy)
    training = recipe.training.model_copy(update={"processes": processes})
    recipe = recipe.model_copy(update={"training": training})
    machine, gpu = running_machine(recipe, processes) if device == "cuda" else (None, None)
    plan = make_plan(recipe, machine=machine, own_only=True)
    return [_figures(row, plan, gpu) if works else None for row, works in zip(plan.passes, busy, strict=True)]


def _busy(step: Pass) -> bool:
    cost = step.cost(1.0, 1, 1.0)
    return bool(cost.roles or cost.forwards)


def _figures(row: PlannedPass, plan: Plan, gpu: Gpu | None) -> PlannedFigures:
    forwards = row.forwards - row.recomputed
    stated = None if gpu is None else gpu.half if row.precision == "bf16" else gpu.single
    return PlannedFigures(
        machine=plan.machine.name,
        gpu=plan.machine.gpu,
        processes=row.processes,
        memory=row.memory.total,
        seconds=None if math.isnan(row.seconds) else row.seconds,
        forwards=forwards,
        flops=float(forwards) * plan.flops,
        peak_flops=None if stated is None else stated * row.processes,
    )
