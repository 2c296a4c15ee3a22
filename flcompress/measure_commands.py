"""`flcompress eval` and `flcompress bench`: the command lines that measure a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from flcompress import commands
from flcompress.backend_flags import BackendCommand, BackendName
from flcompress.command_group import as_json, display, moved_model, print_json, quiet

_FOLDER = click.Path(path_type=Path)
_OWN = ("sample", "vbench_python", "vbench_repo", "features")
"""Options that only the suites read which name them."""


@click.command("eval", cls=BackendCommand)
@click.argument("run", type=_FOLDER)
@click.option(
    "--suite", metavar="NAME", help="moving-digits, proxies, vbench-i2v or fvd.  [default: the one that fits the run]"
)
@click.option("--clips-per-prompt", type=click.IntRange(min=1), help="Per prompt and seed.  [default: the recipe's]")
@click.option("--seeds", type=click.IntRange(min=2), help="Repetitions, for intervals.  [default: the recipe's]")
@click.option("--prompts", type=_FOLDER, help="Text file, one prompt a line.  [default: the data's held-out prompts]")
@click.option("--images", type=_FOLDER, help="Folder of first frames, for image-to-video models.")
@click.option("--against", multiple=True, type=_FOLDER, help="A run, a pipeline folder or a YAML file; repeatable.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=BackendName(),
    help="Judge the student behind this too, beside torch eager; repeatable.",
)
@click.option(
    "--guidance",
    "guidances",
    multiple=True,
    type=(float, float),
    metavar="B1 B2",
    help="Judge the teacher at text guidance B1, with B2 away from its pruned self, too; repeatable.",
)
@click.option(
    "--stages/--no-stages",
    default=None,
    help="Judge the pruned model without training and Stage II's, too.  [default: the recipe's]",
)
@click.option(
    "--frame-local",
    type=float,
    metavar="SHARE",
    help="Judge the run's result with this share of it attending within latent frames, too, by temporal-attention.",
)
@click.option("--sample", type=click.IntRange(min=1), help="This many of vbench-i2v's own prompts.  [default: all]")
@click.option("--vbench-python", type=_FOLDER, help="For vbench-i2v: the Python of VBench's environment.")
@click.option("--vbench-repo", type=_FOLDER, help="For vbench-i2v: a checkout of VBench, or of FastVideo.")
@click.option(
    "--features", type=_FOLDER, help="For fvd: a feature network, .onnx or TorchScript (a program: it is run)."
)
@click.option("--dry-run", is_flag=True, help="Count network calls and hours; sample nothing.")
@moved_model
@as_json
@quiet
def eval_command(run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare teacher, stages and student of RUN on held-out prompts. Writes RUN/eval.

    Interrupted, the same command resumes. Started by torchrun, the processes share the clips. See docs/evaluation.md.
    """
    own = {name: value for name in _OWN if (value := options.pop(name)) is not None}
    results = commands.evaluate(run, **options, own=own, display=display(quiet))
    if options["dry_run"] and not as_json:
        click.echo(results["text"])
    elif os.environ.get("RANK", "0") == "0":
        _print(results, as_json, run, "eval")


@click.command("bench", cls=BackendCommand)
@click.argument("run", type=_FOLDER)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Interleaved repetitions.")
@click.option(
    "--size", metavar="FRAMESxHEIGHTxWIDTH", help="Clip size in pixels, such as 81x480x832.  [default: the run's own]"
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Clips generated at once.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=BackendName(),
    help="Time this in addition to torch eager; repeatable.  [default: all that can run]",
)
@moved_model
@as_json
@quiet
def bench_command(
    run: Path,
    rounds: int,
    size: str | None,
    batch: int,
    backends: Sequence[str],
    options: dict[str, Any],
    model: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time teacher and student of RUN side by side. Writes RUN/bench.

    On the GPU if there is one, at the run's own size, in the precision that generate uses.
    """
    results = commands.bench(
        run,
        rounds=rounds,
        size=size,
        batch=batch,
        backends=backends or None,
        options=options,
        model=model,
        display=display(quiet),
    )
    _print(results, as_json, run, "bench")


def _print(results: dict[str, Any], as_json: bool, run: Path, command: Literal["eval", "bench"]) -> None:
    """Print what was measured: as JSON, or as tables."""
    if as_json:
        print_json(results)
        return
    from rich.console import Console

    from flcompress.reporting.terminal import print_measured

    print_measured(run, Console(), command)
