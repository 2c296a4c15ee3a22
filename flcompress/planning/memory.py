"""How much memory a pass takes on one process, role by role. Each part is counted; none is a fitted factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flcompress.core.settings import Precision, Training
from flcompress.core.steps import Cost
from flcompress.ir.graph import BlockGraph
from flcompress.planning.activations import Kept
from flcompress.planning.engine_memory import FLOAT, HALF, Place, Updating, moments, updating

PROCESS = 450_000_000
"""Bytes of Python, torch and diffusers with the smallest pipeline loaded (docs/benchmarks/planning.md)."""


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """Bytes of one model on one process.

    Attributes:
        weights: of it, or of this process's part.
        gradients: while it is updated.
        moments: AdamW's.
        average: its moving average.
        engine: what the engine keeps beside these from step to step.
    """

    weights: float
    gradients: float = 0.0
    moments: float = 0.0
    average: float = 0.0
    engine: float = 0.0

    @property
    def lasting(self) -> float:
        """Bytes that are there all the time: all but the gradients."""
        return self.weights + self.moments + self.average + self.engine


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """Bytes on one process.

    Attributes:
        process: the interpreter and its libraries.
        roles: of each model.
        activations: what autograd keeps of the samples in memory at once, and what one block is being computed with.
        update: the most that one role's update takes beside what lasts: activations or gradients, with all that the
            engine needs. Roles are updated one after the other, so it counts once.
        host: what a process with a GPU keeps in the machine's memory.
    """

    process: float
    roles: Mapping[str, RoleMemory]
    activations: float
    update: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """The peak."""
        lasting = sum(role.lasting for role in self.roles.values())
        return self.process + lasting + self.update

    def parts(self) -> dict[str, float]:
        """Every part of the peak of the training by its name, the largest first."""
        roles = {name: role.lasting for name, role in self.roles.items()}
        parts = {"process": self.process, **roles, "activations or gradients": self.update}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shares of a transformer's parameters.

    Attributes:
        outside: what is in no block.
        block: the largest block.
    """

    outside: float
    block: float


def sizes_of(graph: BlockGraph) -> Sizes:
    """Of a traced transformer."""
    inside = [block.parameters for block in graph.blocks]
    return Sizes(outside=1.0 - sum(inside) / graph.parameters, block=max(inside) / graph.parameters)


def precision_of(cost: Cost, precision: Precision, *, gpu: bool) -> Precision:
    """What a pass computes in, where the training's precision is the given one."""
    return precision if cost.steps or (cost.half and gpu) else "fp32"


def planned_memory(
    cost: Cost, kept: Kept, training: Training, sizes: Sizes, original: float, *, processes: int, gpu: bool
) -> PlannedMemory:
    """Memory of a pass on one of its processes.

    Args:
        cost: what the pass says it holds.
        kept: what a forward of the whole transformer keeps alive, in the precision that the pass computes in.
        training: engine, precision, gradient checkpointing and micro batch.
        sizes: of the transformer's parts.
        original: parameters of the transformer that `kept` was counted for.
        processes: how many share the pass.
        gpu: whether each has a GPU.
    """
    # Without a training every process has the whole model, and a batch of its own.
    place = Place(training.engine if cost.steps else "local", processes, gpu)
    width = HALF if precision_of(cost, training.precision, gpu=gpu) == "bf16" else FLOAT
    own = cost.batch / processes if cost.steps else float(cost.batch)
    samples = min(own, training.micro_batch or own) if cost.steps else own

    roles: dict[str, RoleMemory] = {}
    updates: list[tuple[Updating, float]] = []
    activations = others = 0.0
    for role in cost.roles:
        size = role.parameters * (FLOAT if role.trained else width)
        weights = place.weights(size)
        gathered = place.gathered(size, role.parameters, min(1.0, sizes.outside + 2.0 * sizes.block))
        if not role.trained:
            # ZeRO-3 lets gathered weights go late, FSDP2 when the next block has run.
            kept_gathered = gathered if place.engine == "zero3" else 0.0
            roles[role.name] = RoleMemory(weights=weights, engine=kept_gathered)
            others = max(others, gathered - kept_gathered)
            continue
        taken = updating(role.parameters, role.moments, gathered, place, micro_batches=samples < own)
        roles[role.name] = RoleMemory(
            weights=weights,
            gradients=taken.gradients,
            moments=moments(role.moments * role.parameters, place),
            average=weights if role.averaged else 0.0,
            engine=taken.lasting,
        )
        depth = (role.runs or role.parameters) / original
        alive = kept.training(samples, min(1.0, depth), training.gradient_checkpointing)
        activations = max(activations, alive)
        updates.append((taken, alive))
    # A frozen model judges while the activations of a trained one are there.
    update = max((max(one.forward + others + alive, one.backward, one.step) for one, alive in updates), default=0.0)
    if not updates:
        activations = update = kept.alone.of(samples)
    remembered = kept.streams.of(samples) * cost.remembers
    if not gpu:
        update += remembered
    # Models are loaded one after the other, by parts where they are split: never more than what is held in training.
    return PlannedMemory(
        process=0.0 if gpu else PROCESS,
        roles=roles,
        activations=activations,
        update=update,
        host=remembered if gpu else 0.0,
    )
