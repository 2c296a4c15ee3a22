"""Every command as a function: the command line parses arguments, calls these and prints what they return.

Every function imports what it needs when it is called, so that `flcompress --help` and `import flcompress` stay light.
A path may be a string or any path-like object; a run may be given as its folder or as a `RunDirectory`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flcompress.core.records import SweepFile
    from flcompress.driver.rundir import RunDirectory
    from flcompress.frontend.recipe import Recipe
    from flcompress.inspection.model import Inspection
    from flcompress.planning.plan import Plan
    from flcompress.progress import Display

StrPath = str | os.PathLike[str]


def plan(
    recipe: Recipe | StrPath,
    run_dir: StrPath | None = None,
    *,
    overrides: Sequence[str] = (),
    gpu: str | None = "h100",
    gpus: int | None = None,
    memory: str | None = None,
) -> Plan:
    """Check a recipe and say what it takes: memory, time and what would make it fit. Writes nothing.

    Args:
        recipe: a recipe, or the path of a recipe file.
        run_dir: the run directory it is meant for; `runs/<recipe name>` by default.
        overrides: "key.path=value" each, for a recipe given by path.
        gpu: GPU model to plan for, one of `flcompress.planning.machines.GPUS`; None plans for this machine.
        gpus: number of GPUs; `training.processes` of the recipe, or 1, by default.
        memory: memory per GPU, such as "80G" or "48GiB"; the GPU model's own by default.

    Raises:
        RequestError: anything wrong with the request.
    """
    from flcompress.frontend.loading import load_recipe
    from flcompress.frontend.recipe import Recipe

    checked = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)

    from flcompress.planning.plan import plan_recipe  # torch, which a faulty recipe does not wait for

    where = Path(run_dir) if run_dir is not None else None
    return plan_recipe(checked, where, gpu=gpu, gpus=gpus, memory=memory)


def inspect(
    model: StrPath,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    tokens: int | None = None,
) -> Inspection:
    """Return the blocks of a model's transformer, what each holds, and what removals would leave.

    Args:
        model: pipeline folder, transformer folder, `config.json`, or Hub id; its configuration is enough.
        height: clip height in pixels; the family's usual one by default, as for the other three.
        width: clip width in pixels.
        frames: number of frames.
        tokens: length of the prompt.

    Raises:
        ModelError: nothing that can be inspected.
        RequestError: a size that the model does not take.
    """
    from flcompress.inspection.model import inspect_model

    return inspect_model(os.fspath(model), height=height, width=width, frames=frames, tokens=tokens)


def encode(
    pipeline: StrPath,
    captions: StrPath,
    out: StrPath,
    *,
    videos: StrPath | None = None,
    pipeline_class: str | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    max_sequence_length: int = 512,
    negative_prompt: str = "",
    workers: int = 1,
    display: Display | None = None,
) -> dict[str, Any]:
    """Encode videos and captions, or prompts, into a dataset; an interrupted call resumes. See docs/data.md.

    Args:
        pipeline: diffusers pipeline folder that encodes.
        captions: `.jsonl` or `.csv` with file and caption; prompts without videos: `.txt`.
        out: folder of the dataset.
        videos: folder of videos; None makes a dataset of prompts only.
        pipeline_class: stock class to use the pipeline with, as `model.pipeline` of a recipe.
        frames: trim longer clips to this many frames; default: each clip's own number.
        height: resize and crop to this height, with `width`; each clip's own by default, cropped.
        width: see `height`.
        fps: frames per second to take; every frame of a video by default.
        max_sequence_length: tokens that a prompt is padded to; the recipe's `sampling` has the same.
        negative_prompt: what guidance leads away from, as in the recipe's `sampling`.
        workers: number of processes; one per GPU.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        A summary of the dataset: clips, prompts, skipped videos, buckets, shards, bytes.

    Raises:
        DataError: captions, videos or sizes that do not fit; a folder that holds something else.
    """
    from flcompress.data import encoding
    from flcompress.data.sizes import Target
    from flcompress.progress import default_display

    request = encoding.folder_request(
        Path(pipeline),
        Path(captions),
        Path(out),
        Path(videos) if videos is not None else None,
        Target(frames, height, width),
        max_sequence_length,
        workers,
        pipeline_class,
        fps,
        negative_prompt,
    )
    return encoding.encode(request, display or default_display())


def export(
    run: StrPath,
    formats: Sequence[str] = (),
    *,
    force: bool = False,
    model: StrPath | None = None,
    display: Display | None = None,
) -> dict[str, dict[str, Any]]:
    """Write the exports of a finished run: those of its recipe, or the named formats.

    Args:
        run: the run directory.
        formats: "diffusers", "onnx", "tensorrt", or the name of another installed exporter.
        force: write again what is unchanged.
        model: the model folder that the run started from, if it has moved.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        Format -> its record, `RUN/exports/<format>.json`, and whether it "ran" or was "cached".

    Raises:
        RequestError: an unfinished run, or a format that this machine cannot write.
        PostconditionError: an export fails its own check.
    """
    from flcompress.driver import manager

    return manager.export(_open_run(run, model), formats, force=force, display=display)


def generate(
    run: StrPath,
    prompt: str,
    *,
    backend: str = "torch",
    options: Mapping[str, Any] | None = None,
    out: StrPath = "clip.gif",
    seed: int = 0,
    image: StrPath | None = None,
    fps: float | None = None,
    negative_prompt: str | None = None,
    display: Display | None = None,
) -> Path:
    """Generate one clip with the exported student of a run.

    Args:
        run: the run directory; its diffusers export holds text encoder and autoencoder.
        prompt: what the clip shows.
        backend: name of what runs the denoiser: "torch", "compile", "onnx", "tensorrt", or of another installed one.
        options: of the backend, by name, such as {"provider": "cuda"}.
        out: `.gif`, `.mp4` or `.png` (frames in a row) to write.
        seed: seed of all noise; the same seed gives the same clip.
        image: first frame, for image-to-video models.
        fps: frames per second of the file; those of the run's data, or of the model's family, by default.
        negative_prompt: what guidance leads away from; the recipe's by default.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        The file that was written.

    Raises:
        UnavailableError: the backend cannot run on this machine.
        RequestError: a missing or damaged export, or another model's; an `out` that cannot be written; no such backend.
    """
    from flcompress.distributed.launch import use_free_cores
    from flcompress.progress import default_display
    from flcompress.runtime.generate import generate

    use_free_cores()
    first = Path(image) if image is not None else None
    with (display or default_display()).stage("generate") as progress:
        return generate(Path(run), prompt, backend, Path(out), seed, first, progress, fps, negative_prompt, options)


def evaluate(
    run: StrPath,
    *,
    suite: str | None = None,
    clips_per_prompt: int | None = None,
    seeds: int | None = None,
    prompts: StrPath | None = None,
    images: StrPath | None = None,
    against: Sequence[StrPath] = (),
    backends: Sequence[str] = (),
    guidances: Sequence[tuple[float, float]] = (),
    options: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    model: StrPath | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Compare teacher, stages and student of a run on held-out prompts, and write `RUN/eval`.

    Args:
        run: the run directory.
        suite: one of `flcompress.core.registry.known_suites`; by default moving-digits for its runs, or proxies.
        clips_per_prompt: clips of each prompt for each seed; the recipe's `evaluation.clips_per_prompt` by default.
        seeds: repetitions; the recipe's `evaluation.seeds` by default.
        prompts: text file of prompts, one a line; the data's held-out ones by default.
        images: folder of first frames, for image-to-video models.
        against: runs, stock pipeline folders, or YAML files that name one, to compare with.
        backends: names of what else runs the student, as for `generate`; each is judged beside torch's.
        guidances: (b1, b2) at which the teacher is judged too, with text guidance b1 and b2 away from its pruned self.
        options: of the backends, by name; each goes to every backend that has it.
        own: options of the suite alone: sample, vbench_python and vbench_repo of vbench-i2v, features of fvd.
        dry_run: count the network calls and the hours, and do nothing.
        model: the model folder that the run started from, if it has moved.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        What the suite's `results.json` below `RUN/eval` holds; of a dry run, the counts.

    Raises:
        RequestError: an unfinished run, another dataset, too few seeds or clips, a backend that is not exported.
        UnavailableError: a backend cannot run on this machine.
    """
    from flcompress.core.registry import find_suite
    from flcompress.core.suites import SuiteRequest
    from flcompress.distributed.launch import use_free_cores
    from flcompress.progress import default_display
    from flcompress.runtime.backends.options import choose_backends

    if suite is None:
        data = _open_run(run, model).recipe().data
        suite = "moving-digits" if data is not None and data.moving_digits is not None else "proxies"
    request = SuiteRequest(
        run=Path(run),
        display=display or default_display(),
        model=Path(model) if model is not None else None,
        clips_per_prompt=clips_per_prompt,
        seeds=seeds,
        prompts=Path(prompts) if prompts is not None else None,
        images=Path(images) if images is not None else None,
        against=tuple(map(Path, against)),
        backends=tuple(choose_backends(backends, options)),
        guidances=tuple(guidances),
        dry_run=dry_run,
        own=own or {},
    )
    use_free_cores()
    return find_suite(suite)().run(request)


def bench(
    run: StrPath,
    *,
    rounds: int = 5,
    size: str | None = None,
    batch: int = 1,
    backends: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    model: StrPath | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Time teacher and student of a run side by side, and write `RUN/bench`.

    Args:
        run: the run directory.
        rounds: interleaved repetitions.
        size: FRAMESxHEIGHTxWIDTH of the clips, in pixels; the run's own by default.
        batch: clips generated at once.
        backends: names of what to time in addition to torch eager, as for `generate`; by default all that can.
        options: of the backends, by name; each goes to every backend that has it.
        model: the model folder that the run started from, if it has moved.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        What `RUN/bench/results.json` holds.

    Raises:
        RequestError: an unfinished run, a size that the model does not take, a backend that cannot run it.
    """
    from flcompress.evaluation import bench as room
    from flcompress.progress import default_display

    pixels = room.read_size(size) if size else None
    with (display or default_display()).stage("bench") as progress:
        opened = _open_run(run, model)
        return room.bench(opened, rounds, progress, backends, size=pixels, batch=batch, options=options)


def sweep(
    source: StrPath,
    out: StrPath | None = None,
    *,
    axes: Sequence[str] = (),
    seeds: int | None = None,
    processes: int | None = None,
    many: bool = False,
    display: Display | None = None,
) -> SweepFile:
    """Train a grid or a list of recipes with several seeds, judge the students alike, and write table and page.

    What is stored in `out` is not done again, and passes that several cells share run once. See docs/sweeps.md.

    Args:
        source: a sweep file, or a recipe.
        out: folder to write to; `runs/sweeps/<name of the file>` by default.
        axes: "KEY=VALUE,VALUE" each, as passes.dmd.student_steps=1,2,4.
        seeds: training seeds of each cell; the sweep's, or 3, by default.
        processes: cells at a time; one for each GPU, or one, by default.
        many: whether more than 1,000 cells are meant.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        What `out/results.json` holds.

    Raises:
        RequestError: a key, a value or a name that is wrong; names the cell, and nothing was written.
        FlcompressError: every cell failed.
    """
    from flcompress.sweeps.request import read_request

    request = read_request(Path(source), axes, seeds, many=many)

    from flcompress.progress import default_display
    from flcompress.sweeps.runner import run_sweep  # torch, which a faulty request does not wait for

    folder = Path(out) if out is not None else Path("runs") / "sweeps" / request.name
    return run_sweep(request, folder, processes, display or default_display())


def report(run: StrPath) -> Path:
    """Write `RUN/report.html`, one file that fetches nothing, and return its path.

    Args:
        run: the run directory, finished or not.

    Raises:
        RequestError: not a run directory, or a damaged one.
    """
    from flcompress.reporting.html import write_report

    return write_report(Path(run))


def remap_lora(lora: StrPath, pruned: StrPath, out: StrPath, *, model: StrPath | None = None) -> dict[str, Any]:
    """Fit a LoRA of the teacher to the pruned model, and write it.

    Args:
        lora: a safetensors file, or a folder as PEFT saves it.
        pruned: a run directory, an exported folder, or its `kept_blocks.json`.
        out: file, or for a folder new folder, to write.
        model: the model folder that a run started from, if it has moved.

    Returns:
        What was done: keys used, modules, blocks renumbered, modules dropped.

    Raises:
        RequestError: not such files, a LoRA for another model, or one for removed blocks alone.
    """
    from flcompress.loras import remap

    return remap.remap_lora(Path(lora), Path(pruned), Path(out), Path(model) if model is not None else None)


def _open_run(run: StrPath, model: StrPath | None) -> RunDirectory:
    from flcompress.driver.rundir import RunDirectory

    return RunDirectory(Path(run), Path(model) if model is not None else None)
