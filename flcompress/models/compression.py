"""How much an autoencoder shrinks a clip, from its configuration: pixels and frames to latents and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flcompress.errors import RequestError
from flcompress.models.families.family import LatentShape

MOCHI = (6, 8)
"""`AutoencoderKLMochi` has its factors in its code, not in its configuration."""


def compression(config: Mapping[str, Any]) -> tuple[int, int]:
    """(over time, over space) factors of a stock autoencoder; (1, ...) for one of single pictures."""
    name = config["_class_name"]
    if name == "AutoencoderKLMochi":
        return MOCHI
    if name == "AutoencoderKLWan":
        return int(config["scale_factor_temporal"] or 4), int(config["scale_factor_spatial"] or 8)
    if name == "AutoencoderKLQwenImage":
        return 1, 2 ** len(config["temperal_downsample"])
    if name == "AutoencoderKLLTXVideo":
        scaled = sum(map(bool, config["spatio_temporal_scaling"]))
        return config["patch_size_t"] * 2**scaled, config["patch_size"] * 2**scaled
    if name == "AutoencoderKLHunyuanVideo":
        return int(config["temporal_compression_ratio"]), int(config["spatial_compression_ratio"])
    space = 2 ** (len(config["block_out_channels"]) - 1)
    return int(config.get("temporal_compression_ratio") or 1), space


def latent_shape(config: Mapping[str, Any], frames: int, height: int, width: int) -> LatentShape:
    """Latents of a clip; the first frame is coded alone (81 frames are 21 of latents at a factor of 4).

    Raises:
        RequestError: a size that the autoencoder cannot code evenly.
    """
    time, space = compression(config)
    if (frames - 1) % time:
        nearest = round((frames - 1) / time) * time + 1
        raise RequestError(
            f"num_frames: {frames} given, expected 1 plus a multiple of {time} for this autoencoder, such as {nearest}"
        )
    for what, given in (("height", height), ("width", width)):
        if given % space:
            nearest = max(1, round(given / space)) * space
            raise RequestError(
                f"{what}: {given} given, expected a multiple of {space} for this autoencoder, such as {nearest}"
            )
    return (frames - 1) // time + 1, height // space, width // space


def clip_size(config: Mapping[str, Any], shape: LatentShape) -> tuple[int, int, int]:
    """(frames, height, width) of the clip that latents decode to."""
    time, space = compression(config)
    return (shape[0] - 1) * time + 1, shape[1] * space, shape[2] * space
