"""Image models: FLUX.1, Stable Diffusion 3 and QwenImage. Their latents are clips of one frame here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.models.families import original_names
from flcompress.models.families.family import (
    Config,
    Family,
    LatentShape,
    evenly,
    normal,
    packed,
    padded,
    unpacked,
)
from flcompress.models.families.original_names import OriginalNames

_POOLED = ("encoder_hidden_states", "pooled_projections")


class _Packed(Family):
    """Latents packed into tokens of 2 x 2 patches, a guidance scale that the network may be told."""

    image: ClassVar[bool] = True

    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning
    ) -> torch.Tensor:
        return unpacked(output, x)

    def call(self, guidance_scale: float, embedded: float | None) -> dict[str, float]:
        # The pipeline's guidance_scale is the embedded one; the other is called true_cfg_scale.
        told = {} if embedded is None else {"guidance_scale": embedded}
        return {**told, "true_cfg_scale": guidance_scale}

    def patch(self, config: Config) -> tuple[int, int]:
        return 1, 2

    def channels(self, config: Config) -> int:
        return int(config["in_channels"]) // 4

    def sigmas(self, steps: int) -> Sequence[float] | None:
        return evenly(steps)

    def sequence_length(self, config: Config, shape: LatentShape) -> int:
        return shape[1] // 2 * (shape[2] // 2)


class Flux(_Packed):
    """FLUX.1: packed latents, a pooled prompt, and (dev) an embedded guidance scale."""

    name: ClassVar[str] = "Flux"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)
    original: ClassVar[OriginalNames] = original_names.FLUX
    prompt_names: ClassVar[tuple[str, ...]] = _POOLED
    embedded_guidance: ClassVar[float | None] = 3.5

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        rows, columns = x.shape[3] // 2, x.shape[4] // 2
        places = torch.zeros(rows, columns, 3, device=x.device)
        places[..., 1] = torch.arange(rows, device=x.device)[:, None]
        places[..., 2] = torch.arange(columns, device=x.device)[None]
        made = {
            "hidden_states": packed(x),
            "timestep": timestep / 1000.0,
            "encoder_hidden_states": given["encoder_hidden_states"],
            "pooled_projections": given["pooled_projections"],
            "txt_ids": torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=x.device),
            "img_ids": places.reshape(rows * columns, 3),
        }
        if config["guidance_embeds"]:
            scale = self.embedded_guidance if guidance is None else guidance
            made["guidance"] = torch.full_like(timestep, float(scale or 1.0))
        return made

    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return _pooled_example(config, batch, tokens, draw)

    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        embeds, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, max_sequence_length=length, device=pipeline.text_encoder.device
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


class StableDiffusion3(Family):
    """SD3 and SD3.5."""

    name: ClassVar[str] = "SD3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("SD3Transformer2DModel",)
    original: ClassVar[OriginalNames] = original_names.SD3
    prompt_names: ClassVar[tuple[str, ...]] = _POOLED
    image: ClassVar[bool] = True

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        return {"hidden_states": x[:, :, 0], "timestep": timestep, **{name: given[name] for name in _POOLED}}

    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning
    ) -> torch.Tensor:
        return output[:, :, None]

    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return _pooled_example(config, batch, tokens, draw)

    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            device=pipeline.text_encoder.device,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def sequence_length(self, config: Config, shape: LatentShape) -> int:
        patch = int(config["patch_size"])
        return shape[1] // patch * (shape[2] // patch)


class QwenImage(_Packed):
    """QwenImage: packed latents and a masked language-model prompt."""

    name: ClassVar[str] = "QwenImage"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("QwenImageTransformer2DModel",)
    prompt_names: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "encoder_hidden_states_mask")

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        return {
            "hidden_states": packed(x),
            "timestep": timestep / 1000.0,
            "encoder_hidden_states": given["encoder_hidden_states"],
            "encoder_hidden_states_mask": given["encoder_hidden_states_mask"],
            "img_shapes": [[(1, x.shape[3] // 2, x.shape[4] // 2)]] * len(x),
        }

    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, tokens, dtype=torch.long)
        mask[:, tokens - tokens // 4 :] = 0  # padding, as most prompts have
        return {
            "encoder_hidden_states": normal(draw, batch, tokens, config["joint_attention_dim"]),
            "encoder_hidden_states_mask": mask,
        }

    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        embeds, mask = pipeline.encode_prompt(
            list(prompts), max_sequence_length=length, device=pipeline.text_encoder.device
        )
        if mask is None:  # the pipeline leaves out a mask that masks nothing
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {
            "encoder_hidden_states": padded(embeds, length),
            "encoder_hidden_states_mask": padded(mask.long(), length),
        }


def _pooled_example(config: Config, batch: int, tokens: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "encoder_hidden_states": normal(draw, batch, tokens, config["joint_attention_dim"]),
        "pooled_projections": normal(draw, batch, config["pooled_projection_dim"]),
    }
