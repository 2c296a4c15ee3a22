"""A tiny pipeline folder of the stock classes, random weights, for tests."""

from __future__ import annotations

from pathlib import Path

from flcompress.data.blank_pipeline import write_blank
from flcompress.models.loading import initialise_pipeline


def tiny_pipeline(folder: Path, *, layers: int = 4, seed: int = 0) -> Path:
    """A whole `WanPipeline` with `layers` blocks of width 32; returns `folder`."""
    blank = folder.with_name(folder.name + "-blank")
    write_blank(blank, layers=layers, heads=2, feed_forward=64, vae_channels=4)
    initialise_pipeline(blank, folder, seed)
    return folder
