"""The pass manager: checks a whole recipe, then runs what is not stored yet, verifies it, and stores it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flcompress.core.attempts import ATTEMPTS_FILE, PEAKS, describe, seconds_so_far
from flcompress.core.program import FEW_STEP_START, Program
from flcompress.core.registry import find_exporter
from flcompress.core.steps import Pass, PassContext
from flcompress.core.wandb_access import check_wandb_installed, check_wandb_login
from flcompress.distributed.launch import Launch, join, repeatable, use_free_cores
from flcompress.distributed.world import World
from flcompress.driver import start
from flcompress.driver.clips import Clips, fingerprint
from flcompress.driver.data_checks import check_data
from flcompress.driver.exporting import run_exports
from flcompress.driver.figures import Planner, plan_run, showing_speed, speed_of
from flcompress.driver.launch_check import check_attention, check_launch, check_sequence
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.store import Entry, Store
from flcompress.errors import FlcompressError, PostconditionError
from flcompress.files import Lock, key_of, locked, working_alone
from flcompress.frontend.loading import load_recipe
from flcompress.frontend.recipe import Recipe, arguments
from flcompress.progress import Display, QuietDisplay, default_display
from flcompress.system_errors import system_errors_in_one_line


def apply(
    recipe: Recipe | Path | str,
    run_dir: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    store: Path | str | None = None,
    display: Display | None = None,
    device: str | None = None,
    planner: Planner | None = None,
) -> RunDirectory:
    """Carry out a recipe; stored results of an earlier call are reused, and a killed call is resumed.

    `flcompress.planning.plan.plan_recipe` checks and plans the same recipe without writing anything.

    Args:
        recipe: a recipe, or the path of a recipe file.
        run_dir: where to write; default: `runs/<recipe name>`.
        overrides: "key.path=value" each, for a recipe given by path.
        store: a folder in which several runs share pass results and encoded clips; default: the run's own.
        display: where progress is shown; default: bars on a terminal, else lines.
        device: "cpu" or "cuda"; default: cuda if there is one.
        planner: plans the passes that will run, for the journal; default: no plan.

    Returns:
        The run directory.

    Raises:
        RequestError: anything wrong with the request; nothing was written.
        FlcompressError: the work failed; what was done before is kept.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    display = display or default_display()
    run = RunDirectory(run_dir or default_run_dir(recipe))
    device = device or _device()
    source = check(recipe, run)
    shared = Path(store).resolve() if store else run.path
    launch = Launch.from_environment()
    training = recipe.training
    check_launch(training, launch, recipe.passes)
    check_attention(training, source.index["_class_name"], source.transformer, device)
    with (
        repeatable(enabled=training.deterministic),
        join(
            training.engine,
            training.timeout,
            device,
            launch,
            sequence_parallel=training.sequence_parallel,
            shard_size=training.shard_size,
        ) as world,
        world.propagating_failures(),
        system_errors_in_one_line(run.path),
    ):
        if world.main:
            if "wandb" in recipe.training.log_to:
                check_wandb_login()
            with _lock_run(run, display):
                _apply(recipe, source, run, shared, display, device, world, planner)
        else:
            _follow(recipe, shared, device, world)
    return run


@contextmanager
def _lock_run(run: RunDirectory, display: Display) -> Iterator[None]:
    """Lock the run directory; RequestError if another command works in it."""
    run.path.mkdir(parents=True, exist_ok=True)
    busy = f"{run.path}: another flcompress is working in this run directory; wait for it or choose another --run-dir"
    with working_alone(run.path, busy, display.line):
        yield


def default_run_dir(recipe: Recipe) -> Path:
    """Return `runs/<recipe name>`, in the working directory."""
    return Path("runs") / recipe.name


def export(
    run: RunDirectory, names: Sequence[str] = (), *, force: bool = False, display: Display | None = None
) -> dict[str, dict[str, Any]]:
    """Write exports of a finished run: those of its recipe, or the named ones (with the recipe's arguments, if any).

    Returns:
        name -> what RUN/exports/<name>.json holds, and its status, "ran" or "cached".
    """
    program = run.final()
    ours = {exporter.name: exporter for exporter in run.recipe().exports}
    chosen = [ours.get(name) or find_exporter(name)() for name in names] or list(ours.values())
    for exporter in chosen:
        exporter.check()
    program.check()
    display = display or default_display()
    busy = f"{run.path}: another flcompress is working in this run directory; wait for it"
    with working_alone(run.path, busy, display.line):
        return run_exports(run, program, chosen, display, force=force)


def check(recipe: Recipe, run: RunDirectory, *, plan: bool = False) -> start.Source:
    """Check everything that can be checked before any work, and return the model that the recipe starts from.

    Args:
        recipe: the recipe.
        run: the run directory that it would be applied in.
        plan: whether the recipe is only planned. Its model folder may then hold configurations alone, in which case
            neither the data nor the exporters' libraries have to be available yet.

    Raises:
        RequestError: anything wrong with the request; nothing was written.
    """
    from flcompress.models.folder import check_pipeline, only_configurations

    trained = recipe.model.weights == "trained"
    bare = plan and trained and only_configurations(recipe.model_folder())
    run.check_recipe(recipe)
    for step in recipe.passes:
        step.check(recipe.training)
    for exporter in () if bare else recipe.exports:
        exporter.check()
    if not bare and "wandb" in recipe.training.log_to:
        check_wandb_installed()
    check_pipeline(recipe.model_folder(), weights=trained and not bare, parts=not bare)
    source = start.read_source(recipe)
    start.check_sampling(recipe, source)
    check_sequence(recipe.training, recipe.passes, source.transformer, source.latents[1:])
    if not bare:
        check_data(recipe, source.index)
    return source


def pass_key(step: Pass, program: Program, recipe: Recipe) -> str:
    """Return the cache key of one pass's result."""
    return key_of(
        program=program.digest,
        name=step.name,
        version=step.version,
        arguments=arguments(step),
        data=fingerprint(recipe.data_spec()),
        seed=recipe.seed,
        training=recipe.training.decisive,
    )


def _apply(
    recipe: Recipe,
    source: start.Source,
    run: RunDirectory,
    shared: Path,
    display: Display,
    device: str,
    world: World,
    planner: Planner | None,
) -> None:
    threads = use_free_cores(run.threads)
    run.begin(recipe)
    run.note("start", recipe.name, threads=threads)
    store = Store(shared / "passes")
    clips = Clips(recipe, shared / "data", display, device)
    current, plan = recipe.name, None
    try:
        entry, fresh = _entry_of_start(recipe, source, store)
        beginning = program = entry.program()
        entries, ran = [entry], int(fresh)
        run.record_entries(entries, finished=not recipe.passes)
        for index, step in enumerate(recipe.passes, start=1):
            current = step.name
            title = f"{index}/{len(recipe.passes)} {step.name}"
            key = pass_key(step, program, recipe)
            stored, planned = store.find(index, step.name, key), None
            if stored is None:
                world.main_only(title)
                world.longest = (0.0, "")
                plan = plan or plan_run(planner, recipe, device, world.size, display.line)
                planned = plan[index - 1]
                display.line(f"{title}: running")
                building = os.path.relpath(store.work_folder(index, step.name, key), run.path)
                noted = {"planned": planned} if planned else {}
                run.note("begin", step.name, key=key, folder=building, arguments=arguments(step), **noted)
                with display.stage(title) as progress:
                    sink = showing_speed(progress, step, planned, lambda: clips.one_size)
                    shown = {"progress": sink, "say": display.line, "note": run.note}
                    work = _work(recipe, step, clips, device, world, **shown)
                    build = _builder(step, program, entry.folder, work, index, key, clips, world)
                    entry = store.make(index, step.name, key, arguments(step), build)
                display.line(f"{title}: {describe(entry.record.dump())}")
                ran += 1
            else:
                entry = stored
                display.line(f"{title}: unchanged")
            program = _with_moved_parts(entry, beginning)
            entries.append(entry)
            run.record_entries(entries, finished=index == len(recipe.passes))
            kept = ("seconds", *PEAKS, "attempts")
            measured = {name: value for name, value in entry.record.dump().items() if name in kept}
            if stored is None:
                measured |= speed_of(step, planned, entry.folder, entry.record.seconds, one_size=clips.one_size)
            if stored is None and world.longest[0] > 0.0:
                measured["longest_beat"] = dict(zip(("seconds", "at"), world.longest, strict=True))
            run.note("pass", step.name, status="cached" if stored else "ran", key=key, **measured)
        current = "exports"
        world.broadcast(lambda: None)  # no more passes to share
        exports = run_exports(run, program, recipe.exports, display)
    except FlcompressError as error:
        run.note("failed", current, status="failed", error=str(error))
        raise
    ran += sum(record["status"] == "ran" for record in exports.values())
    run.note("done", recipe.name, status="ran" if ran else "cached")
    _remove_leftovers(run.path / "passes")
    display.line(f"done: {run.path}" if ran else f"nothing to do: every pass and export is unchanged in {run.path}")


def _entry_of_start(recipe: Recipe, source: start.Source, store: Store) -> tuple[Entry, bool]:
    key = start.start_key(recipe)
    origin = start.model_arguments(recipe)
    stored = store.find(0, "model", key)
    if stored is None:
        return store.make(0, "model", key, origin, lambda folder: start.starting_program(recipe, source, folder)), True
    if recipe.model.weights == "trained":
        # The same model may have moved since; every later program is pointed to where it is now.
        program, here = stored.program(), start.components_of(recipe, source.index, source.folder)
        if program.components != here:
            replace(program, components=here).save(stored.folder)
    return stored, False


def _with_moved_parts(entry: Entry, beginning: Program) -> Program:
    """Return the entry's program; parts that it shares with the starting model are taken from where that is now."""
    program = entry.program()
    theirs = {FEW_STEP_START: beginning.components["transformer"], **beginning.components}
    here = {name: path if path.is_dir() else theirs[name] for name, path in program.components.items()}
    if here != dict(program.components):
        program = replace(program, components=here)
        program.save(entry.folder)
    return program


def _work(recipe: Recipe, step: Pass, clips: Clips, device: str, world: World, **shown: Any) -> PassContext:
    return PassContext(
        directory=Path(),
        seed=recipe.seed,
        data=clips,
        device=device,
        precision=recipe.training.precision,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        compile=recipe.training.compile,
        attention=recipe.training.attention,
        offload=recipe.training.offload,
        health=recipe.training.health,
        log_to=recipe.training.log_to,
        checkpoint_seconds=recipe.training.checkpoint_seconds,
        background_checkpoints=recipe.training.background_checkpoints,
        micro_batch=recipe.training.micro_batch,
        world=world if step.distributed else World(),
        engine=recipe.training.engine if step.distributed else "local",
        **shown,
    )


def _follow(recipe: Recipe, shared: Path, device: str, world: World) -> None:
    """Encode and apply the passes that the main process calls for, as every other process does, each with its share."""
    clips = Clips(recipe, shared / "data", QuietDisplay(), device)
    while (call := world.broadcast(dict)) is not None:
        program = Program.load(Path(call["program"]))
        if call["index"] is None:
            clips.encode(program, world)
            continue
        step = recipe.passes[call["index"] - 1]
        work = _work(recipe, step, clips, device, world, progress=lambda done, total, values: None)
        step(program, replace(work, directory=Path(call["directory"])))


def _builder(
    step: Pass,
    program: Program,
    stored: Path,
    work: PassContext,
    index: int,
    key: str,
    clips: Clips,
    world: World,
) -> Callable[[Path], Program]:
    """Return a function that applies one pass in the folder of the store, and verifies the result.

    Args:
        step: the pass.
        program: the program that it is applied to.
        stored: folder of that program, for the other processes.
        work: the pass's context, but for the folder.
        index: the pass's position in the recipe, from 1.
        key: cache key of the result.
        clips: the recipe's clips.
        world: all processes, which encode together also for a pass that one of them applies.
    """

    def build(folder: Path) -> Program:
        if step.needs_data:
            # Encoding needs the whole GPU, so it comes before the pass loads a model. The main process alone looks what
            # there is, so that all agree. All else may take long, too: the other processes wait without a timeout.
            if clips.to_encode(program):
                world.broadcast(lambda: {"index": None, "program": str(stored)})
                clips.encode(program, world)
            work.data(program)
        before = seconds_so_far(folder / ATTEMPTS_FILE, key)
        if step.distributed:
            call = {"index": index, "program": str(stored), "directory": str(folder)}
            work.world.broadcast(lambda: call)
        result = step(program, replace(work, directory=folder, earlier_seconds=before))
        work.world.main_only(f"end of {step.name}")
        verify(step.name, result)
        return result

    return build


def verify(name: str, program: Program) -> None:
    """Check what must hold for every program in addition to its graph's own rules.

    Raises:
        PostconditionError: names the pass and what is wrong with its result.
    """
    for component, folder in program.components.items():
        if not folder.is_dir() or not any(folder.iterdir()):
            raise PostconditionError(f"{name}: component {component} should be in {folder}, but nothing is there")
    blocks = {block.path for block in program.graph.blocks}
    if set(program.kept) != blocks:
        odd = sorted(blocks ^ set(program.kept))
        raise PostconditionError(f"{name}: the kept-block map and the graph disagree on {odd[0]}; expected every block")


def _remove_leftovers(passes: Path) -> None:
    """Remove work folders of earlier versions of the recipe, except those that another process may work in."""
    for folder in passes.glob(".work-*"):
        with locked(folder, wait=False) as lock:
            if lock is Lock.HELD:
                shutil.rmtree(folder)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    # If DeepSpeed is installed, diffusers imports it, and it warns on every machine without a GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "cpu"
