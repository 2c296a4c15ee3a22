"""HunyuanVideo: a guidance-distilled flow model with a masked language-model prompt and a pooled one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.models.families.family import Config, Family, LatentShape, evenly, normal


class HunyuanVideo(Family):
    """Text to video. The network is told its guidance scale; classifier-free guidance is not needed on top."""

    name: ClassVar[str] = "HunyuanVideo"
    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("HunyuanVideoTransformer3DModel",)
    prompt_names: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
    embedded_guidance: ClassVar[float | None] = 6.0

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        made = {"hidden_states": x, "timestep": timestep, **{name: given[name] for name in self.prompt_names}}
        if config["guidance_embeds"]:
            scale = self.embedded_guidance if guidance is None else guidance
            made["guidance"] = torch.full_like(timestep, 1000.0 * float(scale or 1.0))
        return made

    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, tokens)
        mask[:, tokens - tokens // 4 :] = 0.0  # padding, as most prompts have
        return {
            "encoder_hidden_states": normal(draw, batch, tokens, config["text_embed_dim"]),
            "encoder_attention_mask": mask,
            "pooled_projections": normal(draw, batch, config["pooled_projection_dim"]),
        }

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], length: int) -> dict[str, torch.Tensor]:
        embeds, pooled, mask = pipeline.encode_prompt(
            list(prompts), max_sequence_length=length, device=pipeline.text_encoder.device
        )
        return {
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask.to(embeds.dtype),
            "pooled_projections": pooled,
        }

    def call(self, guidance_scale: float, embedded: float | None) -> dict[str, float]:
        # The pipeline's guidance_scale is the embedded one; the other is called true_cfg_scale.
        told = {} if embedded is None else {"guidance_scale": embedded}
        return {**told, "true_cfg_scale": guidance_scale}

    def sigmas(self, steps: int) -> Sequence[float] | None:
        return evenly(steps)
