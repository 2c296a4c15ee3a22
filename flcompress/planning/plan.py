"""The plan of a recipe: the model after each pass, and the memory and time that each takes. Nothing is written."""

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
from flcompress.models.families import family_of
from flcompress.models.loading import meta_transformer, transformer_class
from flcompress.models.network import stock_name
from flcompress.planning.activations import saved_activations
from flcompress.planning.exchanges import PlannedExchanges, SplitClip, TransformerShapes
from flcompress.planning.experts import PlannedExperts
from flcompress.planning.machines import Machine, gpu_here, gpu_machine, measure_speed, this_machine
from flcompress.planning.memory import PlannedMemory, compute_precision
from flcompress.planning.settings import (
    Advice,
    PlannedInput,
    PlannedSetting,
    Planner,
    Setting,
    advise,
    all_settings,
)

if TYPE_CHECKING:
    from flcompress.data.sizes import Size
    from flcompress.models.families.family import LatentShape


@dataclass(frozen=True, kw_only=True)
class PlannedPass:
    """The plan of one pass.

    Attributes:
        name: name of the pass.
        parameters_before: parameters of the transformer before the pass.
        parameters: parameters of the transformer after the pass.
        flops: FLOPs of one forward of one sample through the transformer after the pass.
        steps: training steps; 0 for a pass that does not train.
        batch: samples of a training step, or those in memory at once.
        forwards: forwards of one sample through the full transformer, recomputed ones included.
        recomputed: how many of these gradient checkpointing repeats.
        precision: precision that the pass computes in.
        processes: processes that share the pass.
        exchanges: what a process sends to others in a step.
        computing: duration of the pass's computations in seconds.
        exchanging: duration of its exchanges, those included that computations hide.
        evaluating: duration of its held-out evaluations.
        seconds: duration of the pass.
        memory: memory of one process, under the recipe's own setting.
        fits: whether that memory fits the machine.
        settings: the pass under every setting of `training:`; empty for a pass that does not train.
    """

    name: str
    parameters_before: int
    parameters: int
    flops: int
    steps: int
    batch: int
    forwards: int
    recomputed: int
    precision: Precision
    processes: int
    exchanges: PlannedExchanges
    computing: float
    exchanging: float
    evaluating: float
    seconds: float
    memory: PlannedMemory
    fits: bool
    settings: tuple[PlannedSetting, ...]

    @property
    def trains(self) -> bool:
        """Whether the pass trains, so that settings matter."""
        return bool(self.settings)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a recipe.

    Attributes:
        recipe: the recipe's name.
        model: the model folder.
        latents: (frames, height, width) that FLOPs and memory are counted for.
        parameters: parameters of the starting transformer.
        flops: FLOPs of one forward of one sample through it.
        evaluations: network evaluations of a sample before the first pass.
        passes: the plan of each pass.
        exports: names of the exporters.
        final_evaluations: network evaluations of a sample after the last pass.
        work_ratio: evaluations times parameters, before over after.
        machine: the machine that the plan is made for.
        setting: the recipe's own setting.
        advice: what fits instead if a pass does not fit; also None if nothing fits.
        expert: which of two experts is compressed; passes are of that one, evaluations of both.
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
        """Whether every pass fits."""
        return all(row.fits for row in self.passes)

    @property
    def seconds(self) -> float:
        """Time of all passes in seconds."""
        return sum(row.seconds for row in self.passes)

    @property
    def computing(self) -> float:
        """Time of all computations in seconds."""
        return sum(row.computing for row in self.passes)

    @property
    def exchanging(self) -> float:
        """Time of all exchanges between GPUs in seconds, those included that computations hide."""
        return sum(row.exchanging for row in self.passes)

    @property
    def gpus(self) -> int:
        """GPUs that the recipe's own setting occupies."""
        return self.setting.processes(self.machine)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, with totals and hours."""
        plain = asdict(self)
        hours = {"hours": self.seconds, "computing_hours": self.computing, "exchanging_hours": self.exchanging}
        plain |= {name: seconds / 3600 for name, seconds in hours.items()}
        plain |= {"fits": self.fits, "gpu_hours": self.gpus * self.seconds / 3600}
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
        gpu: the GPU model to plan for, a key of `GPUS`; default: this machine's, or its CPU at its measured speed.
        gpus: number of GPUs; default: the recipe's `training.processes`, or 1.
        memory: memory per GPU, such as "80G" or "48GiB"; default: that of the GPU model.

    Raises:
        RequestError: anything wrong with the request.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    if gpu is None:
        gpu, own = gpu_here()
        memory = memory or own
    machine = gpu_machine(recipe, gpu, gpus, memory) if gpu else None
    check(recipe, RunDirectory(run_dir or default_run_dir(recipe)), plan=True)
    return make_plan(recipe, machine=machine)


def make_plan(
    recipe: Recipe,
    flops_per_second: float | None = None,
    machine: Machine | None = None,
    *,
    own_only: bool = False,
) -> Plan:
    """Plan a recipe whose checks have passed; nothing is written.

    Args:
        recipe: the recipe.
        flops_per_second: speed of this machine; default: measured.
        machine: the machine to plan for instead; see `gpu_machine`.
        own_only: whether to plan the recipe's own setting alone, without others and advice.

    Raises:
        RecipeError: a batch that the processes do not divide.
    """
    source = read_source(recipe)
    transformer, tokens = source.transformer, source.contract.max_sequence_length
    shape = _available_latents(recipe) or source.latents[1:]
    graph = source.graph if shape == source.latents[1:] else trace_folder(transformer, tokens, shape)
    if machine is None:
        machine = this_machine(recipe, flops_per_second or measure_speed(transformer, graph, tokens, shape))
    own = Setting.of(recipe.training)
    _check_groups(recipe, own.processes(machine))
    precisions: set[Precision] = {"fp32", "bf16"}
    if own_only:  # counting takes most of a plan's time
        costs = [
            step.cost(float(graph.parameters), len(graph.blocks), float(graph.parameters)) for step in recipe.passes
        ]
        precisions = {compute_precision(cost, own.precision, gpu=machine.gpu) for cost in costs}
    saved = {name: saved_activations(transformer, graph, tokens, shape, name, gpu=machine.gpu) for name in precisions}
    model = meta_transformer(transformer)
    shapes, clip = TransformerShapes.of(model, graph), split_clip(model, graph, tokens, shape)
    planner = Planner(graph, saved, shapes, clip, recipe.training.compile)
    checkpointing = bool(transformer_class(transformer)._supports_gradient_checkpointing)
    rows: list[PlannedPass] = []
    inputs: list[PlannedInput] = []
    experts = PlannedExperts(recipe, source)
    parameters, evaluations = float(graph.parameters), source.contract.evaluations
    for index, step in enumerate(recipe.passes):
        remaining = _remaining(graph, parameters, step.remaining(parameters))
        roles, health = experts.extra_roles(step), recipe.training.health
        blocks, teacher = _blocks(graph, parameters), source.contract.evaluations
        planned = PlannedInput(step, parameters, blocks, roles, teacher, health)
        inputs.append(planned)
        _check_batch(recipe, index, planned, planner, own.processes(machine))
        cost, plan = planned.cost(graph), planner.plan(planned, own, machine)
        trains = any(role.trained for role in cost.roles)
        compared = trains and not own_only
        asked = own.micro_batch, own.offload, own.sequence_parallel, own.shard_size
        choices = all_settings(checkpointing, *asked) if compared else []
        choices = [setting for setting in choices if setting.engine in step.engines]
        rows.append(
            PlannedPass(
                name=step.name,
                parameters_before=round(parameters),
                parameters=round(remaining),
                flops=_flops(graph, remaining),
                steps=cost.steps,
                batch=plan.batch,
                forwards=round(cost.forwards + cost.recomputed * own.gradient_checkpointing),
                recomputed=round(cost.recomputed * own.gradient_checkpointing),
                precision=compute_precision(cost, own.precision, gpu=machine.gpu),
                processes=plan.processes,
                exchanges=plan.exchanges,
                computing=plan.computing,
                exchanging=plan.exchanging,
                evaluating=plan.evaluating,
                seconds=plan.seconds,
                memory=plan.memory,
                fits=plan.fits,
                settings=tuple(planner.plan(planned, setting, machine) for setting in choices),
            )
        )
        parameters, evaluations = remaining, step.evaluations(evaluations)
    final, ratio = experts.work_ratio(parameters, evaluations)
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
        advice=None if own_only or all(row.fits for row in rows) else advise(planner, inputs, machine, checkpointing),
        expert=recipe.model.expert,
    )


def split_clip(model: Any, graph: BlockGraph, text: int, shape: LatentShape) -> SplitClip | None:
    """Return what of a clip of latents (frames, height, width) processes can share; None if its tokens stay whole."""
    family, config = family_of(stock_name(model)), model.config
    axes = family.token_axes(config)
    if axes is None:
        return None
    streams = list(graph.clip_streams().values())
    return SplitClip(
        tokens=math.prod(family.token_grid(config, shape)),
        text=text,
        heads=axes.heads,
        width=streams[0].spec.shape[-1],
        blocks=len(streams),
        joined=family.attends_to_text,
    )


def _check_groups(recipe: Recipe, processes: int) -> None:
    for key in ("sequence_parallel", "shard_size"):
        size = getattr(recipe.training, key)
        if size is not None and processes % size:
            raise RecipeError(
                f"{recipe.where('training')}.{key}: {size} given, expected a divisor of the {processes} processes"
            )


def _check_batch(recipe: Recipe, index: int, planned: PlannedInput, planner: Planner, processes: int) -> None:
    cost, step, together = planned.cost(planner.graph), planned.step, recipe.training.sequence_parallel
    shares = processes // together
    if step.distributed and cost.steps and cost.batch % shares:
        divisible = -(-cost.batch // shares) * shares
        groups = f"{shares} groups of {together}" if together > 1 else processes
        raise RecipeError(
            f"{recipe.where(f'passes[{index}]')}.{step.name}.batch: {cost.batch} given, expected a multiple of the "
            f"{groups} processes; --set passes.{step.name}.batch={divisible}"
        )


def _available_latents(recipe: Recipe) -> LatentShape | None:
    """Return the latent shape of the recipe's data; None if only configurations are there, which need no data yet."""
    from flcompress.models.folder import only_configurations

    planning = recipe.model.weights == "trained" and only_configurations(recipe.model_folder())
    return None if planning else data_latents(recipe)


def _remaining(graph: BlockGraph, before: float, wanted: float) -> float:
    """Return the parameters left when whole blocks of mean size are removed until at most `wanted` are left."""
    size = sum(block.parameters for block in graph.blocks) / len(graph.blocks)
    # Not one block more for the last digit of a float.
    return before - math.ceil((before - wanted) / size - 1e-9) * size


def _blocks(graph: BlockGraph, parameters: float) -> int:
    """Return the number of blocks of a transformer cut to `parameters`."""
    inside = sum(block.parameters for block in graph.blocks)
    outside = graph.parameters - inside
    return max(1, round(len(graph.blocks) * (parameters - outside) / inside))


def _flops(graph: BlockGraph, parameters: float) -> int:
    """Return the FLOPs of a transformer cut to `parameters`: those in blocks shrink with the blocks' parameters."""
    inside = sum(block.parameters for block in graph.blocks)
    share = (parameters - (graph.parameters - inside)) / inside
    within = sum(block.flops for block in graph.blocks)
    return round(graph.flops - within * (1.0 - share))


def data_latents(recipe: Recipe) -> LatentShape | None:
    """Return (frames, height, width) of the latents of a recipe's data; None without data, or with prompts only.

    A dataset of several sizes counts with its largest, videos with the first that can be read.
    """
    from flcompress.data.index import Index
    from flcompress.models.latent_size import folder_grid
    from flcompress.moving_digits import digits

    spec = recipe.data_spec()
    if spec is None:
        return None
    ((kind, source),) = spec.items()
    size: Size | None = digits.FRAMES, digits.HEIGHT, digits.WIDTH
    if kind == "latents":
        sizes = (shard.size for shard in Index.read(Path(source)).clip_shards)
        size = max(sizes, key=math.prod, default=None)
    elif kind == "videos":
        size = _first_video_size(recipe, source)
    model = recipe.model_folder()
    return folder_grid(model / "transformer", model / "vae").latents(*size) if size else None


def _first_video_size(recipe: Recipe, videos: dict[str, Any]) -> Size | None:
    """Return (frames, height, width) at which the first readable video of a recipe is encoded."""
    from flcompress.data.captions import read_captions
    from flcompress.data.video_frames import BrokenVideo
    from flcompress.data.videos import video_size
    from flcompress.driver.clips import grid_and_target

    grid, target = grid_and_target(recipe)
    for clip in read_captions(Path(videos["captions"]), Path(videos["folder"])):
        try:
            size = video_size(Path(videos["folder"]) / clip.file, limit=target.frames)
        except BrokenVideo:
            continue
        if bucket := target.bucket(size, grid):
            return bucket
    return None
