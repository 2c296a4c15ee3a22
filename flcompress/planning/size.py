"""The size that a recipe trains at, before anything is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.frontend.recipe import Recipe

if TYPE_CHECKING:
    from flcompress.data.sizes import Size
    from flcompress.models.families.family import LatentShape


def latents(recipe: Recipe) -> LatentShape | None:
    """(frames, height, width) of the latents of a recipe's data; None where it has none, or prompts only.

    Of a dataset of several sizes the largest counts; of videos the first that can be read.
    """
    from flcompress.data.index import Index
    from flcompress.models.latent_size import folder_grid
    from flcompress.moving_digits import digits

    spec = recipe.data_spec()
    if spec is None:
        return None
    ((kind, given),) = spec.items()
    size: Size | None = digits.FRAMES, digits.HEIGHT, digits.WIDTH
    if kind == "latents":
        sizes = (shard.size for shard in Index.read(Path(given)).clip_shards)
        size = max(sizes, key=lambda one: one[0] * one[1] * one[2], default=None)
    elif kind == "videos":
        size = _first(recipe, given)
    model = recipe.model_folder()
    return folder_grid(model / "transformer", model / "vae").latents(*size) if size else None


def _first(recipe: Recipe, given: dict[str, Any]) -> Size | None:
    """(frames, height, width) at which the first readable video of a recipe is encoded."""
    from flcompress.data.captions import read_captions
    from flcompress.data.video_frames import BrokenVideo
    from flcompress.data.videos import video_size
    from flcompress.driver.clips import grid_and_target

    grid, target = grid_and_target(recipe)
    for one in read_captions(Path(given["captions"]), Path(given["folder"])):
        try:
            size = video_size(Path(given["folder"]) / one.file, limit=target.frames)
        except BrokenVideo:
            continue
        if bucket := target.bucket(size, grid):
            return bucket
    return None
