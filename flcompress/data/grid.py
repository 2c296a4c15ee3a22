"""Which clip sizes a pipeline takes, from the configurations of its autoencoder and its transformer."""

from __future__ import annotations

import math
from pathlib import Path

from flcompress.data.sizes import Grid
from flcompress.models.compression import compression
from flcompress.models.families import family_of
from flcompress.models.folder import read_json


def grid_of(pipeline_class: str, vae_folder: Path, transformer_folder: Path) -> Grid:
    """The sizes that a pipeline takes, from the configurations in the folders of two of its parts."""
    family = family_of(pipeline_class)
    transformer = read_json(transformer_folder / "config.json", "a pipeline's transformer has one")
    over_time, over_space = compression(read_json(vae_folder / "config.json", "a pipeline's autoencoder has one"))
    given = transformer.get("patch_size") or 1
    patch = int(given if isinstance(given, int) else given[-1])
    if family.image:  # Flux packs squares of latents into channels before its transformer
        patch = max(patch, math.isqrt(transformer["in_channels"] // family.channels(transformer)))
    return Grid(0 if family.image else over_time, over_space * patch)
