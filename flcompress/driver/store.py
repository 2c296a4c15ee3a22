"""Content-addressed results of passes: one folder each, under a key of everything that decides its contents."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.core.attempts import ATTEMPTS_FILE, attempt
from flcompress.core.program import CHECKPOINTS, Program
from flcompress.core.records import RESULT_FILE, EntryFile, MetricsLine, ResultFile
from flcompress.files import locked, move_in_place
from flcompress.ir.text import to_text

ENTRY_FILE = "entry.json"
_SHOWN = 12
"""Hexadecimal digits of a key in its folder's name; the whole key is compared all the same."""


@dataclass(frozen=True)
class Entry:
    """A stored result.

    Attributes:
        folder: holds `entry.json`, the program and what the pass wrote.
        index: position in the recipe, from 1; 0 is the starting program.
        record: the contents of `entry.json`.
    """

    folder: Path
    index: int
    record: EntryFile

    @classmethod
    def read(cls, folder: Path, index: int | None = None) -> Entry:
        """Return the result stored in `folder`; RecordError if its `entry.json` is damaged."""
        record = EntryFile.read(folder / ENTRY_FILE)
        return cls(folder, record.index if index is None else index, record)

    @property
    def name(self) -> str:
        """Recipe name of the pass."""
        return self.record.name

    @property
    def key(self) -> str:
        """Cache key of the result."""
        return self.record.key

    def program(self) -> Program:
        """Return the program after this pass."""
        return Program.load(self.folder)

    def result(self) -> dict[str, Any]:
        """Return the pass's own summary, `result.json`; empty if it wrote none."""
        result = ResultFile.read_optional(self.folder / RESULT_FILE)
        return {} if result is None else result.dump()

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`; empty if it wrote none."""
        return [line.dump() for line in MetricsLine.read_lines(self.folder / "metrics.jsonl")]


class Store:
    """A folder of entries named `NN-name-<12 hex digits of the key>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, index: int, name: str, key: str) -> Entry | None:
        """Return the stored result with this key, whatever position it was made for; None if there is none."""
        for folder in sorted(self.folder.glob(f"[0-9][0-9]-{name}-{key[:_SHOWN]}*")):
            entry = Entry.read(folder, index)
            if entry.key == key:
                return entry
        return None

    def work_folder(self, index: int, name: str, key: str) -> Path:
        """Return the folder in which a result is built; it is renamed when the result is whole."""
        return self.folder / f".work-{index:02d}-{name}-{key[:_SHOWN]}"

    def make(
        self, index: int, name: str, key: str, arguments: dict[str, Any], build: Callable[[Path], Program]
    ) -> Entry:
        """Build a result in a work folder, and store it when it is whole.

        A killed attempt leaves its work folder; the next attempt continues in it, and adds to its time. If another
        process is building the same result, this waits for it and returns its result.
        """
        work = self.work_folder(index, name, key)
        work.mkdir(parents=True, exist_ok=True)
        with locked(work, wait=True):
            stored = self.find(index, name, key)
            if stored is not None:
                return stored
            work.mkdir(exist_ok=True)
            with attempt(work / ATTEMPTS_FILE, key) as attempts:
                program = build(work)
            record = EntryFile(key=key, name=name, index=index, arguments=arguments, **attempts.record())
            shutil.rmtree(work / CHECKPOINTS, ignore_errors=True)
            program.save(work)  # its component paths are relative, so they stay right when the folder is renamed
            (work / "graph.txt").write_text(to_text(program.graph), encoding="utf-8")
            record.write(work / ENTRY_FILE)
            final = self.folder / f"{index:02d}-{name}-{key[:_SHOWN]}"
            if final.exists():  # another key with the same first digits
                final = self.folder / f"{index:02d}-{name}-{key}"
            move_in_place(work, final)
        return Entry.read(final, index)
