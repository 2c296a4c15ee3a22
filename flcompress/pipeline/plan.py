"""The plan of a dry run: what each pass will leave, and about what it will take."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.ir.graph import BlockGraph
from flcompress.pipeline.display import clock
from flcompress.pipeline.gpus import UTILISATION, Gpu
from flcompress.pipeline.planned_memory import PlannedMemory, kept_alive, planned_memory
from flcompress.pipeline.planned_size import latents
from flcompress.pipeline.recipe import Recipe
from flcompress.pipeline.start import read_source, trace_folder

if TYPE_CHECKING:
    from flcompress.models.families.family import LatentShape

CHEAP_FLOPS = 2e11
"""Up to here the transformer itself is timed; above, a matrix product."""


@dataclass(frozen=True, kw_only=True)
class PlannedPass:
    """One row. Parameters and FLOPs are of the transformer after the pass; FLOPs of one forward of one sample."""

    name: str
    parameters_before: int
    parameters: int
    flops: int
    steps: int
    forwards: int
    seconds: float
    memory: PlannedMemory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe's plan.

    Attributes:
        latents: (frames, height, width) that FLOPs and memory are counted for.
        work_ratio: evaluations times parameters, before over after.
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
    flops_per_second: float
    gpu: Gpu | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(recipe: Recipe, flops_per_second: float | None = None, gpu: Gpu | None = None) -> Plan:
    """Plan a recipe whose checks have passed; nothing is written.

    Args:
        recipe: the recipe.
        flops_per_second: speed of this machine; measured where left out.
        gpu: plan for one of these instead.
    """
    if gpu is not None:
        flops_per_second = gpu.speed(recipe.training.precision)
    source = read_source(recipe)
    transformer, tokens, shape = (
        source.folder / "transformer",
        source.contract.max_sequence_length,
        _data_latents(recipe),
    )
    shape = shape or source.latents[1:]
    graph = source.graph if shape == source.latents[1:] else trace_folder(transformer, tokens, shape)
    speed = flops_per_second or measure_speed(transformer, graph, tokens, shape)
    kept = kept_alive(transformer, graph, tokens, shape, recipe.training.precision)
    rows: list[PlannedPass] = []
    parameters, evaluations = float(graph.parameters), source.contract.evaluations
    for step in recipe.passes:
        left = _whole_blocks(graph, parameters, step.remaining(parameters))
        cost = step.cost(parameters, _blocks(graph, parameters), float(graph.parameters))
        rows.append(
            PlannedPass(
                name=step.name,
                parameters_before=round(parameters),
                parameters=round(left),
                flops=_flops(graph, left),
                steps=cost.steps,
                forwards=round(cost.forwards),
                seconds=cost.forwards * graph.flops / speed,
                memory=planned_memory(cost, kept, recipe.training),
            )
        )
        parameters, evaluations = left, step.evaluations(evaluations)
    before = source.contract.evaluations
    return Plan(
        recipe=recipe.name,
        model=str(source.folder),
        latents=shape,
        parameters=graph.parameters,
        flops=graph.flops,
        evaluations=before,
        passes=tuple(rows),
        exports=tuple(exporter.name for exporter in recipe.exports),
        final_evaluations=evaluations,
        work_ratio=before / evaluations * graph.parameters / parameters,
        flops_per_second=speed,
        gpu=gpu,
    )


def _data_latents(recipe: Recipe) -> LatentShape | None:
    """The size of the recipe's data, which need not be there where the model folder holds configurations alone."""
    from flcompress.models.folder import only_configurations

    planning = recipe.model.weights == "trained" and only_configurations(recipe.model_folder())
    return None if planning else latents(recipe)


def plan_text(plan: Plan) -> str:
    """The plan as a table for people."""
    head = ("pass", "parameters", "FLOPs/forward", "steps", "forwards", "time", "memory")
    rows = [
        (
            row.name,
            f"{_short(row.parameters_before)} -> {_short(row.parameters)}",
            _short(row.flops),
            f"{row.steps:,}",
            f"{row.forwards:,}",
            clock(row.seconds),
            f"{row.memory.total / 1e9:.2f} GB",
        )
        for row in plan.passes
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(line))
        for line in (list(zip(row, widths, strict=True)) for row in (head, *rows))
    ]
    share = plan.passes[-1].parameters / plan.parameters if plan.passes else 1.0
    return "\n".join(
        [
            f"plan of {plan.recipe}: {plan.model}",
            f"start: {plan.parameters:,} parameters, {plan.flops:,} FLOPs/forward, "
            f"{plan.evaluations} evaluations a sample, latents {' x '.join(map(str, plan.latents))}",
            "",
            *(line.rstrip() for line in table),
            "",
            *_memory_lines(plan.passes, plan.gpu),
            f"time: about {_time(plan)}; exports: {', '.join(plan.exports) or 'none'}",
            f"end: {plan.final_evaluations} evaluations with {share:.1%} of the parameters: "
            f"{plan.work_ratio:.2f}x less work a sample",
            "nothing was written",
        ]
    )


def _time(plan: Plan) -> str:
    seconds = sum(row.seconds for row in plan.passes)
    if plan.gpu is None:
        return f"{clock(seconds)} at a measured {plan.flops_per_second / 1e9:.1f} GFLOP/s"
    return f"{seconds / 3600:,.1f} hours of one {plan.gpu.name} at {UTILISATION:.0%} of its stated speed"


def _memory_lines(passes: tuple[PlannedPass, ...], gpu: Gpu | None) -> list[str]:
    """Of what the memory of the fullest pass is made up, and whether a GPU has it."""
    if not passes:
        return []
    fullest = max(passes, key=lambda row: row.memory.total)
    parts = ", ".join(f"{name} {_short(value)}B" for name, value in fullest.memory.parts().items())
    lines = [f"memory: {fullest.name} takes most, {_short(fullest.memory.total)}B: {parts}"]
    if gpu is not None and fullest.memory.total > gpu.memory:
        count = math.ceil(fullest.memory.total / gpu.memory)
        lines.append(
            f"memory: more than one {gpu.name} has; {count} would hold it, but models are not split over GPUs yet; "
            "lower batch or the size, take a larger GPU, or see training: in the recipe reference"
        )
    elif gpu is not None:
        lines.append(f"memory: one {gpu.name} holds every pass")
    return lines


def measure_speed(transformer: Path, graph: BlockGraph, tokens: int, shape: LatentShape) -> float:
    """FLOP/s that this machine reaches: on the transformer with random weights if that is cheap, else on a product."""
    import time

    import torch

    batch = max(1, min(16, int(CHEAP_FLOPS // max(graph.flops, 1))))
    if graph.flops > CHEAP_FLOPS:
        left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
        flops = 2.0 * 1024**3

        def work() -> Any:
            return left @ right
    else:
        from flcompress.models.inputs import example_inputs
        from flcompress.models.loading import meta_transformer

        model = meta_transformer(transformer).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        inputs = example_inputs(model, batch=batch, latent_shape=shape, tokens=tokens)
        flops = float(batch * graph.flops)

        def work() -> Any:
            return model(**inputs, return_dict=False)

    with torch.no_grad():
        work()
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return flops / min(times)


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


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
