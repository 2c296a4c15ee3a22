"""Checkpoints of a training: written beside, synced, renamed; verified by checksum before they are believed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from flcompress.core.program import CHECKPOINTS
from flcompress.distributed.world import World
from flcompress.errors import RequestError
from flcompress.files import key_of, move_in_place, sha256, sync, write_text

MANIFEST = "checkpoint.json"
WORK = ".work-"

Kind = Literal["step", "best"]
KEPT: Mapping[Kind, int] = {"step": 2, "best": 1}
"""The newest, and the one before it in case the newest is damaged; and the one with the best held-out figure."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training: `checkpoints/step-00000050/`, the newest, and `best-00000050/`.

    Every process writes what only it holds, the main one what all hold alike.

    Attributes:
        directory: the training's folder.
        world: the processes.
        layout: how tensors are split over processes ("whole", or the engine's name and the number of processes): a
            checkpoint of another layout cannot be taken up.
        say: shows one line.
    """

    directory: Path
    world: World
    layout: str
    say: Callable[[str], None]

    @property
    def _folder(self) -> Path:
        return self.directory / CHECKPOINTS

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], kind: Kind = "step") -> None:
        """Store what this process gives; all processes call it together. An empty mapping writes no file.

        Where it fails, what was stored before is kept.
        """
        self.world.heartbeat(f"checkpoint of step {step}")
        # A name of its own: a process that outlives a killed command cannot write into what the next one writes.
        work = self._folder / self.world.broadcast(lambda: self._prepared(step))
        try:
            mine: dict[str, str] = {}
            if tensors:
                path = work / f"rank-{self.world.rank}.safetensors"
                here = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                self.world.heartbeat()
                save_file(here, str(path))
                self.world.heartbeat()
                sync(path)
                mine[path.name] = sha256(path, self.world.heartbeat)
            files = {name: digest for one in self.world.all_gather(mine) for name, digest in one.items()}
            self.world.broadcast(lambda: self._put_in_place(step, kind, work, files))
        except BaseException:
            if self.world.main:
                shutil.rmtree(work, ignore_errors=True)  # a full disk has the room back at once
            raise

    def _prepared(self, step: int) -> str:
        work = self._folder / f"{WORK}{step:08d}-{os.getpid()}-{time.monotonic_ns()}"
        work.mkdir(parents=True)
        return work.name

    def _put_in_place(self, step: int, kind: Kind, work: Path, files: Mapping[str, str]) -> None:
        record = {"step": step, "layout": self.layout, "files": dict(files)}
        write_text(work / MANIFEST, json.dumps({**record, "checksum": key_of(**record)}, indent=1) + "\n")
        final = self._folder / f"{kind}-{step:08d}"
        if final.exists():
            _remove(final)
        move_in_place(work, final)
        for old in self._written(kind)[KEPT[kind] :]:
            _remove(old)

    def load(self, kind: Kind = "step") -> tuple[int, dict[str, torch.Tensor]]:
        """(step, tensors) of the newest whole checkpoint of a kind; (0, {}) where there is none.

        Damaged ones are said, and removed; so is what killed commands left behind.

        Raises:
            RequestError: it was written by other processes than these.
        """
        for name in self.world.broadcast(partial(self._tidied, kind)):
            folder = self._folder / name
            record, trouble = self._verified(folder, kind)
            troubles = [one for one in self.world.all_gather(trouble) if one]
            if troubles:
                self.world.broadcast(partial(self._pass_over, folder, kind, troubles[0]))
                continue
            if record["layout"] != self.layout:
                raise RequestError(
                    f"{folder}: written with {record['layout']}, this is {self.layout}; "
                    f"start as before, or remove {self._folder} to begin this pass again"
                )
            path = folder / self._mine()
            return int(str(record["step"])), load_file(str(path)) if path.exists() else {}
        return 0, {}

    def _tidied(self, kind: Kind) -> list[str]:
        """Names of the checkpoints, newest first."""
        for left in self._folder.glob(f"{WORK}*"):
            shutil.rmtree(left)
        return [folder.name for folder in self._written(kind)]

    def _pass_over(self, folder: Path, kind: Kind, trouble: str) -> None:
        # It must go: it would count as newer than those that are written from now on.
        _remove(folder)
        older = self._written(kind)
        instead = f"going on from {older[0].name}" if older else "no other one is left; beginning this pass again"
        self.say(f"{folder}: damaged checkpoint removed ({trouble}); {instead}")

    def _mine(self) -> str:
        return "rank-0.safetensors" if self.layout == WHOLE else f"rank-{self.world.rank}.safetensors"

    def _verified(self, folder: Path, kind: Kind) -> tuple[dict[str, object], str]:
        """(the manifest, what is wrong with it or with the file that this process will read)."""
        try:
            record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            checksum = record.pop("checksum")
            files = record["files"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            return {}, f"{MANIFEST} cannot be read: {error}"
        if checksum != key_of(**record) or folder.name != f"{kind}-{record['step']:08d}":
            return {}, f"{MANIFEST} does not match its checksum"
        name = self._mine()
        if name in files and record["layout"] == self.layout:
            path = folder / name
            if not path.is_file():
                return record, f"{name} is missing"
            if sha256(path, self.world.heartbeat) != files[name]:
                return record, f"{name} does not match its checksum"
        return record, ""

    def _written(self, kind: Kind) -> Sequence[Path]:
        return sorted(self._folder.glob(f"{kind}-*"), reverse=True)


WHOLE = "whole"


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves none that looks whole."""
    gone = folder.with_name(f"{WORK}gone-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)
