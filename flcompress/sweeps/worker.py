"""The process that does one task of a sweep: `python -m flcompress.sweeps.worker TASK`, the task as JSON.

A process for each, so that a cell that runs out of memory ends alone, and what it held is free for the next.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flcompress.core.records import CellResult, ContenderRow, TeacherResult
from flcompress.errors import INTERRUPTED, FlcompressError
from flcompress.progress import LineDisplay

BENCH_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        kind: "cell" trains and judges a student, "teacher" judges its teacher, "bench" times both.
        cell: name of the cell that it belongs to.
        title: what it is called in messages.
        folder: holds the cell's recipe and, when it is done, its result.
        run: the run directory.
        store: where cells share the results of passes.
        key: of everything that decides the result.
        clips_per_prompt: clips of each prompt for each evaluation seed.
        seeds: evaluation seeds.
    """

    kind: Literal["cell", "teacher", "bench"]
    cell: str
    title: str
    folder: str
    run: str
    store: str
    key: str
    clips_per_prompt: int
    seeds: int

    def to_json(self) -> str:
        """Return it as the worker's argument."""
        return json.dumps(asdict(self))

    @property
    def recipe(self) -> Path:
        """The cell's recipe."""
        return Path(self.folder) / "recipe.yaml"

    @property
    def result(self) -> Path:
        """What it writes; a bench writes the run's own `bench/results.json`."""
        return Path(self.folder) / "result.json"

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return Path(self.folder) / f"{self.kind}.log"


def train(task: Task) -> None:
    """Apply a cell's recipe, judge its student, and write the result."""
    from flcompress.driver.manager import apply
    from flcompress.evaluation.comparison import evaluate
    from flcompress.evaluation.contenders import run_contenders

    run = apply(task.recipe, task.run, store=task.store, display=LineDisplay())
    *_, student = run_contenders(run)  # the last contender; where nothing was trained, the teacher
    (row,) = evaluate(run, task.clips_per_prompt, task.seeds, contenders=[student.name])["contenders"]
    entries, start = run.entries(), run.start()
    graphs = [start.graph, *(entry.program().graph for entry in entries)]
    costs = [
        step.cost(graph.parameters, len(graph.blocks), start.graph.parameters)
        for step, graph in zip(run.recipe().passes, graphs[:-1], strict=True)
    ]
    CellResult(
        key=task.key,
        steps=row["steps"],
        evaluations=row["evaluations"],
        parameters=row["parameters"],
        calls=sum(cost.forwards for cost in costs),
        seconds=sum(entry.record.seconds or 0.0 for entry in entries),
        figures={name: figure["values"] for name, figure in _figures(row).items()},
    ).write(task.result)


def judge_teacher(task: Task) -> None:
    """Judge the teacher of a finished run, at all its steps and at the student's."""
    from flcompress.driver.rundir import RunDirectory
    from flcompress.evaluation.comparison import evaluate
    from flcompress.evaluation.contenders import run_contenders

    run = RunDirectory(Path(task.run))
    names = [contender.name for contender in run_contenders(run) if contender.name.startswith("teacher-")]
    rows = evaluate(run, task.clips_per_prompt, task.seeds, contenders=names)["contenders"]
    TeacherResult(key=task.key, contenders=[ContenderRow(**row) for row in rows]).write(task.result)


def time_student(task: Task) -> None:
    """Time the student of a finished run next to its teacher, in torch."""
    from flcompress.driver.rundir import RunDirectory
    from flcompress.evaluation.bench import bench

    bench(RunDirectory(Path(task.run)), BENCH_ROUNDS, backends=[])


def _figures(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: value for name, value in row.items() if isinstance(value, dict) and "values" in value}


def _end_with_the_sweep() -> None:
    """End this process when the sweep that started it is gone, however that ended."""

    def wait() -> None:
        while os.read(0, 1):  # sys.stdin would be locked while this waits, and Python's own end waits for the lock
            pass
        os._exit(INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


def main(argument: str) -> int:
    """Do a task, and return the exit status; an error is one line on standard error."""
    task = Task(**json.loads(argument))
    _end_with_the_sweep()
    try:
        {"cell": train, "teacher": judge_teacher, "bench": time_student}[task.kind](task)
    except FlcompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
