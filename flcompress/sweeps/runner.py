"""Carry out a sweep: a process for each task, several at a time, and what is stored is not done again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from flcompress.core.records import BenchFile, CellResult, SweepFile, TeacherResult
from flcompress.distributed.launch import free_cores
from flcompress.driver import manager
from flcompress.driver.clips import fingerprint
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import FlcompressError, RequestError
from flcompress.evaluation.sampling import VERSION as JUDGED_VERSION
from flcompress.files import key_of, working_alone, write_text
from flcompress.frontend.loading import dump_recipe
from flcompress.frontend.recipe import Recipe, arguments
from flcompress.models.stock_files import folder_digest
from flcompress.progress import Display
from flcompress.reporting.sweep_page import write_sweep_page
from flcompress.sweeps.request import Cell, Request
from flcompress.sweeps.results import Outcome, summary
from flcompress.sweeps.worker import Task

VERSION = 1
"""Raise it when the same recipe is judged or counted in another way: it is part of the key of every result."""

POLL_SECONDS = 0.2


def check(request: Request) -> None:
    """Check every cell as `flcompress apply` checks a recipe, before any work.

    Raises:
        RequestError: names the first cell that cannot be carried out.
    """
    for cell in request.cells:
        recipe = cell.load(0)
        if recipe.data is None or recipe.data.moving_digits is None:
            source = recipe.data.kind if recipe.data is not None else "none"
            raise RequestError(
                f"cell {cell.name}: data: {source} given, expected moving-digits; a sweep judges its students by that "
                "benchmark's classifier, so after hours of training there would be nothing to compare"
            )
        try:
            manager.check(recipe, RunDirectory(Path(os.devnull) / "none"))
        except FlcompressError as error:
            raise RequestError(f"cell {cell.name}: {error}") from error


def run_sweep(request: Request, out: Path, processes: int | None, display: Display) -> SweepFile:
    """Train and judge every cell with every seed, time one student of each, and write the results.

    A cell that fails is reported with its reason; the others go on. What an earlier call stored in `out` is kept.

    Args:
        request: a checked sweep.
        out: folder to write to: `results.json`, `report.html`, a folder of each cell and the passes they share.
        processes: tasks at a time; default: one for each GPU, or one.
        display: where progress is shown.

    Raises:
        RequestError: `out` holds something else, or another sweep is working there.
        FlcompressError: every cell failed.
    """
    check(request)
    _require_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    with working_alone(out, f"{out}: another flcompress sweep is working here; wait for it", display.line):
        return _Sweep(request, out, processes, display).run()


def _require_ours(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out: {out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "cells").is_dir():
        raise RequestError(f"--out: {out} holds something else than a sweep; choose another folder")


@dataclass
class _Running:
    """A task whose process is running."""

    task: Task
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int

    def error(self) -> str:
        """Return the last line of its output, without "error:"."""
        lines = self.task.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        status = self.process.returncode
        reason = last.removeprefix("error: ") if last.startswith("error: ") else f"ended with status {status}; {last}"
        return f"{reason} ({self.task.log})"


class _Sweep:
    """The tasks of a sweep and what became of them."""

    def __init__(self, request: Request, out: Path, processes: int | None, display: Display) -> None:
        self._request, self._out, self._display = request, out, display
        self._gpus = _gpu_count()
        self._processes = processes or max(1, self._gpus)
        self._failed: dict[str, str] = {}
        self._model_keys: dict[Path, str] = {}
        self._recipes: dict[str, str] = {}
        (out / "cells").mkdir(exist_ok=True)
        self._tasks = {
            (cell.name, seed): self._task(cell, seed) for seed in range(request.seeds) for cell in request.cells
        }

    def run(self) -> SweepFile:
        self._carry_out("cells", list(self._tasks.values()), self._processes)
        judged = [cell for cell in self._request.cells if cell.name not in self._failed]
        if not judged:
            raise FlcompressError(f"{self._out}: every cell failed; the first: {next(iter(self._failed.values()))}")
        teacher = self._teacher_task(judged[0])
        benches = [self._bench_task(cell) for cell in judged]
        # Clips are timed alone, so that no other task is what is measured.
        self._carry_out("teacher and times", [teacher, *benches], 1)
        if not teacher.result.is_file():
            raise FlcompressError(f"{self._out}: the teacher was not judged: {self._failed[teacher.cell]}")
        results = summary(
            self._request,
            TeacherResult.read(teacher.result).contenders,
            {cell.name: self._outcome(cell) for cell in self._request.cells},
        )
        results.write(self._out / "results.json")
        write_sweep_page(results, self._out / "report.html")
        return results

    def _outcome(self, cell: Cell) -> Outcome:
        if cell.name in self._failed:
            return Outcome(failed=self._failed[cell.name])
        tasks = [self._tasks[cell.name, seed] for seed in range(self._request.seeds)]
        return Outcome(
            results=[CellResult.read(task.result) for task in tasks],
            bench=BenchFile.read_optional(Path(tasks[0].run) / "bench" / "results.json"),
        )

    def _task(self, cell: Cell, seed: int) -> Task:
        recipe, folder = cell.load(seed), self._out / "cells" / cell.name / f"seed-{seed}"
        self._recipes[str(folder)] = dump_recipe(recipe)
        return Task(
            kind="cell",
            cell=cell.name,
            title=f"{cell.name}, seed {seed}",
            folder=str(folder),
            run=str(folder / "run"),
            store=str(self._out / "store"),
            key=self._key(recipe),
            clips_per_prompt=self._request.evaluation.clips_per_prompt,
            seeds=self._request.evaluation.seeds,
        )

    def _key(self, recipe: Recipe) -> str:
        """Return the key of everything that decides a cell's result."""
        if (folder := recipe.model_folder()) not in self._model_keys:
            self._model_keys[folder] = folder_digest(folder)
        return key_of(
            sweep=VERSION,
            judged=JUDGED_VERSION,
            model=self._model_keys[folder],
            partner=folder_digest(partner) if (partner := recipe.partner_folder()) else None,
            start=recipe.model.model_dump(mode="json", exclude={"path", "partner"}),
            sampling=recipe.sampling.decisive,
            passes=[[step.name, step.version, arguments(step)] for step in recipe.passes],
            data=fingerprint(recipe.data_spec()),
            seed=recipe.seed,
            training=recipe.training.decisive,
            evaluation=self._request.evaluation.model_dump(),
        )

    def _teacher_task(self, cell: Cell) -> Task:
        trained, folder = self._tasks[cell.name, 0], self._out / "teacher"
        return replace(trained, kind="teacher", title="teacher", cell="teacher", folder=str(folder))

    def _bench_task(self, cell: Cell) -> Task:
        trained = self._tasks[cell.name, 0]
        return replace(trained, kind="bench", title=f"{cell.name}, time of a clip")

    def _carry_out(self, title: str, tasks: Sequence[Task], processes: int) -> None:
        """Do what is not stored, `processes` at a time."""
        waiting = deque(task for task in tasks if not _stored(task))
        total, done = len(waiting), 0
        if len(tasks) > total:
            self._display.line(f"{title}: {len(tasks) - total} of {len(tasks)} unchanged")
        running: list[_Running] = []
        try:
            with self._display.stage(title) as progress:
                while waiting or running:
                    while waiting and len(running) < processes:
                        slot = min(set(range(processes)) - {other.slot for other in running})
                        running.append(self._begin(waiting.popleft(), slot, processes))
                    time.sleep(POLL_SECONDS)
                    for ended in [other for other in running if other.process.poll() is not None]:
                        running.remove(ended)
                        done += 1
                        self._end(ended, f"{done}/{total}")
                        progress(done, total, {})
        finally:
            for other in running:  # they resume from their checkpoints
                other.process.terminate()
            for other in running:
                other.process.wait()

    def _begin(self, task: Task, slot: int, processes: int) -> _Running:
        folder = Path(task.folder)
        folder.mkdir(parents=True, exist_ok=True)
        if task.kind == "cell":
            write_text(task.recipe, self._recipes[task.folder])
        log = task.log.open("wb")
        command = [sys.executable, "-m", "flcompress.sweeps.worker", task.to_json()]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=self._environment(slot, processes)
        )
        return _Running(task, process, log, slot)

    def _end(self, ended: _Running, count: str) -> None:
        ended.log.close()
        if ended.process.stdin is not None:
            ended.process.stdin.close()
        if ended.process.returncode == 0:
            self._display.line(f"{count} {ended.task.title}: done")
            return
        error = ended.error()
        self._failed.setdefault(ended.task.cell, error)
        self._display.line(f"{count} {ended.task.title}: {error}")

    def _environment(self, slot: int, processes: int) -> Mapping[str, str]:
        """Return what a process is started with: a GPU of its own, or its share of the cores."""
        environment = dict(os.environ)
        if self._gpus and processes > 1:
            visible = environment.get("CUDA_VISIBLE_DEVICES", "")
            known = visible.split(",") if visible else [str(index) for index in range(self._gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = known[slot % len(known)]
        elif processes > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, free_cores() // processes)))
        return environment


def _stored(task: Task) -> bool:
    """Return whether the task's result is there, and of the same request."""
    if task.kind == "bench":
        bench = BenchFile.read_optional(Path(task.run) / "bench" / "results.json")
        return bench is not None and bench.program == RunDirectory(Path(task.run)).key
    kind = CellResult if task.kind == "cell" else TeacherResult
    result = kind.read_optional(task.result)
    return result is not None and result.key == task.key


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
