"""Which clips a model takes, and how large their latents are: what its autoencoder shrinks, what its patches divide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.errors import RequestError
from flcompress.models.configs import check_transformer_config, read_json
from flcompress.models.families import family_of
from flcompress.models.families.family import LatentShape

Names = tuple[str, str, str]
"""What frames, height and width are called where they were given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes that the autoencoder and the transformer's patches divide evenly.

    Attributes:
        over_time: frames that one latent frame stands for; the first frame of a clip is coded alone.
        over_space: pixels, each way, that one latent stands for.
        patch: (frames, rows or columns) of latents that one token stands for. Where it is several frames, copies of the
            first latent frame are put before it, so that they divide, and thrown away before decoding (CogVideoX 1.5).
        image: whether there is one frame only.
        fixed: (height, width) in pixels of a model whose learned positions fix them.
    """

    over_time: int
    over_space: int
    patch: tuple[int, int] = (1, 1)
    image: bool = False
    fixed: tuple[int, int] | None = None

    @property
    def pixels(self) -> int:
        """Height and width are multiples of this."""
        return self.over_space * self.patch[1]

    @property
    def step(self) -> int:
        """Frames from one allowed number to the next."""
        return self.over_time * self.patch[0]

    @property
    def padding(self) -> int:
        """Latent frames put before the first."""
        return self.patch[0] - 1

    def fit_frames(self, frames: int) -> int:
        """The largest allowed number of frames up to `frames`; 0 where that is 0."""
        if self.image:
            return min(frames, 1)
        return (frames - 1) // self.step * self.step + 1 if frames else 0

    def fit_pixels(self, pixels: int) -> int:
        """The largest allowed height or width up to `pixels`; may be 0."""
        return pixels // self.pixels * self.pixels

    def check(
        self,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        names: Names = ("frames", "height", "width"),
    ) -> None:
        """Raise RequestError for what the model does not take, naming the nearest that it does; None is not checked."""
        if frames is not None and self.fit_frames(frames) != frames:
            below = self.fit_frames(frames)
            wanted = f"1 plus a multiple of {self.step} for this model, such as {below} or {below + self.step}"
            wanted = "1, as this model makes images" if self.image else wanted
            raise RequestError(f"{names[0]}: {frames} given, expected {wanted}")
        for place, given in enumerate((height, width)):
            if given is None:
                continue
            if self.fixed and given != self.fixed[place]:
                raise RequestError(
                    f"{names[1 + place]}: {given} given, expected {self.fixed[place]}: the positions of this model are "
                    f"learned for {self.fixed[0]} x {self.fixed[1]}"
                )
            if given % self.pixels:
                below = max(self.fit_pixels(given), self.pixels)
                raise RequestError(
                    f"{names[1 + place]}: {given} given, expected a multiple of {self.pixels} for this model, such as "
                    f"{below} or {below + self.pixels}"
                )

    def latents(
        self, frames: int, height: int, width: int, names: Names = ("frames", "height", "width")
    ) -> LatentShape:
        """Latents of a clip (81 frames are 21 of latents at a factor of 4); RequestError as `check`."""
        self.check(frames, height, width, names)
        coded = (frames - 1) // self.over_time + 1
        return self.padding + coded, height // self.over_space, width // self.over_space

    def clip(self, latents: LatentShape) -> tuple[int, int, int]:
        """(frames, height, width) of the clip that latents decode to."""
        frames, height, width = latents
        return (frames - self.padding - 1) * self.over_time + 1, height * self.over_space, width * self.over_space


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSize:
    """Height and width in pixels, frames (1 for an image), and the length of the prompt in tokens."""

    height: int
    width: int
    frames: int
    tokens: int


def grid_of(transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> Grid:
    """The sizes that a pipeline takes, from the configurations of two of its parts."""
    return _grid(transformer["_class_name"], transformer, _compression(autoencoder))


def folder_grid(transformer: Path, autoencoder: Path) -> Grid:
    """As `grid_of`, from the folders of the two parts."""
    config = read_json(autoencoder / "config.json", "a pipeline's autoencoder has one")
    return grid_of(check_transformer_config(transformer), config)


def usual_grid(name: str, transformer: Mapping[str, Any]) -> tuple[Grid, ClipSize] | None:
    """As `grid_of` where a transformer of class `name` is all there is: with the autoencoder that it usually has.

    Also what the stock pipeline makes by default. None for a class of which this is not known.
    """
    if name not in _USUAL:
        return None
    small = name == "WanTransformer3DModel" and transformer["out_channels"] == _SMALL_WAN_CHANNELS
    compression, (height, width, frames, tokens) = _SMALL_WAN if small else _USUAL[name]
    usual = ClipSize(height=height, width=width, frames=frames, tokens=tokens)
    return _grid(name, transformer, compression), usual


_USUAL = {
    "WanTransformer3DModel": ((4, 8), (480, 832, 81, 512)),
    "HunyuanVideoTransformer3DModel": ((4, 8), (720, 1280, 129, 256)),
    "CogVideoXTransformer3DModel": ((4, 8), (480, 720, 49, 226)),
    "LTXVideoTransformer3DModel": ((8, 32), (512, 704, 161, 128)),
    "MochiTransformer3DModel": ((6, 8), (480, 848, 19, 256)),
    "FluxTransformer2DModel": ((1, 8), (1024, 1024, 1, 512)),
    "SD3Transformer2DModel": ((1, 8), (1024, 1024, 1, 333)),
    "QwenImageTransformer2DModel": ((1, 8), (1024, 1024, 1, 512)),
}
"""Compression (over time, over space) by the usual autoencoder; height, width, frames and tokens by default."""
_SMALL_WAN_CHANNELS = 48
_SMALL_WAN = ((4, 16), (704, 1280, 121, 512))
"""Wan 2.2 TI2V-5B, which its autoencoder's channels tell."""


def _grid(name: str, transformer: Mapping[str, Any], compression: tuple[int, int]) -> Grid:
    family, (over_time, over_space) = family_of(name), compression
    fixed = family.fixed_latents(transformer)
    return Grid(
        over_time=over_time,
        over_space=over_space,
        patch=family.patch(transformer),
        image=family.image,
        fixed=(fixed[1] * over_space, fixed[2] * over_space) if fixed else None,
    )


def _compression(config: Mapping[str, Any]) -> tuple[int, int]:
    """(over time, over space) factors of a stock autoencoder; (1, ...) for one of single pictures."""
    name = config["_class_name"]
    if name == "AutoencoderKLMochi":
        return 6, 8  # in its code, not in its configuration
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
