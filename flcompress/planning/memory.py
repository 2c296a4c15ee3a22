"""Memory of a pass on one process, role by role and engine by engine.

Every term is something that torch, AdamW or the engine allocates; none is a fitted factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flcompress.core.settings import EngineName, Precision, Training
from flcompress.core.steps import Cost
from flcompress.ir.graph import BlockGraph
from flcompress.planning.activations import SavedActivations

FP32, BF16 = 4, 2
"""Bytes of a number. Trained weights, gradients and moments are fp32; frozen weights are in the pass's precision."""
EXCHANGED = 6
"""Tensors as large as a block's input that an attention adds where a clip is split over processes: queries, keys and
values, as they are sent and as they are received; their gradients in the backward."""
BUCKET = 500_000_000
"""Numbers in the buffer from which DeepSpeed reduces gradients (`reduce_bucket_size`, its default)."""
LIVE = 1_000_000_000
"""Numbers of gathered weights that ZeRO-3 may keep (`stage3_max_live_parameters`, its default)."""
PROCESS = 450_000_000
"""Bytes of Python, torch and diffusers with the smallest pipeline loaded (docs/benchmarks/planning.md)."""


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """Bytes of one model on one process.

    Attributes:
        weights: its weights, or this process's part of them.
        gradients: its gradients, while it is updated.
        moments: AdamW's moments.
        average: its moving average.
        engine: what the engine keeps in addition from step to step.
    """

    weights: float
    gradients: float = 0.0
    moments: float = 0.0
    average: float = 0.0
    engine: float = 0.0

    @property
    def lasting(self) -> float:
        """Bytes that are allocated all the time: all but the gradients."""
        return self.weights + self.moments + self.average + self.engine


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """Bytes on one process.

    Attributes:
        process: the interpreter and its libraries.
        roles: each model by its name.
        activations: what autograd saves for the samples in memory at once, plus the working memory of one block.
        update: the peak of one role's update in addition to what lasts: activations or gradients, with everything that
            the engine needs. Roles are updated one after the other, so only the largest counts.
        host: what a process with a GPU keeps in the machine's memory.
        moved: what goes to the machine's memory and back in each step, both ways added.
    """

    process: float
    roles: Mapping[str, RoleMemory]
    activations: float
    update: float
    host: float = 0.0
    moved: float = 0.0

    @property
    def total(self) -> float:
        """Peak bytes."""
        lasting = sum(role.lasting for role in self.roles.values())
        return self.process + lasting + self.update

    def parts(self) -> dict[str, float]:
        """Return the parts of the training's peak by name, the largest first."""
        roles = {name: role.lasting for name, role in self.roles.items()}
        parts = {"process": self.process, **roles, "activations or gradients": self.update}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))


@dataclass(frozen=True, slots=True)
class Placement:
    """The split of a training over processes, and their kind of device.

    Attributes:
        engine: how the processes share the training.
        processes: number of processes that split what the engine splits.
        gpu: whether they run on GPUs. There DeepSpeed's buffers take their whole size; on a CPU they take only the
            pages that are written to.
    """

    engine: EngineName
    processes: int
    gpu: bool

    @property
    def splits_weights(self) -> bool:
        """Whether each process holds only its part of the weights."""
        return self.engine in ("zero3", "fsdp2")

    def weights(self, size: float) -> float:
        """Return the bytes that one process holds of `size` bytes of weights, or of an average of them."""
        return size / self.processes if self.splits_weights else size

    def gathered_weights(self, size: float, parameters: float, share: float) -> float:
        """Return the most bytes of split weights that are gathered at once.

        Args:
            size: bytes of all weights.
            parameters: number of parameters.
            share: share of them that is outside of all blocks or in the two largest.
        """
        if self.engine == "zero3":
            return size * min(1.0, LIVE / max(parameters, 1.0))
        return size * share if self.engine == "fsdp2" else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMemory:
    """Bytes that an engine takes on one process for a role's gradients and its update.

    Attributes:
        gradients: reduced gradients.
        lasting: what stays from step to step in addition to weights, moments and average.
        forward: what is allocated in addition to the activations when the backward begins, including the gradients of
            earlier micro batches.
        backward: peak at the end of the backward.
        step: peak while AdamW steps.
    """

    gradients: float
    lasting: float = 0.0
    forward: float = 0.0
    backward: float
    step: float


def moments_memory(numbers: float, placement: Placement) -> float:
    """Return the bytes on one process of the optimiser's moments, `numbers` over all processes."""
    shared = 1 if placement.engine in ("local", "ddp") else placement.processes
    return FP32 * numbers / shared


def update_memory(
    trained: float,
    moments: int,
    gathered: float,
    placement: Placement,
    *,
    rounded: float = 1.0,
    micro_batches: bool = False,
) -> UpdateMemory:
    """Return what an update takes on one process.

    Args:
        trained: number of trained parameters.
        moments: optimiser moments of each of them.
        gathered: bytes of weights that are gathered at once, in fp32.
        placement: how the training is split.
        rounded: share of these bytes that fsdp2 gathers, which rounds some of them.
        micro_batches: whether gradients accumulate over several micro batches.
    """
    total = FP32 * trained
    part = total / placement.processes
    # AdamW's denominator is as large as the tensor that is stepped, here one flat tensor; on the CPU there are two.
    # With one moment the tensor is stepped in slices.
    denominator = 0.0 if moments == 1 else part if placement.gpu else 2.0 * part
    sent = FP32 * min(BUCKET, trained)
    bucket = FP32 * BUCKET if placement.gpu else sent
    waiting = (part if placement.engine in ("zero2", "fsdp2") else total) * micro_batches
    match placement.engine:
        case "local":
            return UpdateMemory(gradients=total, forward=waiting, backward=total, step=total)
        case "ddp":  # gradients are in its buckets, which stay; until the last micro batch they are outside
            return UpdateMemory(gradients=0.0, lasting=total, forward=waiting, backward=0.0, step=0.0)
        case "fsdp2":  # gathered weights, their gradients, and a copy of those that is being sent
            return UpdateMemory(
                gradients=part,
                forward=waiting + rounded * gathered,
                backward=part + (rounded + 2.0) * gathered,
                step=part,
            )
        case "zero3":  # its part of the gradients, the bucket and gathered weights stay; a step flattens the part
            return UpdateMemory(
                gradients=part,
                lasting=part + bucket + gathered,
                backward=part + sent * (1.0 if placement.gpu else 2.0),
                step=part + denominator,
            )
    # zero1 and zero2: the fp32 part that is stepped is a copy, and the bucket is reduced in a flat copy of its own.
    # zero2 also adds the part of a micro batch to that of the earlier ones.
    left = total - sent if placement.engine == "zero1" else waiting
    return UpdateMemory(
        gradients=total if placement.engine == "zero1" else part,
        lasting=part,
        forward=waiting + bucket,
        backward=left + bucket + sent + part,
        step=2.0 * part + denominator,
    )


@dataclass(frozen=True, kw_only=True)
class ParameterShares:
    """Shares of a transformer's parameters.

    Attributes:
        outside: the share outside of all blocks.
        block: the share of the largest block.
        linear: the share in weights of linear layers.
    """

    outside: float
    block: float
    linear: float


def parameter_shares(graph: BlockGraph, linear: float) -> ParameterShares:
    """Return the shares of a traced transformer's parameters, of which `linear` are weights of linear layers."""
    inside = [block.parameters for block in graph.blocks]
    outside, block = 1.0 - sum(inside) / graph.parameters, max(inside) / graph.parameters
    return ParameterShares(outside=outside, block=block, linear=linear)


def gathered_widths(training: Training, precision: Precision) -> tuple[int, int]:
    """Return the bytes of a number that fsdp2 gathers of a trained role: of linear layers' weights, and of all others.

    Under autocast the former are rounded before they are gathered, unless blocks are compiled.
    """
    return BF16 if precision == "bf16" and not training.compile else FP32, FP32


def compute_precision(cost: Cost, precision: Precision, *, gpu: bool) -> Precision:
    """Return the precision that a pass computes in under `training.precision`."""
    return precision if cost.steps or (cost.half and gpu) else "fp32"


def plan_memory(
    cost: Cost,
    saved: SavedActivations,
    training: Training,
    shares: ParameterShares,
    original: float,
    *,
    processes: int,
    gpu: bool,
    part: float = 1.0,
) -> PlannedMemory:
    """Return the memory of a pass on one of its processes.

    Args:
        cost: the models that the pass holds, its batch and its steps.
        saved: activations of the whole transformer, in the precision that the pass computes in.
        training: engine, precision, gradient checkpointing, micro batch, offload, sequence parallelism and shard size.
        shares: shares of the transformer's parameters.
        original: parameters of the transformer that `saved` was counted for.
        processes: number of processes that share the pass.
        gpu: whether each of them has a GPU.
        part: share of a clip's activations that each process has of those that compute it together.
    """
    # A pass that does not train has the whole model in every process, and a batch of its own.
    placement = Placement(training.engine if cost.steps else "local", training.shard_size or processes, gpu)
    precision = compute_precision(cost, training.precision, gpu=gpu)
    width = BF16 if precision == "bf16" else FP32
    together = training.sequence_parallel
    own = cost.batch * together / processes if cost.steps else float(cost.batch)
    samples = min(own, training.micro_batch or own) if cost.steps else own

    roles: dict[str, RoleMemory] = {}
    updates: list[tuple[UpdateMemory, float]] = []
    last = saved.backward.of(part * samples)  # the first block's backward, when most gradients are there
    waiting = 0.0  # inputs of the blocks of one role, in host memory
    activations = others = host = moved = 0.0
    away = training.offload if gpu else ()  # on a CPU it is the same memory
    for role in cost.roles:
        size = role.parameters * (FP32 if role.trained else width)
        weights = placement.weights(size)
        share = min(1.0, shares.outside + 2.0 * shares.block)
        gathered = placement.gathered_weights(size, role.parameters, share)
        if not role.trained:
            # ZeRO-3 releases gathered weights late, FSDP2 when the next block has run.
            lasting = gathered if placement.engine == "zero3" else 0.0
            roles[role.name] = RoleMemory(weights=weights, engine=lasting)
            others = max(others, gathered - lasting)
            continue
        linear, other = (FP32, FP32) if role.blockless else gathered_widths(training, precision)
        rounded = (shares.linear * linear + (1.0 - shares.linear) * other) / FP32
        update = update_memory(
            role.parameters, role.moments, gathered, placement, rounded=rounded, micro_batches=samples < own
        )
        moments = moments_memory(role.moments * role.parameters, placement)
        average = weights if role.averaged else 0.0
        if "moments" in away:  # those of one tensor, at most of a block, are on the device at once
            host += moments + average
            moved += 2.0 * role.updates * (moments + average)
            update = replace(update, step=update.step + moments * min(1.0, shares.block))
            moments = average = 0.0
        roles[role.name] = RoleMemory(
            weights=weights, gradients=update.gradients, moments=moments, average=average, engine=update.lasting
        )
        depth = min(1.0, role.parameters / original) if role.runs is None else role.runs / original
        alive = saved.training(part * samples, depth, training.gradient_checkpointing)
        alive += EXCHANGED * saved.stream.of(part * samples) * (together > 1)
        if "inputs" in away:
            inputs = saved.streams.of(part * samples) * depth
            alive -= inputs
            waiting = max(waiting, inputs)
            moved += 2.0 * role.updates * saved.streams.of(part * own) * depth
        activations = max(activations, alive)
        updates.append((update, alive))
    # A frozen model runs while the activations of a trained one are saved.
    peaks = (max(update.forward + others + alive, update.backward + last, update.step) for update, alive in updates)
    peak = max(peaks, default=0.0)
    if not updates:
        activations = peak = saved.inference.of(samples) if cost.roles or cost.forwards else 0.0
    peak += saved.streams.of(samples) * cost.keeps_features
    remembered = saved.streams.of(samples) * cost.keeps_activations
    # Models are loaded one after the other, and part by part where an engine splits them: loading is never the peak.
    return PlannedMemory(
        process=0.0 if gpu else PROCESS,
        roles=roles,
        activations=activations,
        update=peak if gpu else peak + remembered,
        host=host + waiting + (remembered if gpu else 0.0),
        moved=moved,
    )
