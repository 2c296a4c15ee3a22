"""Checkpoints of a training: written beside, synced, renamed; verified by checksum before they are believed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from flcompress.errors import RequestError
from flcompress.pipeline.durable import move_in_place, sync
from flcompress.pipeline.store import CHECKPOINTS
from flcompress.pipeline.world import World

MANIFEST = "checkpoint.json"
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
        """Store what this process gives; all processes call it together. An empty mapping writes no file."""
        work, final = self._folder / f".work-{step:08d}", self._folder / f"{kind}-{step:08d}"
        self.world.beat(f"checkpoint of step {step}")
        if self.world.main:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        self.world.once(lambda: None)  # the folder is there
        mine: dict[str, str] = {}
        if tensors:
            path = work / f"rank-{self.world.rank}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, str(path))
            sync(path)
            mine[path.name] = _digest(path)
        files = {name: digest for one in self.world.gathered(mine) for name, digest in one.items()}
        if self.world.main:
            record = {"step": step, "layout": self.layout, "files": files}
            (work / MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            move_in_place(work, final)
            for old in self._written(kind)[KEPT[kind] :]:
                shutil.rmtree(old)
        self.world.once(lambda: None)  # it is in place: nobody goes on before

    def load(self, kind: Kind = "step") -> tuple[int, dict[str, torch.Tensor]]:
        """(step, tensors) of the newest whole checkpoint of a kind; (0, {}) where there is none.

        Raises:
            RequestError: it was written by other processes than these.
        """
        for name in self.world.once(lambda: [folder.name for folder in self._written(kind)]):
            folder = self._folder / name
            record, trouble = self._verified(folder)
            troubles = [one for one in self.world.gathered(trouble) if one]
            if troubles:
                if self.world.main:
                    self.say(f"{folder}: damaged checkpoint passed over: {troubles[0]}")
                continue
            if record["layout"] != self.layout:
                raise RequestError(
                    f"{folder}: written with {record['layout']}, this is {self.layout}; "
                    f"start as before, or remove {self._folder} to begin this pass again"
                )
            path = folder / self._mine()
            return int(str(record["step"])), load_file(str(path)) if path.exists() else {}
        return 0, {}

    def drop_after(self, step: int) -> None:
        """Remove checkpoints newer than `step`."""
        if self.world.main:
            for folder in self._written("step"):
                if folder.name > f"step-{step:08d}":
                    shutil.rmtree(folder)
        self.world.once(lambda: None)

    def _mine(self) -> str:
        return "rank-0.safetensors" if self.layout == WHOLE else f"rank-{self.world.rank}.safetensors"

    def _verified(self, folder: Path) -> tuple[dict[str, object], str]:
        """(the manifest, what is wrong with it or with the file that this process will read)."""
        try:
            record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            files = record["files"]
        except (OSError, ValueError, KeyError) as error:
            return {}, f"{MANIFEST} cannot be read ({error})"
        name = self._mine()
        if name in files and record["layout"] == self.layout:
            path = folder / name
            if not path.is_file():
                return record, f"{name} is missing"
            if _digest(path) != files[name]:
                return record, f"{name} does not match its checksum"
        return record, ""

    def _written(self, kind: Kind) -> Sequence[Path]:
        return sorted(self._folder.glob(f"{kind}-*"), reverse=True)


WHOLE = "whole"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
