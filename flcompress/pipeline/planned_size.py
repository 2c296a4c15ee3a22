"""The size that a recipe trains at, before anything is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flcompress.errors import DataError, RequestError
from flcompress.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from flcompress.models.families.family import LatentShape


def latents(recipe: Recipe) -> LatentShape | None:
    """(frames, height, width) of the latents of a recipe's data; None where it has none.

    Raises:
        DataError: clips of a size that the autoencoder cannot code evenly.
    """
    from flcompress.data import moving_digits
    from flcompress.data.latents import LatentDataset
    from flcompress.data.videos import list_videos, video_size
    from flcompress.models.compression import latent_shape
    from flcompress.models.folder import read_json

    spec = recipe.data_spec()
    if spec is None:
        return None
    ((kind, given),) = spec.items()
    if kind == "latents":
        frames, height, width = LatentDataset.load(Path(given)).latents.shape[2:]
        return frames, height, width
    if kind == "videos":
        video = list_videos(Path(given["folder"]), Path(given["captions"]))[0].path
        where, size = str(video), video_size(video)
    else:
        where = "moving-digits"
        size = moving_digits.FRAMES, moving_digits.HEIGHT, moving_digits.WIDTH
    autoencoder = read_json(recipe.model_folder() / "vae" / "config.json", "a diffusers pipeline folder has one")
    try:
        return latent_shape(autoencoder, *size)
    except RequestError as error:
        raise DataError(f"{where}: {error}") from error
