"""What commands have in common: their options, and their end in a result or in one line, never in a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flcompress.errors import INTERRUPTED, FlcompressError

if TYPE_CHECKING:
    from flcompress.progress import Display

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
quiet = click.option("--quiet", is_flag=True, help="Show no progress.")
moved_model = click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="The model that the run started from, if it has moved.  [default: where it was]",
)


class Command(click.Command):
    """A command whose every error of the operating system becomes one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of the operating system names the path in one line."""
        from flcompress.system_errors import check_writable, system_errors_in_one_line

        written = next((ctx.params[name] for name in ("out", "run_dir", "run") if ctx.params.get(name)), None)
        new = ctx.params.get("out") or ctx.params.get("run_dir")  # a run that is not there is the command's to name
        with system_errors_in_one_line(written):
            if written is not None and (new or written.exists()) and not ctx.params.get("dry_run"):
                check_writable(written)  # before hours of work
            return super().invoke(ctx)


class Commands(click.Group):
    """Ends a failed command with one line and the error's exit status instead of a traceback."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command and turn its error into one line and an exit status."""
        try:
            return super().invoke(ctx)
        except FlcompressError as error:
            if ctx.params.get("debug"):
                raise
            if not (error.reported if error.reported is not None else _not_first()):
                click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_status)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command resumes from here", err=True)
            ctx.exit(INTERRUPTED)


def display(quiet: bool) -> Display:
    """Return where a command shows its progress."""
    from flcompress.progress import QuietDisplay, default_display

    return QuietDisplay() if quiet else default_display()


def print_json(plain: Any) -> None:
    """Print plain data on standard output."""
    click.echo(json.dumps(plain, indent=1))


def _not_first() -> bool:
    """Return whether a launcher started this process next to others on the same machine, the first of which prints."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" in os.environ and "WORLD_SIZE" in os.environ
