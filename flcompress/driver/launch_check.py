"""Check that a recipe and the launcher of its processes agree."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flcompress.core.settings import Training
from flcompress.core.steps import Pass
from flcompress.distributed.launch import Launch
from flcompress.errors import RequestError

if TYPE_CHECKING:
    from flcompress.models.families.family import LatentShape

_ACCELERATE = {"ACCELERATE_USE_DEEPSPEED": ("zero1", "zero2", "zero3"), "ACCELERATE_USE_FSDP": ("fsdp2",)}


def check_launch(training: Training, launch: Launch, passes: Iterable[Pass] = ()) -> None:
    """Raise RequestError if the recipe and the launcher ask for different engines, processes or batches."""
    engine, wanted = training.engine, training.processes
    how = f"torchrun --nproc-per-node {wanted or 2} -m flcompress apply RECIPE"
    if wanted is not None and wanted != launch.size:
        raise RequestError(
            f"training.processes: {wanted} given, but the launcher started {launch.size} (WORLD_SIZE); "
            f"start with {how}, or change it"
        )
    if engine == "local" and launch.size > 1:
        raise RequestError(
            f"training.engine: local given, but the launcher started {launch.size} processes (WORLD_SIZE); "
            "set it to ddp, zero1, zero2, zero3 or fsdp2, or start one"
        )
    if engine != "local" and launch.size == 1 and wanted != 1:
        raise RequestError(
            f"training.engine: {engine} given, but only one process runs (WORLD_SIZE is unset or 1; "
            f"`accelerate launch --cpu` always starts one); start with {how}, "
            "or set training.processes: 1 if one is meant"
        )
    together = training.sequence_parallel
    if launch.size % together:
        raise RequestError(
            f"training.sequence_parallel: {together} given, expected a divisor of the {launch.size} processes that the "
            "launcher started (WORLD_SIZE)"
        )
    if training.shard_size is not None and launch.size % training.shard_size:
        raise RequestError(
            f"training.shard_size: {training.shard_size} given, expected a divisor of the {launch.size} processes that "
            "the launcher started (WORLD_SIZE)"
        )
    _check_accelerate(training)
    for step in passes:
        cost = step.cost(1.0, 1, 1.0)
        if step.distributed and cost.steps and cost.batch % (launch.size // together):
            groups = f"{launch.size // together} groups of {together}" if together > 1 else launch.size
            raise RequestError(
                f"{step.name}: batch {cost.batch} given, expected a multiple of the {groups} processes; change either"
            )


def check_sequence(training: Training, passes: Iterable[Pass], transformer: Path, latents: LatentShape) -> None:
    """Raise RequestError unless the model's tokens and heads can be split over processes as the training asks.

    Args:
        training: the settings.
        passes: the recipe's.
        transformer: the folder of the model's transformer.
        latents: (frames, height, width) of the clips that the recipe samples.
    """
    from flcompress.models.families import family_of
    from flcompress.models.loading import meta_transformer
    from flcompress.models.network import stock_name

    if training.sequence_parallel == 1:
        return
    given = f"training.sequence_parallel: {training.sequence_parallel} given"
    if training.engine == "local":
        raise RequestError(f"{given} with engine: local, which is one process; set it to ddp or fsdp2")
    if training.compile:
        raise RequestError(f"{given} with compile: true, which do not combine; leave out either")
    for step in passes:
        if step.whole_clips:
            raise RequestError(f"{given} with {step.name}, which needs whole clips in each process; set it to 1")
    model = meta_transformer(transformer)
    name, config = stock_name(model), model.config
    family = family_of(name)
    axes = family.token_axes(config)
    if axes is None:
        raise RequestError(
            f"{given}, but the tokens of {name}, as {transformer / 'config.json'} configures it, cannot be split over "
            "processes (docs/training.md names the classes); set it to 1"
        )
    tokens = math.prod(family.token_grid(config, latents))
    if axes.heads % training.sequence_parallel:
        raise RequestError(f"{given}, expected a divisor of the {axes.heads} attention heads of {name}")
    if tokens < training.sequence_parallel:
        raise RequestError(
            f"{given}, but a clip of latents {' x '.join(map(str, latents))} has {tokens} tokens; expected at least "
            "one for each process"
        )


def check_attention(training: Training, pipeline: str, transformer: Path, device: str) -> None:
    """Raise RequestError for a kernel of attention that the precision, the model or this machine lacks.

    Args:
        training: the settings.
        pipeline: class of the model's pipeline.
        transformer: the folder of its transformer.
        device: "cpu" or "cuda".
    """
    from flcompress.models.families import family_of
    from flcompress.models.loading import meta_transformer
    from flcompress.models.network import choose_attention

    name = training.attention
    if name in ("flash", "cudnn") and training.precision == "fp32":
        raise RequestError(
            f"training.attention: {name} given, which computes in half precision only; set training.precision: bf16, "
            "or attention: native"
        )
    if name == "flash" and (family := family_of(pipeline)).masks_attention:
        if family.mask_switch(meta_transformer(transformer)) is None:
            raise RequestError(
                f"training.attention: flash given, but {pipeline} masks its attention, which flash attention cannot; "
                "set it to efficient, cudnn or native"
            )
        if training.compile:
            raise RequestError(
                f"training.attention: flash given with compile: true, which keeps the masks of {pipeline}; leave out "
                "either"
            )
        if training.micro_batch != 1:
            raise RequestError(
                f"training.attention: flash given, but {pipeline} masks prompts of different lengths in one forward, "
                "which flash attention cannot; set training.micro_batch: 1, or attention to efficient, cudnn or native"
            )
    if name in ("cudnn", "efficient") and device == "cpu":
        raise RequestError(
            f"training.attention: {name} given, a kernel of GPUs, but this machine has none that torch can use; set it "
            "to native"
        )
    if name != "native":
        choose_attention(meta_transformer(transformer), name)


def _check_accelerate(training: Training) -> None:
    """Raise RequestError if accelerate was configured for another engine or precision than the recipe."""
    engine = training.engine
    for variable, engines in _ACCELERATE.items():
        if os.environ.get(variable, "false").lower() == "true" and engine not in engines:
            raise RequestError(
                f"training.engine: {engine} given, but accelerate was configured for {' or '.join(engines)} "
                f"({variable}); set one like the other"
            )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", engine[-1])
    if engine.startswith("zero") and stage != engine[-1]:
        raise RequestError(
            f"training.engine: {engine} given, but accelerate was configured for ZeRO stage {stage} "
            "(ACCELERATE_DEEPSPEED_ZERO_STAGE); set one like the other"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and precision != training.precision:
        raise RequestError(
            f"training.precision: {training.precision} given, but accelerate was configured for {precision} "
            "(ACCELERATE_MIXED_PRECISION); set one like the other"
        )
