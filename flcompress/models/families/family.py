"""What a model family is: all that tracing cannot find out about its transformers and pipelines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.models.families.original_names import OriginalNames

Config = Mapping[str, Any]
"""A transformer's configuration."""

LatentShape = tuple[int, int, int]
"""(frames, height, width) of latents."""


class Family(ABC):
    """One family, stateless. Latents are [n, channels, frames, height, width] everywhere; an image has one frame.

    Attributes:
        name: as the documentation has it.
        pipelines: stock pipeline classes.
        from_image: those of them that make a clip from its first frame.
        transformers: stock transformer classes.
        prompt_names: entries of the conditioning that the prompt decides; others come from a first frame.
        embedded_guidance: the usual scale of a guidance-distilled network; None where the family has none.
        image: whether its latents always have one frame.
        original: the module names of the family's own project, where they differ from the stock class's.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    from_image: ClassVar[tuple[str, ...]] = ()
    transformers: ClassVar[tuple[str, ...]]
    prompt_names: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    embedded_guidance: ClassVar[float | None] = None
    image: ClassVar[bool] = False
    original: ClassVar[OriginalNames] = OriginalNames()

    @abstractmethod
    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        """Keyword arguments of the transformer's forward.

        Args:
            config: the transformer's.
            x: noised latents.
            timestep: [n], 0 to 1000, 1000 being pure noise; each family scales or turns it as its pipeline does.
            given: conditioning.
            guidance: embedded guidance scale; the family's usual one where None.
        """

    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning
    ) -> torch.Tensor:
        """The forward's output as the process predicts it (velocity e - x0 for flow models), shaped as x."""
        return output

    @abstractmethod
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Random conditioning for tracing and certificates, with every optional input that the model uses."""

    @abstractmethod
    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        """Conditioning of prompts by the stock pipeline's own code; tokens padded to `length`."""

    def image_conditioning(
        self, pipeline: Any, config: Config, clips: torch.Tensor, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        """Conditioning by the first frame, for `from_image`; it goes before that by the prompt alone.

        Args:
            pipeline: the stock one, without its transformers' weights.
            config: the transformer's.
            clips: [n, 3, frames, height, width] in [-1, 1].
            prompts: the clips' own.
            length: tokens a prompt is padded to.
        """
        raise NotImplementedError(f"{self.name} has no pipeline that starts from an image")

    def image_condition(self, config: Config) -> str | None:
        """What decides, beside the pipeline and its parts, how a first frame conditions; None where nothing does."""
        return None

    def call(self, guidance_scale: float, embedded: float | None) -> dict[str, float]:
        """Guidance arguments of the stock pipeline's call."""
        return {"guidance_scale": guidance_scale}

    def noise(self, shape: Sequence[int], draw: torch.Generator) -> torch.Tensor:
        """Starting noise [1, *shape] with the numbers that the stock pipeline draws from the same generator."""
        return torch.randn(1, *shape, generator=draw)

    def start(self, noise: torch.Tensor, given: Conditioning) -> torch.Tensor:
        """Latents that sampling starts from; noise alone in most pipelines."""
        return noise

    def cut_frames(self, config: Config) -> int:
        """First frames of what the autoencoder decodes that the stock pipeline does not show."""
        return 0

    def patch(self, config: Config) -> tuple[int, int]:
        """(frames, rows or columns) of latents that one token stands for."""
        given = config.get("patch_size") or 1
        if isinstance(given, list | tuple):
            return int(given[0]), int(given[-1])
        return int(config.get("patch_size_t") or 1), int(given)

    def fixed_latents(self, config: Config) -> LatentShape | None:
        """The size that learned positions are for; None where they are computed."""
        return None

    def channels(self, config: Config) -> int:
        """Channels of the latents."""
        return int(config["in_channels"])

    def sigmas(self, steps: int) -> Sequence[float] | None:
        """What the stock pipeline hands to the scheduler; None where the scheduler spaces its own."""
        return None

    def sequence_length(self, config: Config, shape: LatentShape) -> int:
        """Tokens that the stock pipeline counts for dynamic shifting."""
        raise NotImplementedError(f"{self.name} has no dynamic shifting")

    def mu(self, scheduler: Config, config: Config, shape: LatentShape) -> float | None:
        """The shift, before its exponential, of a scheduler with dynamic shifting: linear in the number of tokens."""
        if not scheduler.get("use_dynamic_shifting"):
            return None
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        slope = (top - base) / (high - low)
        return float(self.sequence_length(config, shape) * slope + base - slope * low)


def normal(draw: torch.Generator, *shape: int) -> torch.Tensor:
    """Random numbers for examples."""
    return torch.randn(shape, generator=draw)


def evenly(steps: int) -> list[float]:
    """1, (N-1)/N ... 1/N."""
    return [(steps - place) / steps for place in range(steps)]


def replaced(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """`x` with its first frames replaced by given ones."""
    return torch.cat([first.to(x.dtype), x[:, :, first.shape[2] :]], dim=2)


def leading_to(first: torch.Tensor, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A flow network's `output` with, in the first frames, the velocity that leads exactly to the given ones.

    So no loss and no sampler has to know of them.
    """
    level = (timestep / 1000.0).clamp(min=1e-3).reshape(-1, 1, 1, 1, 1)
    return replaced(output, (x[:, :, : first.shape[2]] - first.to(x.dtype)) / level)


def picture_of(clip: torch.Tensor) -> Any:
    """The first frame of a clip [3, frames, height, width] in [-1, 1] as the image that a user would give."""
    from PIL import Image

    pixels = ((clip[:, 0] + 1.0) / 2.0).clamp(0.0, 1.0)
    return Image.fromarray((pixels.permute(1, 2, 0) * 255.0).round().byte().cpu().numpy())


def packed(x: torch.Tensor) -> torch.Tensor:
    """Image latents [n, c, 1, h, w] as tokens [n, h/2 w/2, 4 c] of 2 x 2 patches (Flux, QwenImage)."""
    n, c, _, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * (w // 2), 4 * c)


def unpacked(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`packed` undone, to the shape of `like`."""
    n, c, _, h, w = like.shape
    return tokens.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, 1, h, w)


def padded(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """[n, tokens, ...] with zeros, or nothing, after the last token up to `length`."""
    missing = length - tokens.shape[1]
    return tokens if missing <= 0 else torch.cat([tokens, tokens.new_zeros(len(tokens), missing, *tokens.shape[2:])], 1)
