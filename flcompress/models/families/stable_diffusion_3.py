"""Stable Diffusion 3 and 3.5: image models with a pooled prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from typing_extensions import override

from flcompress.diffusion.network import Conditioning
from flcompress.models.families.family import ClipSize, Compression, Config, Family, LatentShape, OriginalNames
from flcompress.models.families.shared import POOLED, pooled_example

ORIGINAL = OriginalNames(
    stacks={"joint_blocks": "transformer_blocks"},
    modules={
        "x_block.attn.qkv": "attn.to_q + attn.to_k + attn.to_v",
        "x_block.attn2.qkv": "attn2.to_q + attn2.to_k + attn2.to_v",
        "context_block.attn.qkv": "attn.add_q_proj + attn.add_k_proj + attn.add_v_proj",
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn2.proj": "attn2.to_out.0",
        "context_block.attn.proj": "attn.to_add_out",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
        **{f"x_block.attn.ln_{part}": f"attn.norm_{part}" for part in "qk"},
        **{f"x_block.attn2.ln_{part}": f"attn2.norm_{part}" for part in "qk"},
        **{f"context_block.attn.ln_{part}": f"attn.norm_added_{part}" for part in "qk"},
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
)


class StableDiffusion3(Family):
    """SD3 and SD3.5."""

    name: ClassVar[str] = "SD3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("SD3Transformer2DModel",)
    original: ClassVar[OriginalNames] = ORIGINAL
    prompt_names: ClassVar[tuple[str, ...]] = POOLED
    image: ClassVar[bool] = True

    @override
    def arguments(
        self,
        config: Config,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        return {"hidden_states": x[:, :, 0], "timestep": timestep, **{name: conditioning[name] for name in POOLED}}

    @override
    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return output[:, :, None]

    @override
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return pooled_example(config, batch, tokens, draw)

    @override
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

    @override
    def sequence_length(self, config: Config, shape: LatentShape) -> int:
        patch = int(config["patch_size"])
        return shape[1] // patch * (shape[2] // patch)

    @override
    def usual(self, config: Config) -> tuple[Compression, ClipSize]:
        return (1, 8), ClipSize(height=1024, width=1024, frames=1, tokens=333)
