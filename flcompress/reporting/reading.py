"""What a run directory holds, read as plain files: no model, no torch, nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.core.attempts import ATTEMPTS_FILE, seconds_so_far
from flcompress.errors import RequestError
from flcompress.files import Lock, locked
from flcompress.ir.graph import BlockGraph
from flcompress.ir.serial import from_json
from flcompress.reporting.record import Record, ReportError, read_lines, read_object


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored pass: its folder and what `entry.json` says. Index 0 is the starting model.

    Time and memory are of all its attempts; of one that is under way, of those so far.
    """

    folder: Path
    index: int
    name: str
    key: str
    given: Mapping[str, Any]
    seconds: float
    peak_rss_mb: float | None
    attempts: int = 1

    @property
    def arguments(self) -> str:
        """Its arguments on one line."""
        shown = (f"{key}: {one if isinstance(one, str) else json.dumps(one)}" for key, one in self.given.items())
        return ", ".join(shown)

    def program(self) -> Record:
        return read_object(self.folder / "program.json")

    def graph(self) -> BlockGraph:
        """The block graph after this pass; ReportError where `graph.json` is missing or damaged."""
        file = self.folder / "graph.json"
        try:
            return from_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, RequestError) as error:
            raise ReportError(f"{file}: {error}; delete {self.folder} and run the recipe again") from error

    def result(self) -> Record | None:
        """What the pass says of itself, or None where it says nothing."""
        file = self.folder / "result.json"
        return read_object(file) if file.is_file() else None

    def metrics(self) -> list[Record]:
        """One record a step, and one a look of the monitor."""
        return read_lines(self.folder / "metrics.jsonl")


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
        bench: `bench/results.json`, likewise.
        outdated: the commands ("eval", "bench") whose results are of an earlier student: the recipe has been changed
            and applied since, so they say nothing of this one.
    """

    path: Path
    info: Record
    recipe: str
    journal: list[Record]
    entries: list[Entry]
    unfinished: Unfinished | None
    exports: dict[str, Record]
    evaluation: Record | None
    bench: Record | None
    outdated: frozenset[str]

    @property
    def latest(self) -> list[Record]:
        """The journal's events since the recipe was last started."""
        starts = [place for place, event in enumerate(self.journal) if event.values.get("event") == "start"]
        return self.journal[starts[-1] :] if starts else self.journal

    def entry(self, name: str) -> Entry | None:
        """The last pass of that name."""
        found = [entry for entry in self.entries if entry.name == name]
        return found[-1] if found else None

    def result(self, name: str) -> Record | None:
        """`result.json` of the last pass of that name."""
        entry = self.entry(name)
        return entry.result() if entry else None

    def inside(self, relative: str) -> Path | None:
        """A file of the run directory by its relative name; None if it is missing or lies elsewhere."""
        file = (self.path / relative).resolve()
        return file if file.is_file() and file.is_relative_to(self.path.resolve()) else None


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RequestError: it is no run directory.
        ReportError: a file in it is damaged; the message names it.
    """
    if not run_dir.is_dir():
        raise RequestError(f"{run_dir}: no such folder, expected a run directory; flcompress apply RECIPE makes one")
    if not (run_dir / "run.json").is_file():
        raise RequestError(f"{run_dir}: has no run.json, expected a run directory; flcompress apply RECIPE makes one")
    info = read_object(run_dir / "run.json")
    # Results of earlier versions of a recipe stay beside these; a folder being there does not mean that it counts.
    entries = [_entry(run_dir / place, index) for index, place in enumerate(info.texts("entries"))]
    measured = {name: _optional(run_dir / name / "results.json") for name in ("eval", "bench")}
    current = {name: found for name, found in measured.items() if found is not None and _is_of(found, entries)}
    journal = read_lines(run_dir / "journal.jsonl")
    return RunRecord(
        path=run_dir,
        info=info,
        recipe=_text(run_dir / "recipe.yaml"),
        journal=journal,
        entries=entries,
        unfinished=_unfinished(run_dir, journal, len(entries)),
        exports={file.stem: read_object(file) for file in sorted((run_dir / "exports").glob("*.json"))},
        evaluation=current.get("eval"),
        bench=current.get("bench"),
        outdated=frozenset(name for name, found in measured.items() if found is not None and name not in current),
    )


def _entry(folder: Path, index: int) -> Entry:
    record = read_object(folder / "entry.json")
    return Entry(
        folder=folder,
        index=index,
        name=record.text("name"),
        key=record.text("key"),
        given=_arguments(record),
        seconds=record.number("seconds") if record.has("seconds") else 0.0,
        peak_rss_mb=record.number("peak_rss_mb") if record.has("peak_rss_mb") else None,
        attempts=int(record.number("attempts")) if record.has("attempts") else 1,
    )


def _unfinished(run_dir: Path, journal: list[Record], index: int) -> Unfinished | None:
    """The pass whose beginning is the last that the journal has of any pass, where its folder is still there."""
    passes = [event for event in journal if event.values.get("event") in ("begin", "pass")]
    if not passes or passes[-1].values.get("event") != "begin":
        return None
    begun = passes[-1]
    folder = run_dir / begun.text("folder")
    entry = Entry(
        folder=folder,
        index=index,
        name=begun.text("name"),
        key=begun.text("key"),
        given=_arguments(begun),
        seconds=seconds_so_far(folder / ATTEMPTS_FILE, begun.text("key")),
        peak_rss_mb=None,
    )
    try:
        with locked(folder, wait=False) as lock:
            return Unfinished(entry=entry, running=lock is Lock.BUSY)
    except OSError:  # it has just been stored, or removed
        return None


def _arguments(record: Record) -> Mapping[str, Any]:
    return record.sub("arguments").values if record.has("arguments") else {}


def _is_of(measured: Record, entries: list[Entry]) -> bool:
    """Whether a result was measured on the last of the entries, by its whole key."""
    return bool(entries) and measured.values.get("program") == entries[-1].key


def _optional(file: Path) -> Record | None:
    return read_object(file) if file.is_file() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file}: cannot be read as text ({error}); run the recipe again") from error
