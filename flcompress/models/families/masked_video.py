"""LTX-Video and Mochi: flow models whose prompt comes with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.models.families import original_names
from flcompress.models.families.family import Config, Family, LatentShape, evenly, normal
from flcompress.models.families.original_names import OriginalNames

_MASKED = ("encoder_hidden_states", "encoder_attention_mask")


class LTX(Family):
    """Text to video. Latents become a plain sequence of tokens; positions are scaled to seconds and pixels."""

    name: ClassVar[str] = "LTX"
    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("LTXVideoTransformer3DModel",)
    original: ClassVar[OriginalNames] = original_names.LTX
    prompt_names: ClassVar[tuple[str, ...]] = (*_MASKED, "rope_interpolation_scale")

    FRAME_RATE = 25.0
    """The pipeline's own default; positions in time are seconds."""

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        return {
            "hidden_states": x.flatten(2).transpose(1, 2),
            "encoder_hidden_states": given["encoder_hidden_states"],
            "timestep": timestep,
            "encoder_attention_mask": given["encoder_attention_mask"],
            "num_frames": x.shape[2],
            "height": x.shape[3],
            "width": x.shape[4],
            "rope_interpolation_scale": tuple(given["rope_interpolation_scale"][0].tolist()),
        }

    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning
    ) -> torch.Tensor:
        return output.transpose(1, 2).reshape(x.shape)

    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {
            **_masked_example(batch, tokens, config["caption_channels"], draw),
            "rope_interpolation_scale": self._scale(8, 32).expand(batch, 3),
        }

    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        scale = self._scale(pipeline.vae_temporal_compression_ratio, pipeline.vae_spatial_compression_ratio)
        return {**_masked_prompts(pipeline, prompts, length), "rope_interpolation_scale": scale.repeat(len(prompts), 1)}

    def _scale(self, over_time: int, over_space: int) -> torch.Tensor:
        return torch.tensor([[over_time / self.FRAME_RATE, float(over_space), float(over_space)]])

    def sigmas(self, steps: int) -> Sequence[float] | None:
        return evenly(steps)

    def sequence_length(self, config: Config, shape: LatentShape) -> int:
        return shape[0] * shape[1] * shape[2]


class Mochi(Family):
    """Text to video. The network counts from noise to data, and so predicts the velocity the other way."""

    name: ClassVar[str] = "Mochi"
    pipelines: ClassVar[tuple[str, ...]] = ("MochiPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("MochiTransformer3DModel",)
    original: ClassVar[OriginalNames] = original_names.MOCHI
    prompt_names: ClassVar[tuple[str, ...]] = _MASKED

    THRESHOLD_NOISE = 0.025

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": given["encoder_hidden_states"],
            "timestep": 1000.0 - timestep,
            "encoder_attention_mask": given["encoder_attention_mask"].bool(),
        }

    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning
    ) -> torch.Tensor:
        return -output

    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return _masked_example(batch, tokens, config["text_embed_dim"], draw)

    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        return _masked_prompts(pipeline, prompts, length)

    def sigmas(self, steps: int) -> Sequence[float] | None:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        return list(map(float, linear_quadratic_schedule(steps, self.THRESHOLD_NOISE)))


def _masked_example(batch: int, tokens: int, channels: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, tokens)
    mask[:, tokens - tokens // 4 :] = 0.0  # padding, as most prompts have
    return {"encoder_hidden_states": normal(draw, batch, tokens, channels), "encoder_attention_mask": mask}


def _masked_prompts(pipeline: Any, prompts: Sequence[str], length: int) -> dict[str, torch.Tensor]:
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        device=pipeline.text_encoder.device,
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask.to(embeds.dtype)}
