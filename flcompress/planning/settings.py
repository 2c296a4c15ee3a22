"""The values of `training:` that a recipe could have, what each takes, and which is the cheapest that fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import get_args

from flcompress.core.settings import OFFLOADING, EngineName, Health, OffloadName, Precision, Training
from flcompress.core.steps import Cost, Pass, Role
from flcompress.ir.graph import BlockGraph
from flcompress.planning.activations import SavedActivations
from flcompress.planning.exchanges import PlannedExchanges, SplitClip, TransformerShapes, plan_exchanges
from flcompress.planning.machines import MACHINE, Machine
from flcompress.planning.memory import PlannedMemory, compute_precision, parameter_shares, plan_memory

ENGINES: tuple[EngineName, ...] = ("local", "ddp", "zero1", "zero2", "fsdp2", "zero3")
"""The simplest first, which breaks ties between settings that take equally long; zero3 last: it cannot skip blocks."""
OFFLOADS: tuple[tuple[OffloadName, ...], ...] = ((), ("moments",), ("moments", "inputs"))
"""What the advice may move to host memory: nothing first."""
HOST_LINK = 20e9
"""Bytes a second between a GPU and host memory, one way at a time: an assumption, two thirds of PCIe 4.0 x16."""
MAX_GPUS = 1024
"""Largest GPU count that the advice considers."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A choice of the settings that decide memory and speed."""

    engine: EngineName
    precision: Precision
    gradient_checkpointing: bool
    micro_batch: int | None = None
    offload: tuple[OffloadName, ...] = ()
    sequence_parallel: int = 1
    shard_size: int | None = None

    @classmethod
    def of(cls, training: Training) -> Setting:
        """Return a recipe's own setting."""
        return cls(
            training.engine,
            training.precision,
            training.gradient_checkpointing,
            training.micro_batch,
            training.offload,
            training.sequence_parallel,
            training.shard_size,
        )

    def offloading(self, offload: tuple[OffloadName, ...]) -> Setting:
        """Return this setting with as much of `offload` as it can have."""
        able = tuple(name for name in offload if self.gradient_checkpointing or name != "inputs")
        return replace(self, offload=able if self.engine in OFFLOADING else ())

    def processes(self, machine: Machine) -> int:
        """Return the number of processes that a distributed pass runs on."""
        return 1 if self.engine == "local" else machine.count


def all_settings(
    checkpointing: bool,
    micro_batch: int | None = None,
    offload: tuple[OffloadName, ...] = (),
    sequence_parallel: int = 1,
    shard_size: int | None = None,
) -> list[Setting]:
    """Return every setting to compare at this micro batch.

    Args:
        checkpointing: whether the model's class supports gradient checkpointing.
        micro_batch: samples in one forward of a process; None for all of its share.
        offload: what is in host memory, where a setting can have it so.
        sequence_parallel: processes that compute one clip together, in every engine that has several.
        shard_size: processes that fsdp2 splits weights over.
    """
    choices = product(ENGINES, get_args(Precision), (False, True) if checkpointing else (False,))
    return [
        replace(
            Setting(*choice, micro_batch).offloading(offload),
            sequence_parallel=1 if choice[0] == "local" else sequence_parallel,
            shard_size=shard_size if choice[0] == "fsdp2" else None,
        )
        for choice in choices
    ]


@dataclass(frozen=True, kw_only=True)
class PlannedSetting:
    """The memory and time of a pass under a setting.

    Attributes:
        setting: the setting.
        processes: processes that share the pass.
        batch: samples of a step over all processes: the recipe's batch, or the next that the processes divide.
        memory: memory of one process.
        exchanges: what it sends to others in a step.
        computing: duration of the pass's computations in seconds.
        exchanging: duration of its exchanges, those included that computations hide.
        evaluating: duration of its held-out evaluations.
        seconds: duration of the pass.
        fits: whether a GPU has the memory, with `RESERVE` left.
    """

    setting: Setting
    processes: int
    batch: int
    memory: PlannedMemory
    exchanges: PlannedExchanges
    computing: float
    exchanging: float
    evaluating: float
    seconds: float
    fits: bool


@dataclass(frozen=True)
class PlannedInput:
    """A pass and the transformer that it will be applied to.

    Attributes:
        step: the pass.
        parameters: parameters of that transformer.
        blocks: blocks of that transformer.
        extra_roles: models in memory that the pass does not know of.
        teacher: network evaluations of one of the teacher's samples.
        health: the recipe's settings of held-out evaluations.
    """

    step: Pass
    parameters: float
    blocks: int
    extra_roles: tuple[Role, ...]
    teacher: int
    health: Health

    def cost(self, graph: BlockGraph, batch: int | None = None) -> Cost:
        """Return the cost of the pass, optionally at another batch size."""
        own = "batch" in type(self.step).model_fields
        step = self.step if batch is None or not own else self.step.model_copy(update={"batch": batch})
        cost = step.cost(self.parameters, self.blocks, float(graph.parameters))
        cost = replace(cost, roles=(*cost.roles, *self.extra_roles))
        return cost if batch is None else replace(cost, batch=batch)

    def evaluation_forwards(self, graph: BlockGraph, shares: int) -> float:
        """Return the forwards of its held-out evaluations, in which each of `shares` makes as many samples."""
        health = self.health.model_copy(update={"samples": -(-self.health.samples // shares) * shares})
        return self.step.evaluation_forwards(self.parameters, float(graph.parameters), self.teacher, health)


@dataclass(frozen=True)
class Planner:
    """Plans passes of one model under any setting.

    Attributes:
        graph: block graph of the whole transformer.
        saved: activations of its forward, by precision.
        shapes: its parameters.
        clip: what of a clip can be split over processes; None if nothing can.
        compile: whether blocks are compiled.
    """

    graph: BlockGraph
    saved: Mapping[Precision, SavedActivations]
    shapes: TransformerShapes
    clip: SplitClip | None = None
    compile: bool = False

    def plan(self, planned: PlannedInput, setting: Setting, machine: Machine) -> PlannedSetting:
        """Plan one pass under one setting, at its own batch or the next that the processes divide."""
        cost = planned.cost(self.graph)
        processes = setting.processes(machine) if planned.step.distributed else 1
        together = setting.sequence_parallel if planned.step.distributed and cost.steps else 1
        shares = processes // together
        if cost.steps:
            cost = planned.cost(self.graph, -(-cost.batch // shares) * shares)
        training = Training(
            engine=setting.engine if planned.step.distributed else "local",
            precision=setting.precision,
            gradient_checkpointing=setting.gradient_checkpointing,
            micro_batch=setting.micro_batch,
            offload=setting.offload if planned.step.distributed else (),
            sequence_parallel=together,
            shard_size=setting.shard_size if planned.step.distributed else None,
            compile=self.compile,
        )
        precision = compute_precision(cost, setting.precision, gpu=machine.gpu)
        memory = plan_memory(
            cost,
            self.saved[precision],
            training,
            parameter_shares(self.graph, self.shapes.linear),
            float(self.graph.parameters),
            processes=processes,
            gpu=machine.gpu,
            part=self.clip.part(together) if self.clip is not None else 1.0,
        )
        exchanges = plan_exchanges(cost, training, self.shapes, self.clip, processes=processes, precision=precision)
        hidden, waiting = (
            cost.steps * machine.exchange_seconds(sent.within, sent.between)
            for sent in (exchanges.hidden, exchanges.waiting)
        )
        forwards = cost.forwards + cost.recomputed * setting.gradient_checkpointing
        forward = self.graph.flops / machine.speed(precision) / processes
        computing, evaluating = forwards * forward, planned.evaluation_forwards(self.graph, shares) * forward
        return PlannedSetting(
            setting=setting,
            processes=processes,
            batch=cost.batch,
            memory=memory,
            exchanges=exchanges,
            computing=computing,
            exchanging=hidden + waiting,
            evaluating=evaluating,
            seconds=max(computing, hidden) + waiting + evaluating + cost.steps * memory.moved / HOST_LINK,
            fits=machine.holds(memory.total),
        )


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The cheapest setting under which every pass fits.

    Attributes:
        setting: the setting.
        gpus: number of GPUs that it needs.
        batches: new batch of each training pass whose batch the GPUs do not divide.
        seconds: duration of all passes.
    """

    setting: Setting
    gpus: int
    batches: Mapping[str, int]
    seconds: float

    def lines(self) -> list[str]:
        """Return the lines to write into the recipe."""
        setting = self.setting
        checkpointing = str(setting.gradient_checkpointing).lower()
        training = f"engine: {setting.engine}, precision: {setting.precision}, gradient_checkpointing: {checkpointing}"
        parts = f", micro_batch: {setting.micro_batch}" if setting.micro_batch else ""
        parts += f", offload: [{', '.join(setting.offload)}]" if setting.offload else ""
        parts += f", shard_size: {setting.shard_size}" if setting.shard_size else ""
        parts += f", sequence_parallel: {setting.sequence_parallel}" if setting.sequence_parallel > 1 else ""
        count = f", processes: {self.gpus}" if setting.engine != "local" else ""
        passes = [
            f"  - {name}: {{batch: {batch}}}  # in addition to its other arguments"
            for name, batch in self.batches.items()
        ]
        return [f"training: {{{training}{parts}{count}}}", *(["passes:", *passes] if passes else [])]


def advise(planner: Planner, passes: Sequence[PlannedInput], machine: Machine, checkpointing: bool) -> Advice | None:
    """Return the cheapest setting that fits this machine, or a larger one with the same GPUs; None if nothing fits.

    Batches are kept, or rounded up to what the GPUs divide. A clip is computed by as few GPUs together as possible,
    since they wait for its exchanges, and nothing waits in host memory if that is enough. Of the settings that fit the
    shortest time wins, then the largest micro batch, then the fewest GPUs, then the simplest engine. Weights are split
    within machines only if that is quicker.
    """
    counts = [machine.count, *(2**power for power in range(11) if machine.count < 2**power <= MAX_GPUS)]
    whole = planner.clip is None or any(planned.step.whole_clips for planned in passes)
    degrees = [1] if whole or planner.clip is None else planner.clip.degrees()
    for count, offload, together in product(counts, OFFLOADS, degrees):
        if count % together:
            continue
        sizes = (None, MACHINE) if count > MACHINE and count % MACHINE == 0 else (None,)
        choices = (all_settings(checkpointing, None, offload, together, size) for size in sizes)
        settings = dict.fromkeys(chain.from_iterable(choices))
        fitting = list(_fitting(planner, passes, replace(machine, count=count), settings))
        if fitting:
            return min(
                fitting, key=lambda advice: (advice.seconds, -(advice.setting.micro_batch or math.inf), advice.gpus)
            )
    return None


def _fitting(
    planner: Planner, passes: Sequence[PlannedInput], machine: Machine, settings: Iterable[Setting]
) -> Iterator[Advice]:
    """Yield every one of the settings that fits, with the largest micro batch that does."""
    for setting in settings:
        if any(setting.engine not in planned.step.engines for planned in passes):
            continue
        count = setting.processes(machine)
        costs = [planned.cost(planner.graph) for planned in passes]
        shares = count // setting.sequence_parallel
        own = -(-max((cost.batch for cost in costs if cost.steps), default=1) // shares)
        for micro_batch in (None, *_halves(own)):
            smaller = replace(setting, micro_batch=micro_batch)
            plans = [planner.plan(planned, smaller, machine) for planned in passes]
            if all(plan.fits for plan in plans):
                batches = {
                    planned.step.name: plan.batch
                    for planned, plan, cost in zip(passes, plans, costs, strict=True)
                    if cost.steps and plan.batch != cost.batch
                }
                seconds = sum(plan.seconds for plan in plans)
                yield Advice(setting=smaller, gpus=count, batches=batches, seconds=seconds)
                break


def _halves(samples: int) -> Iterator[int]:
    """Yield 4, 2, 1 for 8; 3, 2, 1 for 5."""
    while samples > 1:
        samples = -(-samples // 2)
        yield samples
