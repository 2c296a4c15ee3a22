"""What `flcompress report RUN`, `eval` and `bench` print of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flcompress import wording
from flcompress.reporting.findings import Blocks, Headline, blocks, headline
from flcompress.reporting.quality import Cell, Quality, quality
from flcompress.reporting.reading import RunRecord, read_run
from flcompress.reporting.speed import Speed, speed
from flcompress.reporting.stages import AGAINST_PLAN, AGAINST_PLAN_NOTE, Export, Step, exports, steps
from flcompress.reporting.training import Training, trainings

PARITY_WORDS = ("difference", "error", "parity", "tolerance")
"""What an exporter's summary calls the numbers that say how close the export is to the model."""

NAMES = ("pass", "block", "step", "export")
"""Columns of names, which are copied into recipes and commands."""

MARKS = {"best": "*", "tied": "~", "": ""}


def print_summary(run_dir: Path, console: Console) -> None:
    """Print what a run gained and lost, and what has not been measured.

    Raises:
        RequestError: `run_dir` is no run directory.
        RecordError: a file in it is damaged.
    """
    run = read_run(run_dir)
    fates, passes = blocks(run), steps(run)
    # Everything is read before the first line is printed: an error does not follow half a summary.
    top, exported, trained = headline(run), exports(run), trainings(run)
    measured, times = _measured_quality(run), speed(run.bench) if run.bench is not None else None
    _name(run, console)
    if top is None:
        console.print("Nothing is stored yet; run flcompress apply RECIPE", highlight=False)
    else:
        _headline(top, console)
    if times is None:
        console.print(_how_to_measure("speed", "bench", run), highlight=False)
    else:
        _speed(times, console)
    if not measured:
        console.print(_how_to_measure("quality", "eval", run), end="\n\n", highlight=False)
    for suite in measured:
        _quality(suite, console)
    if fates is not None:
        _print_removed(fates, console)
    _trainings(trained, console)
    if passes:
        table = _table("Passes and exports", "step", "status", ">time", ">peak memory")
        for step in passes:
            table.add_row(
                escape(step.name),
                step.status,
                step.time,
                step.memory,
            )
        console.print(table)
    _plan(passes, console)
    _exports(exported, console)


def print_measured(run_dir: Path, console: Console, command: Literal["eval", "bench"]) -> None:
    """Print what `flcompress eval`, by every suite, or `flcompress bench` measured; errors: see `print_summary`."""
    run = read_run(run_dir)
    measured = _measured_quality(run) if command == "eval" else []
    times = speed(run.bench) if command == "bench" and run.bench is not None else None
    _name(run, console)
    for suite in measured:
        _quality(suite, console)
    if times is not None:
        _speed(times, console)
    console.print(f"The whole run, and its page: flcompress report {escape(str(run.path))}", highlight=False)


def _measured_quality(run: RunRecord) -> list[Quality]:
    return [quality(results) for results in (run.evaluation, *run.suites.values()) if results is not None]


def _name(run: RunRecord, console: Console) -> None:
    console.print(f"[bold]{escape(run.info.name or run.path.name)}[/bold]  {escape(str(run.path))}")


def _table(title: str, *columns: str) -> Table:
    """A plain table; a column that starts with ">" is set to the right, one of names is never broken."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1, 0, 0)  # the widest table then fits 80 columns
    for column in columns:
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=side, overflow="fold", no_wrap=column in NAMES)
    return table


def _headline(top: Headline, console: Console) -> None:
    table = _table("", "", ">before", ">after", ">ratio")
    table.add_row(
        "parameters",
        wording.count(top.parameters_before),
        wording.count(top.parameters_after),
        f"{wording.share(top.share)} kept",
    )
    table.add_row(
        "blocks", str(top.blocks_before), str(top.blocks_after), f"{top.blocks_before - top.blocks_after} cut"
    )
    table.add_row("steps", str(top.before.steps), str(top.after.steps), "")
    table.add_row("guidance", f"{top.before.guidance:g}", f"{top.after.guidance:g}", "")
    table.add_row("network evaluations", str(top.before.evaluations), str(top.after.evaluations), "")
    if top.before.own != top.before.evaluations:
        table.add_row("of them the compressed expert's", str(top.before.own), str(top.after.own), "")
    table.add_row("work (evaluations x parameters)", "", "", wording.ratio(top.work_ratio))
    if top.measured is not None:
        table.add_row(f"measured time ({escape(top.measured_on)})", "", "", wording.ratio(top.measured.mean))
    console.print(table)


def _speed(speed: Speed, console: Console) -> None:
    clips = f"clips of {speed.size} pixels, " if speed.size else ""
    table = _table(
        f"Speed: {clips}batch {speed.batch}, median of {speed.rounds} rounds",
        "backend",
        "what",
        *([">memory before", ">after"] if speed.memory else []),
        ">time before",
        ">after",
        ">ratio",
    )
    for row in speed.rows:
        table.add_row(
            escape(f"{row.backend} {row.precision}".strip()),
            row.what,
            *([_octets(row.teacher_memory), _octets(row.student_memory)] if speed.memory else []),
            wording.duration(row.teacher.mean),
            wording.duration(row.student.mean),
            wording.ratio(row.ratio.mean),
        )
    console.print(table)


def _octets(value: int | None) -> str:
    return wording.size(value) if value is not None else ""


def _how_to_measure(what: str, command: str, run: RunRecord) -> str:
    if command in run.outdated:
        return f"{what}: measured on an earlier student; run flcompress {command} {escape(str(run.path))} again"
    return f"{what}: not measured; run flcompress {command} {escape(str(run.path))}"


def _quality(quality: Quality, console: Console) -> None:
    # A few columns fit a terminal; the page has them all.
    shown = [index for index, metric in enumerate(quality.metrics) if metric.shown]
    title = "Quality" if quality.benchmark == "moving-digits" else f"Quality by {quality.benchmark}"
    table = _table(
        f"{title}, with 95 % confidence intervals", "model", *(">" + quality.metrics[n].label for n in shown)
    )
    for contender in quality.contenders:
        table.add_row(escape(contender.label), *(_cell(contender.cells[n]) for n in shown))
    if any(cell.value is not None for cell in quality.floor):
        table.add_row("real against real (floor)", *(_cell(quality.floor[n]) for n in shown))
    console.print(table)
    console.print("* best mean   ~ paired difference from the best may be 0: not known to be worse\n", highlight=False)
    if quality.seconds:
        parts = ", ".join(f"{part} {wording.duration(value)}" for part, value in quality.seconds.items())
        console.print(f"Time over all clips and processes: {parts}\n", highlight=False)
    for warning in quality.warnings:
        console.print(warning, end="\n\n", markup=False, highlight=False)
    if quality.comparisons:
        table = _table(
            "Student minus other, paired by seed, with 95 % confidence intervals",
            "against",
            "metric",
            ">difference",
            "verdict",
        )
        for comparison in quality.comparisons:
            table.add_row(
                escape(comparison.other), comparison.metric, wording.around(comparison.difference), comparison.verdict
            )
        console.print(table)


def _cell(cell: Cell) -> str:
    return f"{wording.around(cell.value)} {MARKS[cell.mark]:1}" if cell.value is not None else ""


def _print_removed(fates: Blocks, console: Console) -> None:
    if not fates.gone:
        console.print("removed: nothing\n", highlight=False)
        return
    done = fates.gone[0].fate == "removed"
    table = _table(
        "Removed blocks" if done else "Blocks chosen for removal", "block", ">parameters", ">importance", "why"
    )
    for fate in fates.gone:
        score = f"{wording.number(fate.score.mean)} ± {wording.number(fate.score.standard_error)}" if fate.score else ""
        table.add_row(escape(fate.block.path), wording.share(fate.share), score, escape(fate.reason))
    console.print(table)
    if fates.certainty is not None:
        sure = wording.share(fates.certainty.sureness)
        console.print(
            f"How sure the set is: {sure} of resamplings of the draws choose the same blocks", highlight=False
        )


def _trainings(trainings: list[Training], console: Console) -> None:
    watched = [training for training in trainings if training.figures or training.status != "done"]
    if not watched:
        return
    table = _table("Trainings", "pass", "status", ">step", "held-out figure", ">start", ">best", ">latest")
    for training in watched:
        step = f"{training.step} of {training.steps}" if training.steps else str(training.step)
        row = [escape(training.entry.name), training.status, step]
        for figure in [figure for figure in training.figures if figure.decides]:
            best = f"{wording.number(figure.best)} at {training.best_step}" if figure.best is not None else ""
            latest = wording.number(figure.latest) + wording.in_brackets(figure.redraw_range)
            row += [escape(figure.name), wording.number(figure.first), best, latest]
        table.add_row(*row)
    console.print(table)
    for training in watched:
        for breach in training.breaches:
            value = wording.number(breach.value) if breach.value is not None else "not finite"
            value += wording.in_brackets(breach.redraw_range)
            console.print(
                f"{breach.action}: {training.entry.name}: step {breach.step}: {breach.figure} {value}, expected "
                f"{wording.bounds(breach.bounds)}",
                markup=False,
                highlight=False,
            )
    if any(training.breaches for training in watched):
        console.print()


def _plan(passes: list[Step], console: Console) -> None:
    rows = [step for step in passes if step.planned is not None]
    if not rows:
        return
    memory, *others = AGAINST_PLAN
    table = _table("Planned and measured", "pass", memory, *(f">{name}" for name in others))
    for step in rows:
        table.add_row(escape(step.name), *step.against_plan())
    console.print(table)
    console.print(f"{AGAINST_PLAN_NOTE}\n", highlight=False)


def _exports(exports: list[Export], console: Console) -> None:
    if not exports:
        console.print("exports: none\n", highlight=False)
        return
    table = _table("Exports", "export", ">size", "parity")
    for export in exports:
        parity = [f"{key} {value}" for key, value in export.summary.items() if any(w in key for w in PARITY_WORDS)]
        table.add_row(
            escape(export.name),
            wording.size(export.octets) if export.octets is not None else "missing",
            escape("; ".join(parity)),
        )
    console.print(table)
