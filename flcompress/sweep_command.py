"""`flcompress sweep`: the command line of a grid or a list of recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from flcompress import commands
from flcompress.command_group import Command, as_json, display, print_json, quiet

_FOLDER = click.Path(path_type=Path)


@click.command("sweep", cls=Command)
@click.argument("source", metavar="SWEEP", type=_FOLDER)
@click.option("--out", type=_FOLDER, help="Folder to write to.  [default: runs/sweeps/<name>]")
@click.option(
    "--axis", "axes", multiple=True, metavar="KEY=V,V", help="Axis, such as passes.dmd.student_steps=1,2; repeatable."
)
@click.option("--seeds", type=int, help="Training seeds of every cell.  [default: the sweep's, or 3]")
@click.option("--processes", type=click.IntRange(min=1), help="Cells at a time.  [default: one for each GPU, or one]")
@click.option("--yes", is_flag=True, help="Carry out more than 1,000 cells.")
@as_json
@quiet
def sweep_command(
    source: Path,
    out: Path | None,
    axes: Sequence[str],
    seeds: int | None,
    processes: int | None,
    yes: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a grid or a list of recipes and compare the students.

    SWEEP is a sweep file, or a recipe with --axis or --seeds. Finished cells are not repeated, and passes that cells
    share run once. Writes results.json and report.html. See docs/sweeps.md.
    """
    results = commands.sweep(source, out, axes=axes, seeds=seeds, processes=processes, many=yes, display=display(quiet))
    if as_json:
        print_json(results.dump())
        return
    from flcompress.reporting.sweep_page import sweep_table

    click.echo("\n".join(sweep_table(results)))
