"""The settings of `training:` that a recipe could have, what each takes, and which is the cheapest that fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from flcompress.core.settings import EngineName, Precision, Training
from flcompress.core.steps import Cost, Pass, Role
from flcompress.ir.graph import BlockGraph
from flcompress.planning.activations import Kept
from flcompress.planning.gpus import Machine
from flcompress.planning.memory import PlannedMemory, planned_memory, precision_of, sizes_of

ENGINES: tuple[EngineName, ...] = ("local", "ddp", "zero1", "zero2", "fsdp2", "zero3")
"""The simplest first; of those that take equally long this order decides. zero3 is last: it cannot skip blocks."""
MOST = 1024
"""GPUs up to which is looked for a number that fits."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One choice of what decides memory and speed."""

    engine: EngineName
    precision: Precision
    gradient_checkpointing: bool
    micro_batch: int | None = None

    def processes(self, machine: Machine) -> int:
        """How many a distributed pass runs on."""
        return 1 if self.engine == "local" else machine.count


def setting_of(training: Training) -> Setting:
    """A recipe's own."""
    return Setting(training.engine, training.precision, training.gradient_checkpointing, training.micro_batch)


def settings(checkpointing: bool, micro_batch: int | None = None) -> list[Setting]:
    """All that there are with one micro batch; without gradient checkpointing where the model's class has none."""
    choices = product(ENGINES, get_args(Precision), (False, True) if checkpointing else (False,))
    return [Setting(*choice, micro_batch) for choice in choices]


@dataclass(frozen=True, kw_only=True)
class PlannedSetting:
    """What a pass takes under a setting.

    Attributes:
        setting: which.
        processes: that share the pass.
        batch: of a step, over all of them: the recipe's, or the next that they divide.
        memory: of one process.
        seconds: from beginning to end.
        fits: whether a GPU has the memory, RESERVE aside.
    """

    setting: Setting
    processes: int
    batch: int
    memory: PlannedMemory
    seconds: float
    fits: bool


@dataclass(frozen=True)
class Met:
    """A pass with the transformer that it meets.

    Attributes:
        step: the pass.
        parameters, blocks: of the transformer then.
        beside: models in memory that the pass cannot know of.
    """

    step: Pass
    parameters: float
    blocks: int
    beside: tuple[Role, ...] = ()

    def cost(self, graph: BlockGraph, batch: int | None = None) -> Cost:
        """Of the pass, with another batch where one is given."""
        own = "batch" in type(self.step).model_fields
        step = self.step if batch is None or not own else self.step.model_copy(update={"batch": batch})
        cost = step.cost(self.parameters, self.blocks, float(graph.parameters))
        cost = replace(cost, roles=(*cost.roles, *self.beside))
        return cost if batch is None else replace(cost, batch=batch)


@dataclass(frozen=True)
class Planner:
    """Plans passes of one model under any setting.

    Attributes:
        graph: of the whole transformer.
        kept: what its forward keeps alive, by precision.
    """

    graph: BlockGraph
    kept: Mapping[Precision, Kept]

    def planned(self, met: Met, setting: Setting, machine: Machine) -> PlannedSetting:
        """One pass under one setting, with its batch or the next that the processes divide."""
        cost = met.cost(self.graph)
        processes = setting.processes(machine) if met.step.distributed else 1
        if cost.steps:
            cost = met.cost(self.graph, -(-cost.batch // processes) * processes)
        engine = setting.engine if met.step.distributed else "local"
        training = Training(
            engine=engine,
            precision=setting.precision,
            gradient_checkpointing=setting.gradient_checkpointing,
            micro_batch=setting.micro_batch,
        )
        precision = precision_of(cost, setting.precision, gpu=machine.gpu)
        memory = planned_memory(
            cost,
            self.kept[precision],
            training,
            sizes_of(self.graph),
            float(self.graph.parameters),
            processes=processes,
            gpu=machine.gpu,
        )
        forwards = cost.forwards + cost.again * setting.gradient_checkpointing
        return PlannedSetting(
            setting=setting,
            processes=processes,
            batch=cost.batch,
            memory=memory,
            seconds=forwards * self.graph.flops / machine.speed(precision) / processes,
            fits=machine.holds(memory.total),
        )


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The cheapest setting under which every pass fits.

    Attributes:
        setting: which.
        gpus: how many it needs.
        batches: of the passes that train, where the GPUs do not divide the recipe's.
        seconds: of all passes.
    """

    setting: Setting
    gpus: int
    batches: Mapping[str, int]
    seconds: float

    def lines(self) -> list[str]:
        """What to write into the recipe."""
        one = self.setting
        checkpointing = str(one.gradient_checkpointing).lower()
        training = f"engine: {one.engine}, precision: {one.precision}, gradient_checkpointing: {checkpointing}"
        parts = f", micro_batch: {one.micro_batch}" if one.micro_batch else ""
        count = f", processes: {self.gpus}" if one.engine != "local" else ""
        passes = [
            f"  - {name}: {{batch: {batch}}}  # beside its other arguments" for name, batch in self.batches.items()
        ]
        return [f"training: {{{training}{parts}{count}}}", *(["passes:", *passes] if passes else [])]


def advise(planner: Planner, passes: Sequence[Met], machine: Machine, checkpointing: bool) -> Advice | None:
    """The cheapest setting that fits this machine, or a larger one of the same GPUs; None where none does.

    Batches are kept, or rounded up to what the GPUs divide. Of what fits the quickest counts, then the largest micro
    batch, then the fewest GPUs, then the simplest engine.
    """
    counts = [machine.count, *(2**power for power in range(11) if machine.count < 2**power <= MOST)]
    for count in counts:
        found = list(_fitting(planner, passes, replace(machine, count=count), checkpointing))
        if found:
            return min(found, key=lambda one: (one.seconds, -(one.setting.micro_batch or math.inf), one.gpus))
    return None


def _fitting(planner: Planner, passes: Sequence[Met], machine: Machine, checkpointing: bool) -> Iterator[Advice]:
    """Every setting that fits, with the largest micro batch that does."""
    for setting in settings(checkpointing):
        if any(setting.engine not in met.step.engines for met in passes):
            continue
        count = setting.processes(machine)
        costs = [met.cost(planner.graph) for met in passes]
        own = -(-max((cost.batch for cost in costs if cost.steps), default=1) // count)
        for micro_batch in (None, *_halves(own)):
            one = replace(setting, micro_batch=micro_batch)
            planned = [planner.planned(met, one, machine) for met in passes]
            if all(each.fits for each in planned):
                batches = {
                    met.step.name: each.batch
                    for met, each, cost in zip(passes, planned, costs, strict=True)
                    if cost.steps and each.batch != cost.batch
                }
                yield Advice(setting=one, gpus=count, batches=batches, seconds=sum(each.seconds for each in planned))
                break


def _halves(samples: int) -> Iterator[int]:
    """8 -> 4, 2, 1."""
    while samples > 1:
        samples = -(-samples // 2)
        yield samples
