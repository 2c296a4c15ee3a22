"""A plan as text."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flcompress import wording
from flcompress.planning.machines import LINK_UTILISATION, RESERVE, UTILISATION
from flcompress.planning.plan import Plan, PlannedPass
from flcompress.planning.settings import ENGINES, Setting


def plan_text(plan: Plan, *, settings: bool = False) -> str:
    """Return the plan as tables and sentences.

    Args:
        plan: the plan.
        settings: whether to add the memory of every role, and of every setting of `training:`.
    """
    apart = ("computing", "exchanges") if plan.exchanging else ()
    head = ("pass", "parameters", "FLOPs/forward", "steps", "forwards", *apart, "time", "memory")
    rows = [
        (
            row.name,
            f"{wording.count(row.parameters_before)} -> {wording.count(row.parameters)}",
            wording.flops(row.flops),
            f"{row.steps:,}",
            f"{row.forwards:,}",
            *((wording.duration(row.computing), wording.duration(row.exchanging)) if apart else ()),
            wording.duration(row.seconds),
            wording.size(row.memory.total),
        )
        for row in plan.passes
    ]
    share = plan.passes[-1].parameters / plan.parameters if plan.passes else 1.0
    whose = f" of the {plan.expert}-noise expert" if plan.expert else ""
    return "\n".join(
        [
            f"plan of {plan.recipe}: {plan.model}",
            f"start: {plan.parameters:,} parameters, {plan.flops:,} FLOPs/forward, "
            f"{plan.evaluations} evaluations a sample, latents {' x '.join(map(str, plan.latents))}",
            "",
            *wording.table([head, *rows]),
            "",
            *(_settings_lines(plan) if settings else ()),
            *_memory_lines(plan),
            f"time: about {_time(plan)}; exports: {', '.join(plan.exports) or 'none'}",
            *_evaluation_lines(plan),
            f"end: {plan.final_evaluations} evaluations with {wording.share(share)} of the parameters{whose}: "
            f"{wording.ratio(plan.work_ratio)} less work a sample",
            "nothing was written",
        ]
    )


def _time(plan: Plan) -> str:
    machine = plan.machine
    if not machine.gpu:
        return f"{wording.duration(plan.seconds)} at a measured {wording.flops(machine.single)}FLOP/s"
    hours = plan.seconds / 3600
    total = f"{hours * plan.gpus:,.1f} GPU-hours, {hours:,.1f} hours on {plan.gpus} x {machine.name}"
    speed = f"{total} at {wording.share(UTILISATION, 0)} of the stated speed"
    if not plan.exchanging:
        return speed
    apart = f"{plan.computing / 3600:,.1f} hours of computing, {plan.exchanging / 3600:,.1f} hours of exchanges"
    return f"{speed} ({apart} at {wording.share(LINK_UTILISATION, 0)} of the links')"


def _evaluation_lines(plan: Plan) -> Iterator[str]:
    evaluating = sum(row.evaluating for row in plan.passes)
    if evaluating and not math.isnan(evaluating):
        share = wording.share(evaluating / plan.seconds, 0)
        yield f"time: {share} of it, {wording.duration(evaluating)}, are held-out evaluations (training.health.every)"


def _memory_lines(plan: Plan) -> Iterator[str]:
    """Break down the peak pass's memory, say whether it fits, and advise."""
    if not plan.passes:
        return
    fullest = max(plan.passes, key=lambda row: row.memory.total)
    memory, machine = fullest.memory, plan.machine
    parts = ", ".join(f"{name} {wording.size(value)}" for name, value in memory.parts().items() if value)
    yield f"memory: {fullest.name} takes most, {wording.size(memory.total)} a process: {parts}"
    for row in plan.passes:
        if row.memory.host:
            yield f"memory: {row.name} keeps {wording.size(row.memory.host)} of each process in the machine's memory"
    if machine.memory is None:
        return
    if plan.fits:
        yield f"memory: every pass fits a {machine.name}, with {wording.share(RESERVE, 0)} left for what is not counted"
        return
    names = ", ".join(row.name for row in plan.passes if not row.fits)
    reserve = f"of which {wording.share(RESERVE, 0)} is left for what is not counted"
    yield f"memory: more than a {machine.name} has for {names}, {reserve}"
    if plan.advice is None:
        untrained = [row for row in plan.passes if not row.fits and not row.trains]
        where = "has the whole model on each GPU," if untrained and untrained[0].processes > 1 else "runs on one GPU"
        why = f"; {untrained[0].name} {where} whatever the engine" if untrained else ""
        yield f"memory: nothing fits on any number of these GPUs{why}; take larger ones, or a smaller size"
        return
    advice = plan.advice
    hours = f"{advice.gpus * advice.seconds / 3600:,.1f} GPU-hours, {advice.seconds / 3600:,.1f} hours"
    count = (
        "this fits" if advice.gpus <= machine.count else f"nothing fits {machine.count}; {advice.gpus} GPUs would do"
    )
    yield f"memory: {count} ({hours}):"
    yield from (f"  {line}" for line in advice.lines())


def _settings_lines(plan: Plan) -> Iterator[str]:
    """List every role under the recipe's setting, then the total under every setting."""
    for row in plan.passes:
        if row.trains:
            yield f"{row.name}: GB on each of {row.processes} with {_name(plan.setting)}, batch {row.batch}"
            yield from _role_lines(row)
            yield ""
            yield from _total_lines(plan, row)
            yield ""


def _role_lines(row: PlannedPass) -> list[str]:
    memory = row.memory
    head = ("role", "weights", "gradients", "moments", "average", "engine")
    rows = [
        (name, *(_gigabytes(getattr(role, part)) for part in head[1:]))
        for name, role in sorted(memory.roles.items(), key=lambda item: -item[1].lasting)
    ]
    more = (("activations", memory.activations), ("update, at once", memory.update))
    lines = [*wording.table([head, *rows]), "; ".join(f"{name} {_gigabytes(size)}" for name, size in more)]
    return [f"  {line}" for line in lines]


def _total_lines(plan: Plan, row: PlannedPass) -> list[str]:
    """Return a table with a line per engine and a column per precision, with and without gradient checkpointing."""
    totals = {
        (planned.setting.engine, planned.setting.precision, planned.setting.gradient_checkpointing): planned
        for planned in row.settings
    }
    columns = list(dict.fromkeys((precision, checkpointing) for _, precision, checkpointing in totals))
    rows = [("engine", "batch", *(precision + " +gc" * checkpointing for precision, checkpointing in columns))]
    for engine in ENGINES:
        line = [totals[engine, *column] for column in columns if (engine, *column) in totals]
        if not line:
            continue
        cells = []
        for planned in line:
            verdict = "" if plan.machine.memory is None else " fits" if planned.fits else "   no"
            mark = "*" if planned.setting == plan.setting else ""
            cells.append(mark + _gigabytes(planned.memory.total) + verdict)
        rows.append((engine, str(line[0].batch), *cells))
    lines = [*wording.table(rows), "+gc: with gradient checkpointing; *: the recipe's own"]
    return [f"  {line}" for line in lines]


def _name(setting: Setting) -> str:
    parts: list[str] = [setting.engine, setting.precision]
    if setting.gradient_checkpointing:
        parts.append("gradient checkpointing")
    if setting.micro_batch:
        parts.append(f"micro batch {setting.micro_batch}")
    if setting.offload:
        parts.append(f"{' and '.join(setting.offload)} in host memory")
    if setting.sequence_parallel > 1:
        parts.append(f"{setting.sequence_parallel} GPUs a clip")
    if setting.shard_size:
        parts.append(f"weights split over {setting.shard_size}")
    return ", ".join(parts)


def _gigabytes(size: float) -> str:
    return wording.number(size / 1e9)
