"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flcompress.planning.machines import RESERVE, UTILISATION
from flcompress.planning.plan import Plan, PlannedPass
from flcompress.planning.settings import ENGINES, Setting
from flcompress.progress import clock


def plan_text(plan: Plan, *, settings: bool = False) -> str:
    """The plan as tables.

    Args:
        plan: the plan.
        settings: with the memory of every role, and of every setting of `training:`.
    """
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
    share = plan.passes[-1].parameters / plan.parameters if plan.passes else 1.0
    whose = f" of the {plan.expert}-noise expert" if plan.expert else ""
    return "\n".join(
        [
            f"plan of {plan.recipe}: {plan.model}",
            f"start: {plan.parameters:,} parameters, {plan.flops:,} FLOPs/forward, "
            f"{plan.evaluations} evaluations a sample, latents {' x '.join(map(str, plan.latents))}",
            "",
            *_table(head, rows),
            "",
            *(_settings_lines(plan) if settings else ()),
            *_memory_lines(plan),
            f"time: about {_time(plan)}; exports: {', '.join(plan.exports) or 'none'}",
            f"end: {plan.final_evaluations} evaluations with {share:.1%} of the parameters{whose}: "
            f"{plan.work_ratio:.2f}x less work a sample",
            "nothing was written",
        ]
    )


def _time(plan: Plan) -> str:
    machine = plan.machine
    if not machine.gpu:
        return f"{clock(plan.seconds)} at a measured {machine.single / 1e9:.1f} GFLOP/s"
    hours = plan.seconds / 3600
    total = f"{hours * plan.gpus:,.1f} GPU-hours, {hours:,.1f} hours on {plan.gpus} x {machine.name}"
    return f"{total} at {UTILISATION:.0%} of the stated speed"


def _memory_lines(plan: Plan) -> Iterator[str]:
    """Of what the memory of the fullest pass is made up, whether a GPU has it, and what to do."""
    if not plan.passes:
        return
    fullest = max(plan.passes, key=lambda row: row.memory.total)
    memory, machine = fullest.memory, plan.machine
    parts = ", ".join(f"{name} {_short(value)}B" for name, value in memory.parts().items() if value)
    yield f"memory: {fullest.name} takes most, {_short(memory.total)}B a process: {parts}"
    for row in plan.passes:
        if row.memory.host:
            yield f"memory: {row.name} keeps {_short(row.memory.host)}B of each process in the machine's memory"
    if machine.memory is None:
        return
    if plan.fits:
        yield f"memory: every pass fits a {machine.name}, with {RESERVE:.0%} left for what is not counted"
        return
    names = ", ".join(row.name for row in plan.passes if not row.fits)
    yield f"memory: more than a {machine.name} has for {names}, of which {RESERVE:.0%} is left for what is not counted"
    if plan.advice is None:
        alone = [row for row in plan.passes if not row.fits and not row.trains]
        where = "has the whole model on each GPU," if alone and alone[0].processes > 1 else "runs on one GPU"
        why = f"; {alone[0].name} {where} whatever the engine" if alone else ""
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
    """Every role under the recipe's setting, then the total under every setting."""
    for row in plan.passes:
        if row.trains:
            yield f"{row.name}: GB on each of {row.processes} with {_named(plan.setting)}, batch {row.batch}"
            yield from _roles(row)
            yield ""
            yield from _totals(plan, row)
            yield ""


def _roles(row: PlannedPass) -> list[str]:
    memory = row.memory
    head = ("role", "weights", "gradients", "moments", "average", "engine")
    rows = [
        (name, *(_gb(getattr(role, part)) for part in head[1:]))
        for name, role in sorted(memory.roles.items(), key=lambda item: -item[1].lasting)
    ]
    more = (("activations", memory.activations), ("update, at once", memory.update))
    lines = _table(head, rows)
    return [f"  {line}" for line in lines] + ["  " + "; ".join(f"{name} {_gb(size)}" for name, size in more)]


def _totals(plan: Plan, row: PlannedPass) -> list[str]:
    columns = list(dict.fromkeys((one.setting.precision, one.setting.gradient_checkpointing) for one in row.settings))
    head = ("engine", "batch", *(precision + (" again" if again else "") for precision, again in columns))
    rows = []
    for engine in ENGINES:
        found = {(one.setting.precision, one.setting.gradient_checkpointing): one for one in row.settings
                 if one.setting.engine == engine}  # fmt: skip
        if not found:
            continue
        cells = []
        for column in columns:
            one = found[column]
            verdict = "" if plan.machine.memory is None else " fits" if one.fits else "   no"
            cells.append(_gb(one.memory.total) + verdict + ("*" if one.setting == plan.setting else " "))
        rows.append((engine, str(next(iter(found.values())).batch), *cells))
    told = "again: with gradient checkpointing; *: the recipe's own"
    return [*(f"  {line}" for line in _table(head, rows)), f"  {told}"]


def _named(setting: Setting) -> str:
    told = [setting.engine, setting.precision, *(["gradient checkpointing"] * setting.gradient_checkpointing)]
    return ", ".join([*told, *([f"micro batch {setting.micro_batch}"] if setting.micro_batch else [])])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *rows)
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}" if size else "0"


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
