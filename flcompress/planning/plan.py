"""The plan of a recipe: what each pass will leave, and about what it will take. Nothing is loaded or written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.core.settings import Precision
from flcompress.driver.manager import check, default_run_dir
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.start import read_source, trace_folder
from flcompress.errors import RecipeError
from flcompress.frontend.loading import load_recipe
from flcompress.frontend.recipe import Recipe
from flcompress.ir.graph import BlockGraph
from flcompress.planning.activations import kept_alive
from flcompress.planning.experts import PlannedExperts
from flcompress.planning.gpus import Machine, gpu_machine, this_machine
from flcompress.planning.memory import PlannedMemory
from flcompress.planning.settings import (
    Advice,
    Met,
    PlannedSetting,
    Planner,
    Setting,
    advise,
    setting_of,
    settings,
)
from flcompress.planning.size import latents
from flcompress.planning.speed import measure_speed

if TYPE_CHECKING:
    from flcompress.models.families.family import LatentShape


@dataclass(frozen=True, kw_only=True)
class PlannedPass:
    """One row.

    Attributes:
        parameters_before, parameters: of the transformer, before and after the pass.
        flops: of one forward of one sample through the transformer after the pass.
        steps, batch: of its training, or 0 and the samples in memory at once.
        forwards: of one sample through the full transformer, with those that gradient checkpointing does again.
        seconds: from beginning to end.
        memory: of one process, under the recipe's own setting.
        fits: whether that is enough.
        settings: the pass under every setting of `training:`, where it trains.
    """

    name: str
    parameters_before: int
    parameters: int
    flops: int
    steps: int
    batch: int
    forwards: int
    processes: int
    seconds: float
    memory: PlannedMemory
    fits: bool
    settings: tuple[PlannedSetting, ...]

    @property
    def trains(self) -> bool:
        return bool(self.settings)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe's plan.

    Attributes:
        latents: (frames, height, width) that FLOPs and memory are counted for.
        work_ratio: evaluations times parameters, before over after.
        machine: what it is made for.
        setting: the recipe's own.
        advice: what fits instead, where a pass does not; None where nothing does, too.
        expert: which of two is compressed; rows are of that one, evaluations of both.
    """

    recipe: str
    model: str
    latents: LatentShape
    parameters: int
    flops: int
    evaluations: int
    passes: tuple[PlannedPass, ...]
    exports: tuple[str, ...]
    final_evaluations: int
    work_ratio: float
    machine: Machine
    setting: Setting
    advice: Advice | None
    expert: str | None = None

    @property
    def fits(self) -> bool:
        return all(row.fits for row in self.passes)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.passes)

    @property
    def gpus(self) -> int:
        """GPUs that the recipe's own setting keeps busy, or waiting."""
        return self.setting.processes(self.machine)

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        plain |= {"fits": self.fits, "hours": self.seconds / 3600, "gpu_hours": self.gpus * self.seconds / 3600}
        plain["advice"] = plain["advice"] and plain["advice"] | {"recipe": self.advice.lines() if self.advice else []}
        for row, planned in zip(plain["passes"], self.passes, strict=True):
            row["memory"]["total"] = planned.memory.total
            for other, setting in zip(row["settings"], planned.settings, strict=True):
                other["memory"]["total"] = setting.memory.total
        return plain


def plan_recipe(
    recipe: Recipe | Path | str,
    run_dir: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    gpu: str | None = None,
    gpus: int | None = None,
    memory: str | None = None,
) -> Plan:
    """Check a recipe as `apply` would, and plan it; nothing is written.

    Args:
        recipe: a recipe, or the path of a recipe file.
        run_dir: where `apply` would write; default: `runs/<recipe name>`.
        overrides: "key.path=value" each, for a recipe given by path.
        gpu: the GPU model to plan for, a key of `GPUS`; default: this machine, at its measured speed.
        gpus: number of GPUs; default: the recipe's `training.processes`, or 1.
        memory: memory per GPU, such as "80G" or "48GiB"; default: that of the GPU model.

    Raises:
        RequestError: anything wrong with the request.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    machine = gpu_machine(recipe, gpu, gpus, memory) if gpu else None
    check(recipe, RunDirectory(run_dir or default_run_dir(recipe)), plan=True)
    return make_plan(recipe, machine=machine)


def make_plan(recipe: Recipe, flops_per_second: float | None = None, machine: Machine | None = None) -> Plan:
    """Plan a recipe whose checks have passed; nothing is written.

    Args:
        recipe: the recipe.
        flops_per_second: speed of this machine; measured where left out.
        machine: what to plan for instead; see `gpu_machine`.

    Raises:
        RecipeError: a batch that the processes do not divide.
    """
    source = read_source(recipe)
    transformer, tokens, shape = (
        source.transformer,
        source.contract.max_sequence_length,
        _data_latents(recipe),
    )
    shape = shape or source.latents[1:]
    graph = source.graph if shape == source.latents[1:] else trace_folder(transformer, tokens, shape)
    if machine is None:
        machine = this_machine(recipe, flops_per_second or measure_speed(transformer, graph, tokens, shape))
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    planner = Planner(graph, {one: kept_alive(transformer, graph, tokens, shape, one) for one in precisions})
    own = setting_of(recipe.training)
    checkpointing = _checkpointing(transformer)
    rows: list[PlannedPass] = []
    passes: list[Met] = []
    experts = PlannedExperts(recipe, source)
    parameters, evaluations = float(graph.parameters), source.contract.evaluations
    for index, step in enumerate(recipe.passes):
        left = _whole_blocks(graph, parameters, step.remaining(parameters))
        met = Met(step, parameters, _blocks(graph, parameters), experts.beside(step))
        passes.append(met)
        _check_batch(recipe, index, met, planner, own.processes(machine))
        cost, planned = met.cost(graph), planner.planned(met, own, machine)
        trains = any(role.trained for role in cost.roles)
        others = [one for one in settings(checkpointing, own.micro_batch) if trains and one.engine in step.engines]
        rows.append(
            PlannedPass(
                name=step.name,
                parameters_before=round(parameters),
                parameters=round(left),
                flops=_flops(graph, left),
                steps=cost.steps,
                batch=planned.batch,
                forwards=round(cost.forwards + cost.again * own.gradient_checkpointing),
                processes=planned.processes,
                seconds=planned.seconds,
                memory=planned.memory,
                fits=planned.fits,
                settings=tuple(planner.planned(met, one, machine) for one in others),
            )
        )
        parameters, evaluations = left, step.evaluations(evaluations)
    final, ratio = experts.work_ratio(parameters, evaluations)
    fits = all(row.fits for row in rows)
    return Plan(
        recipe=recipe.name,
        model=str(source.folder),
        latents=shape,
        parameters=graph.parameters,
        flops=graph.flops,
        evaluations=source.contract.evaluations,
        passes=tuple(rows),
        exports=tuple(exporter.name for exporter in recipe.exports),
        final_evaluations=final,
        work_ratio=ratio,
        machine=machine,
        setting=own,
        advice=None if fits else advise(planner, passes, machine, checkpointing),
        expert=recipe.model.expert,
    )


def _check_batch(recipe: Recipe, index: int, met: Met, planner: Planner, processes: int) -> None:
    cost, step = met.cost(planner.graph), met.step
    if step.distributed and cost.steps and cost.batch % processes:
        whole = -(-cost.batch // processes) * processes
        raise RecipeError(
            f"{recipe.where(f'passes[{index}]')}.{step.name}.batch: {cost.batch} given, expected a multiple of the "
            f"{processes} processes; --set passes.{step.name}.batch={whole}"
        )


def _checkpointing(transformer: Path) -> bool:
    """Whether the transformer's class can compute blocks again."""
    from flcompress.models.loading import transformer_class

    return bool(transformer_class(transformer)._supports_gradient_checkpointing)


def _data_latents(recipe: Recipe) -> LatentShape | None:
    """The size of the recipe's data, which need not be there where the model folder holds configurations alone."""
    from flcompress.models.folder import only_configurations

    planning = recipe.model.weights == "trained" and only_configurations(recipe.model_folder())
    return None if planning else latents(recipe)


def _whole_blocks(graph: BlockGraph, before: float, wanted: float) -> float:
    """Parameters left when whole blocks of mean size go until at most `wanted` are left."""
    size = sum(block.parameters for block in graph.blocks) / len(graph.blocks)
    # Not one block more for the last digit of a float.
    return before - math.ceil((before - wanted) / size - 1e-9) * size


def _blocks(graph: BlockGraph, parameters: float) -> int:
    """How many blocks a transformer cut to `parameters` has."""
    inside = sum(block.parameters for block in graph.blocks)
    outside = graph.parameters - inside
    return max(1, round(len(graph.blocks) * (parameters - outside) / inside))


def _flops(graph: BlockGraph, parameters: float) -> int:
    """FLOPs of a transformer cut to `parameters`: those inside blocks go down with the blocks' parameters."""
    inside = sum(block.parameters for block in graph.blocks)
    share = (parameters - (graph.parameters - inside)) / inside
    within = sum(block.flops for block in graph.blocks)
    return round(graph.flops - within * (1.0 - share))
