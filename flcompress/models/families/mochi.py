"""Mochi: a flow model that counts from noise to data, whose prompt comes with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from flcompress.diffusion.network import Conditioning
from flcompress.models.families.family import ClipSize, Compression, Config, Family, LatentShape, OriginalNames
from flcompress.models.families.shared import MASKED, masked_example, masked_prompts

ORIGINAL = OriginalNames(
    stacks={"blocks": "transformer_blocks"},
    modules={
        "mod_x": "norm1.linear",
        "mod_y": "norm1_context.linear | norm1_context.linear_1",
        "attn.qkv_x": "attn1.to_q + attn1.to_k + attn1.to_v",
        "attn.qkv_y": "attn1.add_q_proj + attn1.add_k_proj + attn1.add_v_proj",
        "attn.proj_x": "attn1.to_out.0",
        "attn.proj_y": "attn1.to_add_out",
        **{f"attn.{part}_norm_x": f"attn1.norm_{part}" for part in "qk"},
        **{f"attn.{part}_norm_y": f"attn1.norm_added_{part}" for part in "qk"},
        "mlp_x.w1": "ff.net.0.proj",
        "mlp_x.w2": "ff.net.2",
        "mlp_y.w1": "ff_context.net.0.proj",
        "mlp_y.w2": "ff_context.net.2",
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        **{f"t5_y_embedder.{part}": f"time_embed.pooler.{part}" for part in ("to_q", "to_kv", "to_out")},
        "t5_yproj": "time_embed.caption_proj",
        "final_layer.mod": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
)


class Mochi(Family):
    """Text to video. The network counts from noise to data, and so predicts the velocity the other way."""

    name: ClassVar[str] = "Mochi"
    pipelines: ClassVar[tuple[str, ...]] = ("MochiPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("MochiTransformer3DModel",)
    original: ClassVar[OriginalNames] = ORIGINAL
    masks_attention: ClassVar[bool] = True
    ignores_padding: ClassVar[bool] = True
    prompt_names: ClassVar[tuple[str, ...]] = MASKED

    THRESHOLD_NOISE = 0.025

    @override
    def frame_rate(self, index: Config, config: Config) -> float:
        return 30.0

    @override
    def compression(self, autoencoder: Config) -> Compression:
        return 6, 8  # in the autoencoder's code, not in its configuration

    @override
    def usual(self, config: Config) -> tuple[Compression, ClipSize]:
        return (6, 8), ClipSize(height=480, width=848, frames=19, tokens=256)

    @override
    def arguments(
        self,
        config: Config,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
            "timestep": 1000.0 - timestep,
            "encoder_attention_mask": conditioning["encoder_attention_mask"].bool(),
        }

    @override
    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return -output

    @override
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return masked_example(batch, tokens, config["text_embed_dim"], draw)

    @override
    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        return masked_prompts(pipeline, prompts, length)

    @override
    def sigmas(self, steps: int, scheduler: Config) -> Sequence[float] | None:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        return list(map(float, linear_quadratic_schedule(steps, self.THRESHOLD_NOISE)))

    @override
    def prepare_export(self, transformer: Any) -> None:
        from diffusers.models.attention_processor import MochiAttnProcessor2_0
        from diffusers.models.transformers.transformer_mochi import MochiRoPE

        for module in transformer.modules():
            if isinstance(module, MochiRoPE):
                module._centers = centers
            elif isinstance(getattr(module, "processor", None), MochiAttnProcessor2_0):
                module.processor = MaskedAttention()


class MaskedAttention:
    """`MochiAttnProcessor2_0` with a mask in place of its loop over samples, for prompts whose padding comes last."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the attention's outputs for the clip's tokens and the text's, [n, tokens, channels] each."""
        query, key, value = (
            make(hidden_states).unflatten(2, (attn.heads, -1)) for make in (attn.to_q, attn.to_k, attn.to_v)
        )
        text_query, text_key, text_value = (
            make(encoder_hidden_states).unflatten(2, (attn.heads, -1))
            for make in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
        if image_rotary_emb is not None:
            query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        joint_query, joint_key, joint_value = (
            torch.cat(pair, dim=1).transpose(1, 2)
            for pair in ((query, text_query), (key, text_key), (value, text_value))
        )
        clip = torch.ones_like(hidden_states[..., 0], dtype=torch.bool)
        mask = torch.cat((clip, attention_mask.bool()), dim=1)
        mixed = nn.functional.scaled_dot_product_attention(
            joint_query, joint_key, joint_value, attn_mask=mask[:, None, None]
        )
        # Padding asked no question in the stock processor: its answer is zero.
        mixed = mixed.transpose(1, 2).flatten(2, 3) * mask[..., None].to(mixed.dtype)
        clip_out, text_out = mixed.split_with_sizes((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        clip_out = attn.to_out[1](attn.to_out[0](clip_out))
        return clip_out, attn.to_add_out(text_out) if hasattr(attn, "to_add_out") else text_out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels of x [n, tokens, heads, channels], in fp32."""
    a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack(((a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)), dim=-1).flatten(-2)


def centers(start: float, stop: float, num: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the middles of `num` equal parts, as `MochiRoPE._centers`, whose torch.linspace fixes `num` in a graph."""
    return start + (torch.arange(num, device=device, dtype=dtype) + 0.5) * ((stop - start) / num)
