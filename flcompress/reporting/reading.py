"""The contents of a run directory, read as plain files: no model, no torch, nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.core.attempts import ATTEMPTS_FILE, seconds_so_far
from flcompress.core.records import (
    AnyRecord,
    BenchFile,
    EntryFile,
    EvalFile,
    Event,
    ExportFile,
    MetricsLine,
    ProgramFile,
    RunFile,
)
from flcompress.errors import RecordError, RequestError
from flcompress.files import Lock, locked
from flcompress.ir.graph import BlockGraph
from flcompress.ir.serial import from_json


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A stored pass: its folder and the contents of `entry.json`. Index 0 is the starting model.

    Time and memory are of all its attempts; of one that is under way, of those so far.
    """

    folder: Path
    index: int
    name: str
    key: str
    argument_values: Mapping[str, Any]
    seconds: float
    peak_rss_mb: float | None
    attempts: int = 1

    @property
    def arguments(self) -> str:
        """The arguments on one line."""
        shown = (
            f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.argument_values.items()
        )
        return ", ".join(shown)

    def program(self) -> ProgramFile:
        """The description of the model after this pass, from `program.json`."""
        return ProgramFile.read(self.folder / "program.json")

    def graph(self) -> BlockGraph:
        """The block graph after this pass; RecordError if `graph.json` is missing or damaged."""
        file = self.folder / "graph.json"
        try:
            return from_json(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError, RequestError) as error:
            raise RecordError(f"{file}: {error}; delete {self.folder} and run the recipe again") from error

    def result(self, kind: type[AnyRecord]) -> AnyRecord | None:
        """Return the pass's summary, `result.json`, or None if it wrote none."""
        return kind.read_optional(self.folder / "result.json")

    def metrics(self) -> list[MetricsLine]:
        """Return one line a step, and one a held-out evaluation."""
        return MetricsLine.read_lines(self.folder / "metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """The pass that was begun last and is not stored: `running` while a process works on it."""

    entry: Entry
    running: bool


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run directory as the report sees it.

    Attributes:
        path: the run directory.
        info: `run.json`.
        recipe: text of `recipe.yaml`, or "" where there is none yet.
        journal: every event, oldest first.
        entries: the stored results that make up the run, as `run.json` lists them; the starting model comes first.
        unfinished: the pass that is running or was stopped.
        exports: name -> summary, in the order of the journal.
        evaluation: `eval/results.json`; None where there is none, or it is of an earlier student.
        suites: `eval/SUITE/results.json` of every other suite, likewise.
        bench: `bench/results.json`, likewise.
        outdated: the commands ("eval", "bench") whose results are of an earlier student: the recipe has been changed
            and applied since, so they say nothing of this one.
    """

    path: Path
    info: RunFile
    recipe: str
    journal: list[Event]
    entries: list[Entry]
    unfinished: Unfinished | None
    exports: dict[str, ExportFile]
    evaluation: EvalFile | None
    suites: dict[str, EvalFile]
    bench: BenchFile | None
    outdated: frozenset[str]

    @property
    def latest(self) -> list[Event]:
        """The journal's events since the recipe was last started."""
        starts = [index for index, event in enumerate(self.journal) if event.event == "start"]
        return self.journal[starts[-1] :] if starts else self.journal

    def entry(self, name: str) -> Entry | None:
        """The last pass of that name."""
        matches = [entry for entry in self.entries if entry.name == name]
        return matches[-1] if matches else None

    def result(self, name: str, kind: type[AnyRecord]) -> AnyRecord | None:
        """`result.json` of the last pass of that name."""
        entry = self.entry(name)
        return entry.result(kind) if entry else None

    def inside(self, relative: str) -> Path | None:
        """A file of the run directory by its relative name; None if it is missing or outside."""
        file = (self.path / relative).resolve()
        return file if file.is_file() and file.is_relative_to(self.path.resolve()) else None


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RequestError: it is no run directory.
        RecordError: a file in it is damaged, or a newer flcompress wrote it; the message names it.
    """
    if not run_dir.is_dir():
        raise RequestError(f"{run_dir}: no such folder, expected a run directory; flcompress apply RECIPE makes one")
    if not (run_dir / "run.json").is_file():
        raise RequestError(f"{run_dir}: has no run.json, expected a run directory; flcompress apply RECIPE makes one")
    info = RunFile.read(run_dir / "run.json")
    # Results of earlier versions of a recipe stay next to these; a folder being there does not mean that it counts.
    entries = [_entry(folder, index) for index, folder in enumerate(info.folders(run_dir))]
    evaluation = EvalFile.read_optional(run_dir / "eval" / "results.json")
    bench = BenchFile.read_optional(run_dir / "bench" / "results.json")
    # A result was measured on the last of the entries if it names the whole key of that.
    student = entries[-1].key if entries else None
    measured = {"eval": evaluation, "bench": bench}
    outdated = frozenset(
        name for name, results in measured.items() if results and (student is None or results.program != student)
    )
    suites = {file.parent.name: EvalFile.read(file) for file in sorted((run_dir / "eval").glob("*/results.json"))}
    current = {name: results for name, results in suites.items() if student is not None and results.program == student}
    if suites and not current and evaluation is None:
        outdated |= {"eval"}
    journal = Event.read_lines(run_dir / "journal.jsonl")
    return RunRecord(
        path=run_dir,
        info=info,
        recipe=_text(run_dir / "recipe.yaml"),
        journal=journal,
        entries=entries,
        unfinished=_find_unfinished(run_dir, journal, len(entries)),
        exports={file.stem: ExportFile.read(file) for file in sorted((run_dir / "exports").glob("*.json"))},
        evaluation=None if "eval" in outdated else evaluation,
        suites=current,
        bench=None if "bench" in outdated else bench,
        outdated=outdated,
    )


def _entry(folder: Path, index: int) -> Entry:
    record = EntryFile.read(folder / "entry.json")
    return Entry(
        folder=folder,
        index=index,
        name=record.name,
        key=record.key,
        argument_values=record.arguments,
        seconds=record.seconds,
        peak_rss_mb=record.peak_rss_mb,
        attempts=record.attempts,
    )


def _find_unfinished(run_dir: Path, journal: list[Event], index: int) -> Unfinished | None:
    """The pass whose beginning is the last that the journal has of any pass, where its folder is still there."""
    passes = [event for event in journal if event.event in ("begin", "pass")]
    if not passes or passes[-1].event != "begin":
        return None
    begun = passes[-1]
    folder = run_dir / begun.folder
    entry = Entry(
        folder=folder,
        index=index,
        name=begun.name,
        key=begun.key,
        argument_values=begun.arguments,
        seconds=seconds_so_far(folder / ATTEMPTS_FILE, begun.key),
        peak_rss_mb=None,
    )
    try:
        with locked(folder, wait=False) as lock:
            return Unfinished(entry=entry, running=lock is Lock.BUSY)
    except OSError:  # it has just been stored, or removed
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{file}: cannot be read as text ({error}); run the recipe again") from error
