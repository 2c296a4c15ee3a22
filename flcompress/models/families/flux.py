"""FLUX.1: an image model with packed latents, a pooled prompt and (dev) an embedded guidance scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from typing_extensions import override

from flcompress.diffusion.network import Conditioning
from flcompress.models.families.conversions import pack
from flcompress.models.families.family import ClipSize, Compression, Config, LatentShape, OriginalNames
from flcompress.models.families.shared import (
    DOUBLE_STREAM_MODULES,
    DOUBLE_STREAM_STACKS,
    EMBEDDERS,
    POOLED,
    PackedImage,
    pooled_example,
)

ORIGINAL = OriginalNames(
    stacks=DOUBLE_STREAM_STACKS,
    modules={
        **DOUBLE_STREAM_MODULES,
        **{
            f"{original}.{side}_layer": f"time_text_embed.{stock}.linear_{number}"
            for original, stock in EMBEDDERS.items()
            for number, side in ((1, "in"), (2, "out"))
        },
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
    },
)


class Flux(PackedImage):
    """FLUX.1: packed latents, a pooled prompt, and (dev) an embedded guidance scale."""

    name: ClassVar[str] = "Flux"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)
    original: ClassVar[OriginalNames] = ORIGINAL
    prompt_names: ClassVar[tuple[str, ...]] = POOLED
    embedded_guidance: ClassVar[float | None] = 3.5
    fp32_arguments: ClassVar[tuple[str, ...]] = ("timestep", "guidance", "img_ids", "txt_ids")

    @override
    def sigmas(self, steps: int, scheduler: Config) -> Sequence[float] | None:
        return None if scheduler.get("use_flow_sigmas") else super().sigmas(steps, scheduler)

    @override
    def arguments(
        self,
        config: Config,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        rows, columns = x.shape[3] // 2, x.shape[4] // 2
        positions = torch.zeros(rows, columns, 3, device=x.device)
        positions[..., 1] = torch.arange(rows, device=x.device)[:, None]
        positions[..., 2] = torch.arange(columns, device=x.device)[None]
        arguments = {
            "hidden_states": pack(x),
            "timestep": timestep / 1000.0,
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
            "pooled_projections": conditioning["pooled_projections"],
            "txt_ids": torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3, device=x.device),
            "img_ids": positions.reshape(rows * columns, 3),
        }
        if config["guidance_embeds"]:
            arguments["guidance"] = self.guidance_input(timestep, conditioning, guidance)
        return arguments

    @override
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return pooled_example(config, batch, tokens, draw)

    @override
    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        embeds, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, max_sequence_length=length, device=pipeline.text_encoder.device
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    @override
    def usual(self, config: Config) -> tuple[Compression, ClipSize]:
        return (1, 8), ClipSize(height=1024, width=1024, frames=1, tokens=512)
