"""The recipe's clips as latents: encoded when a pass first asks, remembered on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.errors import DataError
from flcompress.pipeline.display import Display
from flcompress.pipeline.durable import locked, move_in_place
from flcompress.pipeline.program import Program, folder_digest
from flcompress.pipeline.recipe import Recipe
from flcompress.pipeline.store import key_of

if TYPE_CHECKING:
    from flcompress.data.latents import LatentDataset


class Clips:
    """Calling it with a program gives the recipe's clips, encoded with that program's own parts."""

    def __init__(self, recipe: Recipe, folder: Path, display: Display) -> None:
        self._recipe = recipe
        self._folder = folder
        self._display = display
        self._loaded: dict[str, LatentDataset] = {}

    def __call__(self, program: Program) -> LatentDataset:
        from flcompress.models.parts import part_names

        spec = self._recipe.data_spec()
        if spec is None:
            raise DataError(f"{self._recipe.file}: no data: given, but a pass reads clips; add data: to the recipe")
        parts = {name: folder_digest(program.components[name]) for name in part_names(program.index)}
        length = program.contract.max_sequence_length
        key = key_of(data=fingerprint(spec), parts=parts, seed=self._recipe.seed, max_sequence_length=length)
        if key not in self._loaded:
            self._loaded[key] = self._from_disk(spec, program, key)
        return self._loaded[key]

    def _from_disk(self, spec: dict[str, Any], program: Program, key: str) -> LatentDataset:
        from flcompress.data.build import build_dataset
        from flcompress.data.latents import LatentDataset

        final, work = self._folder / key, self._folder / f".work-{key}"
        if not final.exists():
            work.mkdir(parents=True, exist_ok=True)
            with locked(work, wait=True):
                if not final.exists():
                    # The lock is on the folder itself, so it is emptied, not replaced.
                    for left in work.iterdir():
                        left.unlink()
                    with self._display.stage("encoding clips") as progress:
                        made = build_dataset(spec, program.parts(), program.contract, self._recipe.seed, progress)
                    made.save(work)
                    move_in_place(work, final)
        return LatentDataset.load(final)


def fingerprint(spec: dict[str, Any] | None) -> dict[str, Any] | None:
    """What identifies the clips: the specification, and for files on disk their names, sizes and times.

    Contents are not read: a folder of videos can be larger than memory, and this runs at every `apply`.
    """
    if spec is None:
        return None
    ((kind, given),) = spec.items()
    if kind == "latents":
        return {kind: _files(Path(given))}
    if kind == "videos":
        return {kind: {name: _files(Path(path)) for name, path in given.items()}}
    return spec


def _files(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.relative_to(root).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()
