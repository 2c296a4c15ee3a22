"""The recipe's clips as latents: encoded when a pass first asks for them, and kept on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.core.program import Program
from flcompress.data.index import INDEX_FILE, NEGATIVE
from flcompress.distributed.world import World
from flcompress.errors import DataError, RequestError
from flcompress.files import key_of, locked, move_in_place, sha256
from flcompress.frontend.recipe import Recipe
from flcompress.progress import Display

if TYPE_CHECKING:
    from flcompress.data.dataset import LatentDataset
    from flcompress.data.sizes import Target
    from flcompress.models.latent_size import Grid


class Clips:
    """A function of a program that returns the recipe's clips, encoded with that program's own parts."""

    def __init__(self, recipe: Recipe, folder: Path, display: Display, device: str) -> None:
        self._recipe = recipe
        self._folder = folder
        self._display = display
        self._device = device
        self._loaded: dict[str, LatentDataset] = {}

    def __call__(self, program: Program) -> LatentDataset:
        """Return the recipe's clips as latents of `program`'s autoencoder, encoded on first use."""
        from flcompress.data.dataset import LatentDataset

        spec, request, final = self._located(program)
        if final.name not in self._loaded:
            self._loaded[final.name] = LatentDataset.load(self._folder_of(spec, program, request, final))
        return self._loaded[final.name]

    def to_encode(self, program: Program) -> bool:
        """Return whether the recipe's clips are videos of which `program` has no latents yet."""
        spec, _, final = self._located(program)
        return "videos" in spec and not (final / INDEX_FILE).exists()

    def encode(self, program: Program, world: World) -> None:
        """Encode the recipe's videos with `program`'s own parts; all processes together, each its share."""
        spec, _, final = self._located(program)
        self._encode(spec["videos"], program, final, world)

    def _encode(self, source: dict[str, str], program: Program, final: Path, world: World) -> None:
        from flcompress.data.encoding import Request, encode, summary_text
        from flcompress.models.tensor_memory import free_gpu_memory

        request = Request(
            index=program.index,
            components=program.components,
            captions=Path(source["captions"]),
            out=final,
            videos=Path(source["folder"]),
            target=target_of(self._recipe),
            max_sequence_length=program.contract.max_sequence_length,
            negative_prompt=program.teacher_contract.negative_prompt,
            device=self._device,
        )
        summary = encode(request, self._display, wait=True, world=world)
        if world.main:
            self._display.line(summary_text(summary))
        free_gpu_memory()

    @property
    def one_size(self) -> bool:
        """Whether all clips that were read so far have one size."""
        return all(len(data.sizes) <= 1 for data in self._loaded.values())

    def _located(self, program: Program) -> tuple[dict[str, Any], dict[str, Any], Path]:
        """Return (the recipe's `data:`, what else identifies its latents, the folder for them)."""
        from flcompress.data.encoding import parts_digests

        spec = self._recipe.data_spec()
        if spec is None:
            raise DataError(f"{self._recipe.file}: no data: given, but a pass reads clips; add data: to the recipe")
        request = {
            "pipeline": program.pipeline_class,
            "parts": parts_digests(program.index, program.components),
            "max_sequence_length": program.contract.max_sequence_length,
        }
        if negative := program.teacher_contract.negative_prompt:
            request[NEGATIVE] = negative
        size = self._recipe.sampling.size if "videos" in spec else None
        key = key_of(data=fingerprint(spec), seed=self._recipe.seed, size=size, **request)
        return spec, request, self._folder / key

    def _folder_of(self, spec: dict[str, Any], program: Program, request: dict[str, Any], final: Path) -> Path:
        """Return the folder of the dataset; it is made in `final` if it does not exist yet."""
        from flcompress.models.tensor_memory import free_gpu_memory

        ((kind, source),) = spec.items()
        if kind == "latents":
            return Path(source)
        if kind == "moving-digits":
            self._render(source["clips"], program, request, final)
            free_gpu_memory()
        elif not (final / INDEX_FILE).exists():
            self._encode(source, program, final, World())
        return final

    def _render(self, clips: int, program: Program, request: dict[str, Any], final: Path) -> None:
        from flcompress.moving_digits.dataset import build_moving_digits

        work = final.with_name(f".work-{final.name}")
        if final.exists():
            return
        work.mkdir(parents=True, exist_ok=True)
        with locked(work, wait=True):
            if final.exists():
                return
            # The lock is on the folder itself, so it is emptied, not replaced.
            for left in work.iterdir():
                left.unlink()
            with self._display.stage("encoding clips") as progress:
                build_moving_digits(work, clips, program.parts(self._device), request, self._recipe.seed, progress)
            move_in_place(work, final)


def data_frame_rate(recipe: Recipe) -> float | None:
    """Return the frame rate of a recipe's clips; None for videos at their own rates, or a dataset that is gone."""
    from flcompress.data.index import Index
    from flcompress.moving_digits import digits

    if recipe.data is None or recipe.data.videos is not None:
        return None
    if recipe.data.moving_digits is not None:
        return digits.FRAMES_PER_SECOND
    try:
        fps = Index.read(Path((recipe.data_spec() or {})["latents"])).request.get("fps")
    except DataError:
        return None
    return None if fps is None else float(fps)


def target_of(recipe: Recipe) -> Target:
    """Return the size that a recipe's videos are encoded at: the one it samples, or their own."""
    from flcompress.data.sizes import OWN_SIZE, Target

    return Target(*recipe.sampling.size) if recipe.sampling.size else OWN_SIZE


def grid_and_target(recipe: Recipe) -> tuple[Grid, Target]:
    """Return the sizes that a recipe's model takes, and the one that its videos are encoded at.

    Raises:
        DataError: the model does not take that size.
    """
    from flcompress.models.latent_size import folder_grid

    model = recipe.model_folder()
    grid, target = folder_grid(model / "transformer", model / "vae"), target_of(recipe)
    try:
        target.check(grid)
    except RequestError as error:
        raise DataError(f"{recipe.where('sampling')}: {error}") from error
    return grid, target.fixed_to(grid)


def fingerprint(spec: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what identifies the clips.

    That is the specification; a dataset's index, which holds the checksums of its shards; for videos their names, sizes
    and times, since reading them all at every `apply` would take too long.
    """
    if spec is None:
        return None
    ((kind, source),) = spec.items()
    if kind == "latents":
        return {kind: sha256(Path(source) / INDEX_FILE)}
    if kind == "videos":
        return {kind: {name: _files(Path(path)) for name, path in source.items()}}
    return spec


def _files(root: Path, within: frozenset[Path] = frozenset()) -> str:
    """Return a digest of the names, sizes and times of a file, or of all files in a folder, linked folders included.

    Args:
        root: the file or folder.
        within: folders whose links led here; a link back to one of them ends there.
    """
    within = within | {root.resolve()}
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        name = os.fsencode(path.relative_to(root).as_posix())  # which need not be UTF-8
        if path.is_file():
            stat = path.stat()
            digest.update(name + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        elif path.is_symlink() and path.is_dir() and path.resolve() not in within:
            digest.update(name + f"\0{_files(path, within)}\0".encode())
    return digest.hexdigest()
