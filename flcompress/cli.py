"""The command line. Thin: every command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from flcompress import __version__, commands
from flcompress.backend_flags import BackendCommand, BackendName
from flcompress.command_group import Commands, as_json, moved_model, print_json, quiet
from flcompress.command_group import display as _display
from flcompress.errors import RequestError
from flcompress.measure_commands import bench_command, eval_command
from flcompress.sweep_command import sweep_command

_FOLDER = click.Path(path_type=Path)
_GPUS = ("a100", "h100", "h200", "l40s", "rtx4090")  # those of planning/machines.py, which --help does not load


@click.group(cls=Commands)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="flcompress")
def main(debug: bool) -> None:
    """Compress video diffusion transformers: fewer blocks, fewer steps, one recipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a sign gets its number, not a traceback
            stream.reconfigure(errors="backslashreplace")
    # The libraries below draw progress bars of their own when they load a model.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torch.distributed warns about every wait.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Where torchao is installed, the libraries below import it and log which of its parts this machine cannot use.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)


@main.command("apply")
@click.argument("recipe", type=_FOLDER)
@click.option("--run-dir", type=_FOLDER, help="Where to write.  [default: runs/<recipe name>]")
@click.option("--store", type=_FOLDER, help="Folder in which several runs share pass results and encoded clips.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
@click.option("--gpu", type=click.Choice(_GPUS), help="GPU model to plan for.  [default: this machine, measured]")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, such as passes.dmd.steps=10; repeatable."
)
@as_json
@quiet
def apply_command(
    recipe: Path,
    run_dir: Path | None,
    store: Path | None,
    dry_run: bool,
    gpu: str | None,
    overrides: Sequence[str],
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry out RECIPE. Finished work is not repeated; an interrupted run resumes."""
    from flcompress.frontend.loading import load_recipe

    loaded = load_recipe(recipe, overrides)
    if gpu and not dry_run:
        raise RequestError(f"--gpu: {gpu} given without --dry-run; it says what a plan is made for")
    if dry_run:
        plan = commands.plan(loaded, run_dir, gpu=gpu)

        from flcompress.planning.text import plan_text

        click.echo(json.dumps(plan.to_dict(), indent=1) if as_json else plan_text(plan))
        return
    run = commands.apply(loaded, run_dir, store=store, display=_display(quiet))
    if as_json and os.environ.get("RANK", "0") == "0":
        passes = [{**entry.record.dump(), "folder": str(entry.folder)} for entry in run.entries()]
        print_json({"run": str(run.path), "passes": passes, "exports": [export.name for export in loaded.exports]})


@main.command("plan")
@click.argument("recipe", type=_FOLDER)
@click.option("--gpus", type=int, help="Number of GPUs.  [default: training.processes of the recipe, or 1]")
@click.option("--memory", metavar="SIZE", help="Memory per GPU, e.g. 80G or 48GiB.  [default: that of --gpu]")
@click.option("--gpu", type=click.Choice(_GPUS), default="h100", show_default=True, help="GPU model to plan for.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, such as passes.dmd.batch=16; repeatable."
)
@as_json
def plan_command(
    recipe: Path, gpus: int | None, memory: str | None, gpu: str, overrides: Sequence[str], as_json: bool
) -> None:
    """Report what RECIPE takes on GPUs, and what would make it fit."""
    plan = commands.plan(recipe, overrides=overrides, gpu=gpu, gpus=gpus, memory=memory)
    if as_json:
        print_json(plan.to_dict())
    else:
        from flcompress.planning.text import plan_text

        click.echo(plan_text(plan, settings=True))


@main.command("inspect")
@click.argument("model")
@click.option("--height", type=click.IntRange(min=1), help="Clip height in pixels.  [default: the family's usual]")
@click.option("--width", type=click.IntRange(min=1), help="Clip width in pixels.")
@click.option("--frames", type=click.IntRange(min=1), help="Number of frames.")
@click.option("--tokens", type=click.IntRange(min=1), help="Length of the prompt in tokens.")
@click.option("--out", type=_FOLDER, help="Draw the block graph to this file (.svg, .png or .pdf).")
@as_json
def inspect_command(
    model: str,
    height: int | None,
    width: int | None,
    frames: int | None,
    tokens: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Show the blocks of MODEL. A model folder, a config.json, or a Hub id; its configuration is enough."""
    from flcompress.inspection.text import inspection_text

    if out is not None:
        from flcompress.inspection.drawing import check_picture

        check_picture(out)
    inspection = commands.inspect(model, height=height, width=width, frames=frames, tokens=tokens)
    if as_json:
        print_json(inspection.to_dict())
    else:
        click.echo(inspection_text(inspection))
    if out is not None:
        from flcompress.inspection.drawing import draw_inspection

        draw_inspection(inspection, out)
        click.echo(str(out), err=as_json)


@main.command("remap-lora")
@click.argument("lora", type=_FOLDER)
@click.argument("pruned", type=_FOLDER)
@click.option("--out", type=_FOLDER, required=True, help="File to write; for a folder, the new folder.")
@moved_model
@as_json
def remap_lora_command(lora: Path, pruned: Path, out: Path, model: Path | None, as_json: bool) -> None:
    """Fit a LORA of the teacher to the PRUNED model.

    LORA is a safetensors file, or a folder as PEFT saves it; PRUNED a run, an exported folder, or its kept_blocks.json.
    """
    from flcompress.loras.remap import remapping_text

    done = commands.remap_lora(lora, pruned, out, model=model)
    if as_json:
        print_json(done)
    else:
        click.echo(remapping_text(done))


@main.command("encode")
@click.option("--pipeline", type=_FOLDER, required=True, help="Diffusers pipeline folder that encodes.")
@click.option("--pipeline-class", metavar="NAME", help="Stock class to use it with, as model.pipeline of a recipe.")
@click.option("--videos", type=_FOLDER, help="Folder of videos.  [default: none, a dataset of prompts only]")
@click.option("--captions", type=_FOLDER, required=True, help=".jsonl or .csv with file and caption; prompts: .txt.")
@click.option("--out", type=_FOLDER, required=True, help="Folder of the dataset.")
@click.option("--frames", type=click.IntRange(min=1), help="Trim longer clips.  [default: each clip's own]")
@click.option("--fps", type=click.FloatRange(min=0, min_open=True),
              help="Frames per second to take.  [default: every frame of a video]")  # fmt: skip
@click.option("--height", type=click.IntRange(min=1), help="Resize and crop, with --width.  [default: own, cropped]")
@click.option("--width", type=click.IntRange(min=1), help="See --height.")
@click.option("--max-sequence-length", type=click.IntRange(min=1), default=512, show_default=True,
              help="Tokens that a prompt is padded to, as in the recipe's sampling.")  # fmt: skip
@click.option("--negative-prompt", default="", help="What guidance leads away from, as in the recipe's sampling.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes; one per GPU.")
@as_json
@quiet
def encode_command(
    pipeline: Path,
    pipeline_class: str | None,
    videos: Path | None,
    captions: Path,
    out: Path,
    frames: int | None,
    fps: float | None,
    height: int | None,
    width: int | None,
    max_sequence_length: int,
    negative_prompt: str,
    workers: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Encode videos and captions, or prompts, into a dataset.

    A recipe reads it with `data: {latents: OUT}`. An interrupted command resumes. Started by torchrun, the processes
    share the videos. See docs/data.md.
    """
    from flcompress.data.encoding import summary_text

    summary = commands.encode(
        pipeline,
        captions,
        out,
        videos=videos,
        pipeline_class=pipeline_class,
        frames=frames,
        height=height,
        width=width,
        fps=fps,
        max_sequence_length=max_sequence_length,
        negative_prompt=negative_prompt,
        workers=workers,
        display=_display(quiet),
    )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(summary)
    else:
        click.echo(summary_text(summary))


@main.command("report")
@click.argument("run", type=_FOLDER)
@click.option("--blind", is_flag=True, help="Write RUN/blind.html instead: clips without names, to vote on.")
@click.option("--votes", type=_FOLDER, help="Print what the votes that RUN/blind.html exported say; write nothing.")
def report_command(run: Path, blind: bool, votes: Path | None) -> None:
    """Print a summary of RUN and write RUN/report.html."""
    if blind and votes is not None:
        raise RequestError(f"--votes: {votes} given with --blind; make the page, vote, then give --votes alone")
    if blind or votes is not None:
        from flcompress.reporting.blind import read_preference, write_blind

        click.echo(str(write_blind(run)) if votes is None else read_preference(run, votes).text)
        return
    from rich.console import Console

    from flcompress.reporting.terminal import print_summary

    written = commands.report(run)
    print_summary(run, Console())
    click.echo(str(written))


@main.command("export")
@click.argument("run", type=_FOLDER)
@click.option("--format", "formats", multiple=True, metavar="NAME", help="diffusers, onnx or tensorrt; repeatable.")
@click.option("--force", is_flag=True, help="Rewrite unchanged exports too.")
@moved_model
@as_json
@quiet
def export_command(
    run: Path, formats: Sequence[str], force: bool, model: Path | None, as_json: bool, quiet: bool
) -> None:
    """Write the exports of the finished RUN. Those of its recipe, or the given formats."""
    records = commands.export(run, formats, force=force, model=model, display=_display(quiet))
    if as_json:
        print_json(records)


@main.command("generate", cls=BackendCommand)
@click.argument("run", type=_FOLDER)
@click.option("--prompt", help="What the clip shows.")
@click.option("--prompts", type=_FOLDER, help="Instead: a .txt file, one prompt a line, for a folder of clips.")
@click.option("--backend", type=BackendName(), default="torch", show_default=True, help="Runs the denoiser.")
@click.option(
    "--out",
    type=_FOLDER,
    callback=lambda context, option, out: out or Path("clips" if context.params.get("prompts") else "clip.gif"),
    help=".gif, .mp4 or .png (frames in a row); of --prompts a folder.  [default: clip.gif, or clips]",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of all noise; the same seed gives the same clip."
)
@click.option("--image", type=_FOLDER, help="First frame, for image-to-video models.")
@click.option(
    "--fps",
    type=click.FloatRange(min=0, min_open=True, max=1000),
    help="Frames per second of the file.  [default: those of the run's data, or of the model's family]",
)
@click.option("--negative-prompt", help="What guidance leads away from.  [default: the recipe's]")
@click.option(
    "--frame-local",
    type=float,
    metavar="SHARE",
    help="Let this share of the model attend within latent frames, by the run's temporal-attention; torch only.",
)
@quiet
def generate_command(
    run: Path,
    prompt: str | None,
    prompts: Path | None,
    backend: str,
    options: dict[str, Any],
    out: Path,
    seed: int,
    image: Path | None,
    fps: float | None,
    negative_prompt: str | None,
    frame_local: float | None,
    quiet: bool,
) -> None:
    """Generate clips with the exported student of RUN.

    With --prompts, the processes that torchrun started share the prompts, and an interrupted command resumes.
    """
    written = commands.generate(
        run,
        prompt,
        prompts=prompts,
        backend=backend,
        options=options,
        out=out,
        seed=seed,
        image=image,
        fps=fps,
        negative_prompt=negative_prompt,
        frame_local=frame_local,
        display=_display(quiet),
    )
    if os.environ.get("RANK", "0") == "0":
        click.echo(str(written))


@main.command("passes")
@click.argument("name", required=False)
@as_json
def passes_command(name: str | None, as_json: bool) -> None:
    """List passes and exporters, or show the arguments of NAME."""
    from flcompress.core.registry import find_step
    from flcompress.frontend.listing import catalogue, catalogue_text, step_text
    from flcompress.frontend.reference import describe_step

    if name is None:
        listed = catalogue()
        if as_json:
            print_json(listed)
        else:
            click.echo(catalogue_text(listed))
        return
    described = describe_step(find_step(name))
    if as_json:
        print_json(described)
    else:
        click.echo(step_text(described))


for _command in (eval_command, bench_command, sweep_command):
    main.add_command(_command)
