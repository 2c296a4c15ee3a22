"""The run directory: everything one recipe has produced. Layout in docs/concepts.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flcompress.core.program import FEW_STEP_START, Program
from flcompress.core.records import Event, RunFile
from flcompress.driver import start
from flcompress.driver.store import Entry
from flcompress.errors import ModelError, RequestError
from flcompress.files import append_line, write_text
from flcompress.frontend.loading import dump_recipe, load_recipe
from flcompress.frontend.recipe import Recipe
from flcompress.models.stock_files import folder_digest

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
JOURNAL_FILE = "journal.jsonl"


class RunDirectory:
    """A folder that `flcompress apply` writes and every other command reads.

    Reading methods raise RequestError where the folder is no run directory.

    Args:
        path: the folder.
        model: the model folder that the run started from, if that has moved since.
    """

    def __init__(self, path: Path | str, model: Path | None = None) -> None:
        self.path = Path(path).resolve()
        self._model = model

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def exports(self) -> Path:
        """Folder of the exports."""
        return self.path / "exports"

    def exists(self) -> bool:
        """Return whether a run was begun here."""
        return (self.path / RUN_FILE).is_file()

    @property
    def name(self) -> str:
        """The name of its recipe."""
        return self._record().name

    @property
    def finished(self) -> bool:
        """Whether the last `apply` completed all passes."""
        return self._record().finished

    def recipe(self) -> Recipe:
        """Return the recipe last applied here, with every default written out."""
        self._record()
        return load_recipe(self.path / RECIPE_FILE)

    def entries(self) -> list[Entry]:
        """Return the results of the passes of the recipe last applied, in order, as far as they are done."""
        return [Entry.read(folder, index) for index, folder in enumerate(self._results())][1:]

    def start(self) -> Program:
        """Return the program that the recipe started from."""
        return self._program(self._entry_folders()[0])

    def final(self) -> Program:
        """Return the program after the last pass; RequestError if the run is not finished."""
        if not self.finished:
            done = len(self._entry_folders()) - 1
            raise RequestError(
                f"{self.path}: the run is not finished ({max(done, 0)} passes done); "
                f"give flcompress apply {self._record().recipe_path} again, it resumes from there"
            )
        return self._program(self._entry_folders()[-1])

    @property
    def final_folder(self) -> Path:
        """Folder of the last result, in the run directory or in the store that several runs share."""
        return self._entry_folders()[-1]

    @property
    def key(self) -> str:
        """Cache key of the last result; measurements record it to say what they measured."""
        return Entry.read(self._entry_folders()[-1]).key

    def journal(self) -> list[Event]:
        """Return the events of the journal, oldest first.

        Raises:
            RecordError: a damaged line; a last one that a killed run left incomplete is skipped.
        """
        return Event.read_lines(self.path / JOURNAL_FILE)

    @property
    def threads(self) -> int | None:
        """Number of threads that an unfinished run computes with; None before it has begun and when it is done."""
        events = self.journal()
        if not events or events[-1].event == "done":
            return None
        return next((event.threads for event in reversed(events) if event.threads), None)

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise RequestError if the folder belongs to another recipe, or holds something else."""
        if self.exists():
            if self.name != recipe.name:
                raise RequestError(
                    f"{self.path}: run directory of recipe '{self.name}', not of '{recipe.name}'; "
                    "choose another --run-dir"
                )
        elif self.path.is_dir() and any(
            # What was killed while it began here has left no more than that.
            path.name not in ("passes", f"{RUN_FILE}.tmp")
            for path in self.path.iterdir()
        ):
            raise RequestError(f"{self.path}: not empty and no run directory (no {RUN_FILE}); choose another --run-dir")
        elif self.path.exists() and not self.path.is_dir():
            raise RequestError(f"{self.path}: a file, expected a folder; choose another --run-dir")

    def begin(self, recipe: Recipe) -> None:
        """Write the resolved recipe and who this folder belongs to."""
        self.path.mkdir(parents=True, exist_ok=True)
        created = self._record().created if self.exists() else _now()
        record = RunFile(name=recipe.name, recipe_path=str(recipe.file), created=created, entries=[], finished=False)
        record.write(self.path / RUN_FILE)
        write_text(self.path / RECIPE_FILE, dump_recipe(recipe))

    def record_entries(self, entries: Sequence[Entry], *, finished: bool) -> None:
        """Record which stored results make up the run; the first is the starting program."""
        folders = [os.path.relpath(entry.folder, self.path) for entry in entries]
        record = self._record().model_copy(update={"entries": folders, "finished": finished})
        record.write(self.path / RUN_FILE)

    def note(self, event: str, name: str = "", **values: Any) -> None:
        """Append one event to the journal."""
        append_line(self.path / JOURNAL_FILE, Event(time=_now(), event=event, name=name, **values).line())

    def _entry_folders(self) -> list[Path]:
        folders = self._results()
        if not folders:
            raise RequestError(f"{self.path}: the run has not begun; give flcompress apply again")
        return folders

    def _results(self) -> list[Path]:
        """Folders of the stored results, the starting program's first."""
        return self._record().folders(self.path)

    def _program(self, folder: Path) -> Program:
        """Return a stored program; parts that it shares with the starting model are taken from where that is now."""
        program = Program.load(folder)
        missing = [path for path in program.components.values() if not path.is_dir()]
        if self._model is None and not missing:
            return program
        beginning = Program.load(self._entry_folders()[0]).components
        shared = {name: name for name, path in program.components.items() if beginning.get(name) == path}
        if program.components.get(FEW_STEP_START) == beginning["transformer"]:
            shared[FEW_STEP_START] = "transformer"  # the few-step pass was given the model as it is
        recipe = self.recipe()
        if self._model is not None:
            recipe = self._relocate(recipe, self._model)
        with suppress(ModelError):  # no model there either
            here = start.components_of(recipe, start.model_index(recipe), recipe.model_folder())
            program = replace(
                program, components={**program.components, **{name: here[own] for name, own in shared.items()}}
            )
            missing = [path for path in program.components.values() if not path.is_dir()]
        if missing:
            raise RequestError(
                f"{missing[0]}: no such folder; a part of the model that {self.path} started from; if the model has "
                "moved, give its folder with --model"
            )
        return program

    def _relocate(self, recipe: Recipe, model: Path) -> Recipe:
        """Return the recipe with its model in another folder; RequestError if that holds another model."""
        origin = Entry.read(self._entry_folders()[0]).record.arguments
        if recipe.model.weights == "random":
            raise RequestError(f"--model: {model} given, but {self.path} started from random weights, which it keeps")
        if not model.is_dir():
            raise RequestError(f"--model: {model}: no such folder; give the model's diffusers pipeline folder")
        if origin.get("sha256") not in (None, folder_digest(model)):
            raise RequestError(
                f"--model: {model} is not the model that {self.path} started from ({origin['path']}): its files "
                "differ; give that model's folder"
            )
        moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": model.resolve()})})
        return moved.written_in(recipe.file, {})

    def _record(self) -> RunFile:
        if not self.exists():
            raise RequestError(
                f"{self.path}: not a run directory (no {RUN_FILE}); give the folder that flcompress apply wrote"
            )
        return RunFile.read(self.path / RUN_FILE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
