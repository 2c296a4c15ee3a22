"""From a clip in pixels to the size of its latents: how much each family's autoencoder compresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flcompress.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """Height and width in pixels, frames (1 for an image), and the length of the prompt in tokens."""

    height: int
    width: int
    frames: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Frames and pixels (each way) that one latent stands for; `usual` is what the stock pipeline makes by default.

    `packing` is the side of the patches that latents are cut into where the config's `patch_size` does not say it.
    """

    over_time: int
    over_space: int
    usual: ClipSize
    packing: int | None = None


def _clip(height: int, width: int, frames: int, tokens: int) -> ClipSize:
    return ClipSize(height=height, width=width, frames=frames, tokens=tokens)


_KNOWN = {
    "WanTransformer3DModel": Compression(over_time=4, over_space=8, usual=_clip(480, 832, 81, 512)),
    "HunyuanVideoTransformer3DModel": Compression(over_time=4, over_space=8, usual=_clip(720, 1280, 129, 256)),
    "CogVideoXTransformer3DModel": Compression(over_time=4, over_space=8, usual=_clip(480, 720, 49, 226)),
    "LTXVideoTransformer3DModel": Compression(over_time=8, over_space=32, usual=_clip(512, 704, 161, 128)),
    "MochiTransformer3DModel": Compression(over_time=6, over_space=8, usual=_clip(480, 848, 19, 256)),
    "FluxTransformer2DModel": Compression(over_time=1, over_space=8, usual=_clip(1024, 1024, 1, 512), packing=2),
    "SD3Transformer2DModel": Compression(over_time=1, over_space=8, usual=_clip(1024, 1024, 1, 333)),
    "QwenImageTransformer2DModel": Compression(over_time=1, over_space=8, usual=_clip(1024, 1024, 1, 512), packing=2),
}
_WAN_22_SMALL = Compression(over_time=4, over_space=16, usual=_clip(704, 1280, 121, 512))
"""TI2V-5B: its autoencoder has 48 channels."""


def compression_of(name: str, config: Mapping[str, Any]) -> Compression | None:
    """How the autoencoder of a transformer class compresses; None where it is not known."""
    if name == "WanTransformer3DModel" and config["out_channels"] == 48:
        return _WAN_22_SMALL
    return _KNOWN.get(name)


def latent_shape(name: str, config: Mapping[str, Any], size: ClipSize) -> tuple[int, int, int]:
    """(frames, height, width) of the latents of a clip.

    Args:
        name: a transformer class whose compression is known.
        config: the transformer's.
        size: of the clip.

    Raises:
        RequestError: a size that the class cannot make; names the nearest that it can.
    """
    found = compression_of(name, config)
    assert found is not None
    if found.over_time == 1 and size.frames != 1:
        raise RequestError(f"--frames: {size.frames} given, but {name} makes images; give 1, or leave it out")
    frames, beyond = divmod(size.frames - 1, found.over_time)
    if beyond:
        low = frames * found.over_time + 1
        raise RequestError(
            f"--frames: {size.frames} given, but {name} makes one frame and multiples of {found.over_time} more; "
            f"nearest: {low} or {low + found.over_time}"
        )
    patch = _patch(config, found)
    step = found.over_space * patch
    for flag, value in (("height", size.height), ("width", size.width)):
        if value % step:
            near = max(step, value // step * step)
            raise RequestError(
                f"--{flag}: {value} given, expected a multiple of {step} for this {name} (latents of "
                f"{found.over_space} pixels, patches of {patch}); nearest: {near} or {near + step}"
            )
    over_time = config.get("patch_size_t") or 1
    latents = frames + 1
    latents += -latents % over_time  # as CogVideoX 1.5's pipeline pads
    return latents, size.height // found.over_space, size.width // found.over_space


def _patch(config: Mapping[str, Any], found: Compression) -> int:
    if found.packing is not None:
        return found.packing
    patch = config["patch_size"]
    return int(patch[-1] if isinstance(patch, list | tuple) else patch)
