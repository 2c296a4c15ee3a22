"""Checkpoints of a training: written to a temporary folder, synced, renamed; verified by checksum before use."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flcompress.core.program import CHECKPOINTS
from flcompress.distributed.world import World
from flcompress.errors import RequestError
from flcompress.files import key_of, move_in_place, sha256, sync, write_text
from flcompress.training.parts import Part, StoredParts, write_parts

MANIFEST = "checkpoint.json"
FORMAT = 2
WORK = ".work-"

Kind = Literal["step", "best"]
KEPT: Mapping[Kind, int] = {"step": 2, "best": 1}
"""Checkpoints kept: the newest two, in case the newest is damaged, and the one with the best held-out figure."""


@dataclass(frozen=True)
class Attempt:
    """The end of a process's writing: {file name: SHA-256}, empty without a file of its own, or why it failed."""

    digests: Mapping[str, str]
    failure: Exception | None = None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training: `checkpoints/step-00000050/`, the newest, and `best-00000050/`.

    Every process writes what only it holds, the main one what all processes hold. Any number of processes, under any
    engine, reads its own parts of them.

    Attributes:
        directory: the training's folder.
        world: the processes.
        engine: the name of what divides the tensors among them.
        say: shows one line.
    """

    directory: Path
    world: World
    engine: str
    say: Callable[[str], None]

    @property
    def _folder(self) -> Path:
        return self.directory / CHECKPOINTS

    @property
    def _writers(self) -> str:
        return f"{self.engine} on {self.world.size} process{'es' if self.world.size > 1 else ''}"

    def save(self, step: int, parts: Mapping[str, Part], kind: Kind = "step") -> None:
        """Store this process's parts; all processes together.

        If it fails, the earlier checkpoints are kept.
        """
        path = self.begin(step)
        self.complete(step, kind, path, self.attempt(path, parts, self.world.heartbeat))

    def begin(self, step: int) -> Path:
        """Make the folder that a checkpoint is written to; return this process's file in it. All processes together."""
        self.world.heartbeat(f"checkpoint of step {step}")
        # A name of its own: a process that outlives a killed command cannot write into what the next one writes.
        work: Path = self._folder / self.world.broadcast(lambda: self._prepare(step))
        return work / f"rank-{self.world.rank}.safetensors"

    def attempt(self, path: Path, parts: Mapping[str, Part], beat: Callable[[], None]) -> Attempt:
        """Write this process's file, if it holds anything of its own."""
        try:
            # Hashed as it is written: reading it back takes as long again, and comes from the page cache, not the disk.
            digest = write_parts(path, parts, main=self.world.main, beat=beat)
            if digest is None:
                return Attempt({})
            sync(path)
            return Attempt({path.name: digest})
        except Exception as error:  # noqa: BLE001 (raised by `complete`, once no process writes any more)
            return Attempt({}, error)

    def complete(self, step: int, kind: Kind, path: Path, attempt: Attempt) -> None:
        """Put a checkpoint in place that every process has written, or raise the failure of one; all together."""
        work, failure = path.parent, attempt.failure
        try:
            written = self.world.all_gather({"files": attempt.digests, "failed": failure is not None})
            if any(part["failed"] for part in written):
                if self.world.main:
                    shutil.rmtree(work, ignore_errors=True)  # frees a full disk at once
                if failure is not None:
                    raise failure
                self.world.all_gather(None)  # ends with the error of the process that failed, which never comes here
            files = {name: digest for part in written for name, digest in part["files"].items()}
            self.world.broadcast(lambda: self._put_in_place(step, kind, work, files))
        except BaseException:
            # Others may still be writing: theirs is left to the next command, which removes the folder.
            path.unlink(missing_ok=True)
            raise

    def _prepare(self, step: int) -> str:
        work = self._folder / f"{WORK}{step:08d}-{os.getpid()}-{time.monotonic_ns()}"
        work.mkdir(parents=True)
        return work.name

    def _put_in_place(self, step: int, kind: Kind, work: Path, files: Mapping[str, str]) -> None:
        record = {"step": step, "format": FORMAT, "writers": self._writers, "files": dict(files)}
        final = self._folder / f"{kind}-{step:08d}"
        try:
            write_text(work / MANIFEST, json.dumps({**record, "checksum": key_of(**record)}, indent=1) + "\n")
            if final.exists():
                _remove(final)
            move_in_place(work, final)
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        for old in self._list(kind)[KEPT[kind] :]:
            _remove(old)

    def load(self, kind: Kind = "step") -> tuple[int, StoredParts | None]:
        """Return (step, stored parts) of the newest intact checkpoint of a kind; (0, None) if there is none.

        Damaged checkpoints are reported and removed; so are the remains of killed commands.

        Raises:
            RequestError: another release wrote it.
        """
        for name in self.world.broadcast(partial(self._tidy, kind)):
            folder = self._folder / name
            record, trouble = self._verify(folder, kind)
            troubles = list(filter(None, self.world.all_gather(trouble)))
            if troubles:
                self.world.broadcast(partial(self._pass_over, folder, kind, troubles[0]))
                continue
            if record.get("format") != FORMAT:
                raise RequestError(
                    f"{folder}: written by another release of flcompress; resume with that one, or remove "
                    f"{self._folder} to begin this pass again"
                )
            if self.world.main and record["writers"] != self._writers:
                self.say(
                    f"{folder}: written with {record['writers']}, resuming with {self._writers}: the same batches and "
                    "noise, equal up to rounding"
                )
            files = [folder / file for file in sorted(record["files"])]
            return int(record["step"]), StoredParts(folder, files, self.world.heartbeat)
        return 0, None

    def _tidy(self, kind: Kind) -> list[str]:
        """Remove what killed commands left; return the names of the checkpoints, newest first."""
        for remains in self._folder.glob(f"{WORK}*"):
            shutil.rmtree(remains)
        return [folder.name for folder in self._list(kind)]

    def _pass_over(self, folder: Path, kind: Kind, trouble: str) -> None:
        # It must go: it would count as newer than those written from now on.
        _remove(folder)
        older = self._list(kind)
        instead = f"resuming from {older[0].name}" if older else "no other one is left; beginning this pass again"
        self.say(f"{folder}: damaged checkpoint removed ({trouble}); {instead}")

    def _verify(self, folder: Path, kind: Kind) -> tuple[dict[str, Any], str]:
        """Return (the manifest, what is wrong with it or with this process's share of the files)."""
        try:
            record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            checksum = record.pop("checksum")
            files = record["files"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            return {}, f"{MANIFEST} cannot be read: {error}"
        if checksum != key_of(**record) or folder.name != f"{kind}-{record['step']:08d}":
            return {}, f"{MANIFEST} does not match its checksum"
        # What another release wrote is refused by whoever reads the manifest, not taken for damaged.
        own = sorted(files)[self.world.rank :: self.world.size] if record.get("format") == FORMAT else ()
        for name in own:
            path = folder / name
            if not path.is_file():
                return record, f"{name} is missing"
            if sha256(path, self.world.heartbeat) != files[name]:
                return record, f"{name} does not match its checksum"
        return record, ""

    def _list(self, kind: Kind) -> Sequence[Path]:
        return sorted(self._folder.glob(f"{kind}-*"), reverse=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves none that looks intact."""
    gone = folder.with_name(f"{WORK}gone-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)
