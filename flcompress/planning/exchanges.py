"""Bytes that one process sends in a step, engine by engine.

Every term is a collective that torch, DeepSpeed or `flcompress.distributed.sequence` makes on weights, their gradients
or the tokens of a clip; `tests/training/engines/test_exchanges.py` counts them in real steps. Not in it are scalars,
buffers (DDP sends them before a forward), and the gather of a split clip's prediction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flcompress.core.settings import EngineName, Precision, Training
from flcompress.core.steps import Cost, Role
from flcompress.ir.graph import BlockGraph
from flcompress.planning.machines import MACHINE
from flcompress.planning.memory import BF16, FP32, gathered_widths


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that a process sends, the mean over those of a machine.

    Attributes:
        within: to processes of its own machine.
        between: to other machines.
    """

    within: float = 0.0
    between: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.within + other.within, self.between + other.between)


@dataclass(frozen=True, slots=True)
class Group:
    """Processes that exchange with one another.

    Attributes:
        size: how many they are.
        near: how many of them a machine has.
    """

    size: int
    near: int

    @classmethod
    def neighbours(cls, size: int) -> Group:
        """Return a group of neighbours in rank."""
        return cls(size, min(size, MACHINE))

    @classmethod
    def copies(cls, processes: int, size: int) -> Group:
        """Return the processes that hold the same part, one of every `size` neighbours."""
        return cls(processes // size, min(processes // size, max(1, MACHINE // size)))

    def gather(self, whole: float) -> Sent:
        """Return what an all-gather of `whole` bytes sends, or a reduce-scatter: by a ring, (n - 1) / n of them.

        Of the neighbours in the ring one in `near` is in another machine.
        """
        sent = whole * (self.size - 1) / self.size
        between = sent / self.near if self.size > self.near else 0.0
        return Sent(sent - between, between)

    def reduce(self, whole: float) -> Sent:
        """Return what an all-reduce of `whole` bytes sends: a reduce-scatter and an all-gather."""
        return self.gather(2.0 * whole)

    def transpose(self, own: float) -> Sent:
        """Return what an all-to-all of `own` bytes in each process sends: to every process its n-th part."""
        return Sent(own * (self.near - 1) / self.size, own * (self.size - self.near) / self.size)


@dataclass(frozen=True, kw_only=True)
class SplitClip:
    """A clip whose tokens processes can compute together.

    Attributes:
        tokens: the clip's.
        text: its prompt's, which every process has whole.
        heads: attention heads of the transformer, which the processes divide.
        width: channels of all heads together.
        blocks: blocks whose attention runs over the clip.
        joined: whether that attention runs over the text too.
    """

    tokens: int
    text: int
    heads: int
    width: int
    blocks: int
    joined: bool

    def part(self, together: int) -> float:
        """Return the largest share of a sample's activations that one of `together` processes has."""
        return (-(-self.tokens // together) + self.text) / (self.tokens + self.text)

    def degrees(self) -> list[int]:
        """Return the numbers of processes that the advice considers: those of one machine, at most."""
        return [n for n in (1, 2, 4, MACHINE) if self.heads % n == 0 and n <= self.tokens]

    def exchanged(self, together: int) -> float:
        """Return the numbers that a process has in the all-to-alls of one sample's forward.

        Queries, keys and values of its tokens; back, the output of its heads: of all tokens, and of the text once for
        every process.
        """
        own = self.tokens / together
        return self.blocks * self.width * (3.0 * own + own + self.text * self.joined)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Parameters by the length of their first axis.

    Attributes:
        linear: length -> numbers in weights of linear layers.
        others: length -> numbers in all others.
    """

    linear: Mapping[int, int] = field(default_factory=dict)
    others: Mapping[int, int] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        """All of them."""
        return sum(self.linear.values()) + sum(self.others.values())

    def split(self, parts: int, linear: int, others: int) -> float:
        """Return the bytes of all parts, of which FSDP2 gives each process as many rows, the last ones padding.

        Args:
            parts: processes that split them.
            linear: bytes of a number in the weights of linear layers.
            others: bytes of any other number.
        """
        sizes = [(linear, self.linear), (others, self.others)]
        return sum(
            width * numbers / rows * parts * -(-rows // parts)
            for width, lengths in sizes
            for rows, numbers in lengths.items()
        )


@dataclass(frozen=True, kw_only=True)
class TransformerShapes:
    """Parameters of a transformer, in its blocks and outside of them."""

    inside: Shapes
    outside: Shapes

    @classmethod
    def of(cls, model: Any, graph: BlockGraph) -> TransformerShapes:
        """Return those of a transformer, which may be on the meta device."""
        from torch import nn

        blocks = tuple(f"{block.path}." for block in graph.blocks)
        linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        counts: dict[tuple[bool, bool], Counter[int]] = {
            (inside, matrix): Counter() for inside in (False, True) for matrix in (False, True)
        }
        for name, parameter in model.named_parameters():
            rows = parameter.shape[0] if parameter.ndim else 1
            counts[name.startswith(blocks), name in linear][rows] += parameter.numel()
        outside, inside = (Shapes(linear=counts[part, True], others=counts[part, False]) for part in (False, True))
        return cls(inside=inside, outside=outside)

    @property
    def linear(self) -> float:
        """Share of the parameters that are weights of linear layers."""
        shapes = (self.inside, self.outside)
        return sum(sum(shape.linear.values()) for shape in shapes) / sum(shape.numbers for shape in shapes)

    def depth(self, role: Role) -> float:
        """Return the share of this transformer's blocks that a role has."""
        return max(0.0, role.parameters - self.outside.numbers) / self.inside.numbers

    def split(self, role: Role, parts: int, linear: int, others: int) -> tuple[float, float]:
        """Return the bytes of a role's blocks, and of all that is outside of them; see `Shapes.split`."""
        if role.blockless:
            return 0.0, others * role.parameters
        inside, outside = (shapes.split(parts, linear, others) for shapes in (self.inside, self.outside))
        return inside * self.depth(role), outside


@dataclass(frozen=True, kw_only=True)
class PlannedExchanges:
    """Bytes that one process sends in a step.

    Attributes:
        hidden: while it computes: gradients from a backward on, weights of the next block.
        waiting: while it waits for them.
    """

    hidden: Sent = Sent()
    waiting: Sent = Sent()

    def __add__(self, other: PlannedExchanges) -> PlannedExchanges:
        return PlannedExchanges(hidden=self.hidden + other.hidden, waiting=self.waiting + other.waiting)


def plan_exchanges(
    cost: Cost,
    training: Training,
    shapes: TransformerShapes,
    clip: SplitClip | None,
    *,
    processes: int,
    precision: Precision,
) -> PlannedExchanges:
    """Return what one of a pass's processes sends in each of its steps.

    Args:
        cost: the models that the pass holds, its batch and its steps.
        training: engine, gradient checkpointing, micro batch, sequence parallelism, shard size and compile.
        shapes: the transformer's parameters.
        clip: what of a clip can be split over processes; None if nothing can.
        processes: number of processes that share the pass.
        precision: precision that the pass computes in.
    """
    total = PlannedExchanges()
    if not cost.steps or processes == 1:
        return total
    width, together = BF16 if precision == "bf16" else FP32, training.sequence_parallel
    own = cost.batch * together / processes
    micro_batches = math.ceil(own / min(own, training.micro_batch or own))
    for role in cost.roles:
        if training.engine == "fsdp2":
            widths = gathered_widths(training, precision) if role.trained else (width, width)
            total += _of_fsdp2(role, shapes, processes, training.shard_size or processes, widths, micro_batches)
        else:
            held = FP32 if role.trained else width
            total += _of_others(role, shapes, Group.neighbours(processes), training.engine, held, micro_batches)
        if clip is not None and together > 1 and not role.blockless:
            runs = role.forwards + backwards_of(role) * (2 + training.gradient_checkpointing)
            sent = width * own * runs * shapes.depth(role) * clip.exchanged(together)
            total += PlannedExchanges(waiting=Group.neighbours(together).transpose(sent))
    return total


def backwards_of(role: Role) -> float:
    """Return the forwards of a role in each step that a backward follows."""
    return role.updates * role.trained if role.backwards is None else role.backwards


def _of_fsdp2(
    role: Role, shapes: TransformerShapes, processes: int, parts: int, widths: tuple[int, int], micro_batches: int
) -> PlannedExchanges:
    """Return what fsdp2 sends of a role: everything while other blocks compute.

    A block is gathered for every forward, and once for its backward, which recomputes it if it is checkpointed. What is
    outside of the blocks stays gathered until a backward ends; not counted are that it is gathered anew after an
    average took the place of the weights, and never of a LoRA's base. Gradients are scattered after every micro batch,
    and between copies their parts are reduced once for every update.
    """
    group, backwards = Group.neighbours(parts), backwards_of(role)
    ends = role.updates if role.trained else backwards
    inside, outside = shapes.split(role, parts, *widths)
    sent = group.gather(micro_batches * (inside * (role.forwards + 2.0 * backwards) + outside * ends))
    if role.trained:
        inside, outside = shapes.split(role, parts, FP32, FP32)
        gradients = inside * backwards + outside * ends
        sent += group.gather(micro_batches * gradients) + Group.copies(processes, parts).reduce(gradients / parts)
    return PlannedExchanges(hidden=sent)


def _of_others(
    role: Role, shapes: TransformerShapes, group: Group, engine: EngineName, width: int, micro_batches: int
) -> PlannedExchanges:
    """Return what ddp, zero1, zero2 or zero3 sends of a role.

    ddp reduces all gradients once for every update, zero1 those of the blocks that ran, zero2 after every micro batch:
    all three by an all-reduce, DeepSpeed on the stream that computes. zero1 and zero2 then gather the weights, in fp32.
    zero3 gathers weights for every forward and every backward, of skipped blocks too, and scatters gradients after
    every micro batch; a recomputed block is still there for its backward, as one of up to 10^9 numbers is. Of a model
    that is as small as that more stays gathered.
    """
    backwards, updates = backwards_of(role), role.updates * role.trained
    inside, outside = shapes.split(role, 1, width, width)
    if engine == "zero3":
        forwards = role.forwards + 2.0 * max(backwards, updates)
        sent = micro_batches * (inside + outside) * (forwards + updates)
        return PlannedExchanges(hidden=group.gather(sent))
    if engine == "ddp":
        return PlannedExchanges(hidden=group.reduce(updates * (inside + outside)))
    if not updates:
        return PlannedExchanges()
    gradients = (inside * backwards + outside * updates) * (micro_batches if engine == "zero2" else 1)
    return PlannedExchanges(waiting=group.reduce(gradients) + group.gather(updates * (inside + outside)))
