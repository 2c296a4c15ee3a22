"""Commands on recipes, and on the runs that they make."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flcompress.core.records import SweepFile
    from flcompress.driver.rundir import RunDirectory
    from flcompress.frontend.recipe import Recipe
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


def apply(
    recipe: Recipe | StrPath,
    run_dir: StrPath | None = None,
    *,
    overrides: Sequence[str] = (),
    store: StrPath | None = None,
    display: Display | None = None,
    device: str | None = None,
) -> RunDirectory:
    """Carry out a recipe; stored results of an earlier call are reused, and a killed call is resumed.

    What runs is planned first, and the journal keeps the plan, so that `report` shows it next to what was measured.

    Args:
        recipe: a recipe, or the path of a recipe file.
        run_dir: where to write; default: `runs/<recipe name>`.
        overrides: "key.path=value" each, for a recipe given by path.
        store: a folder in which several runs share pass results and encoded clips; default: the run's own.
        display: where progress is shown; bars on a terminal, else lines.
        device: "cpu" or "cuda"; default: cuda if there is one.

    Returns:
        The run directory.

    Raises:
        RequestError: anything wrong with the request; nothing was written.
        FlcompressError: the work failed; what was done before is kept.
    """
    from flcompress.frontend.loading import load_recipe
    from flcompress.frontend.recipe import Recipe

    checked = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)

    from flcompress.driver import manager  # torch, which a faulty recipe does not wait for
    from flcompress.planning.running import running_plan

    where = Path(run_dir) if run_dir is not None else None
    shared = Path(store) if store is not None else None
    return manager.apply(checked, where, store=shared, display=display, device=device, planner=running_plan)


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

    return manager.export(open_run(run, model), formats, force=force, display=display)


def report(run: StrPath) -> Path:
    """Write `RUN/report.html`, one file that fetches nothing, and return its path.

    Args:
        run: the run directory, finished or not.

    Raises:
        RequestError: not a run directory, or a damaged one.
    """
    from flcompress.reporting.html import write_report

    return write_report(Path(run))


def open_run(run: StrPath, model: StrPath | None) -> RunDirectory:
    """Return a run directory; `model` is the model folder that it started from, if that has moved."""
    from flcompress.driver.rundir import RunDirectory

    return RunDirectory(Path(run), Path(model) if model is not None else None)
