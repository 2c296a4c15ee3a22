"""Code that several families share: guidance arguments, packed latents, pooled or masked prompts, block names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from typing_extensions import override

from flcompress.diffusion.network import PROMPT_MASK, Conditioning
from flcompress.models.families.conversions import even_sigmas, normal, unpack
from flcompress.models.families.family import Config, Family, LatentShape
from flcompress.models.families.unmasked import PROMPT

POOLED = ("encoder_hidden_states", "pooled_projections")
MASKED = (PROMPT, PROMPT_MASK)

GUIDANCE = "guidance"
"""Entry of the conditioning that gives each sample an embedded guidance scale of its own, [n]."""

DOUBLE_STREAM_STACKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
"""Original lists of blocks -> stock ones, of FLUX.1 and HunyuanVideo, whose double and single blocks are the same."""

_DOUBLE_STREAM = {
    "norm1.linear": ("img_mod.lin", "img_mod.linear"),
    "norm1_context.linear": ("txt_mod.lin", "txt_mod.linear"),
    "attn.to_q + attn.to_k + attn.to_v": ("img_attn.qkv", "img_attn_qkv"),
    "attn.add_q_proj + attn.add_k_proj + attn.add_v_proj": ("txt_attn.qkv", "txt_attn_qkv"),
    "attn.to_out.0": ("img_attn.proj", "img_attn_proj"),
    "attn.to_add_out": ("txt_attn.proj", "txt_attn_proj"),
    "attn.norm_q": ("img_attn.norm.query_norm", "img_attn_q_norm", "norm.query_norm", "q_norm"),
    "attn.norm_k": ("img_attn.norm.key_norm", "img_attn_k_norm", "norm.key_norm", "k_norm"),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", "txt_attn_q_norm"),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", "txt_attn_k_norm"),
    "ff.net.0.proj": ("img_mlp.0", "img_mlp.fc1"),
    "ff.net.2": ("img_mlp.2", "img_mlp.fc2"),
    "ff_context.net.0.proj": ("txt_mlp.0", "txt_mlp.fc1"),
    "ff_context.net.2": ("txt_mlp.2", "txt_mlp.fc2"),
    "attn.to_q + attn.to_k + attn.to_v + proj_mlp": ("linear1",),
    "proj_out": ("linear2", "final_layer.linear"),
    "norm.linear": ("modulation.lin", "modulation.linear"),
    "norm_out.linear": ("final_layer.adaLN_modulation.1",),
}
DOUBLE_STREAM_MODULES = {original: stock for stock, names in _DOUBLE_STREAM.items() for original in names}
"""Original modules of these blocks -> stock ones."""

EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
"""Original embedders -> those within the stock `time_text_embed`."""


class TrueGuidance(Family):
    """A pipeline whose `guidance_scale` is the embedded one, the other `true_cfg_scale`, and whose sigmas are even."""

    @override
    def call(self, guidance_scale: float, embedded: float | None, negative_prompt: str = "") -> dict[str, float | str]:
        arguments: dict[str, float | str] = {} if embedded is None else {"guidance_scale": embedded}
        # The pipeline guides only where it is given a negative prompt, be it the empty one.
        negative: dict[str, float | str] = {"negative_prompt": negative_prompt} if guidance_scale != 1.0 else {}
        return {**arguments, "true_cfg_scale": guidance_scale, **negative}

    @override
    def sigmas(self, steps: int, scheduler: Config) -> Sequence[float] | None:
        return even_sigmas(steps)

    def guidance_input(
        self, timestep: torch.Tensor, conditioning: Conditioning, guidance: float | None, unit: float = 1.0
    ) -> torch.Tensor:
        """Return what the network takes as its guidance, [n], in fp32.

        Args:
            timestep: [n].
            conditioning: may give every sample a scale of its own, as `GUIDANCE`.
            guidance: the scale of the others; the family's usual one where None.
            unit: the network's input for a scale of 1.
        """
        if GUIDANCE in conditioning:
            return unit * conditioning[GUIDANCE].to(timestep)
        scale = self.embedded_guidance if guidance is None else guidance
        return torch.full_like(timestep, unit * float(scale or 1.0))


class PackedImage(TrueGuidance):
    """An image model whose latents are packed into tokens of 2 x 2 patches."""

    image: ClassVar[bool] = True

    @override
    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return unpack(output, x)

    @override
    def patch(self, config: Config) -> tuple[int, int]:
        return 1, 2

    @override
    def channels(self, config: Config) -> int:
        return int(config["in_channels"]) // 4

    @override
    def sequence_length(self, config: Config, shape: LatentShape) -> int:
        return shape[1] // 2 * (shape[2] // 2)


def pooled_example(config: Config, batch: int, tokens: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw a random prompt embedding with a pooled one."""
    return {
        "encoder_hidden_states": normal(draw, batch, tokens, config["joint_attention_dim"]),
        "pooled_projections": normal(draw, batch, config["pooled_projection_dim"]),
    }


def masked_example(batch: int, tokens: int, channels: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw a random prompt embedding with the mask of its tokens."""
    mask = torch.ones(batch, tokens)
    mask[:, tokens - tokens // 4 :] = 0.0  # padding, as most prompts have
    return {"encoder_hidden_states": normal(draw, batch, tokens, channels), "encoder_attention_mask": mask}


def masked_prompts(pipeline: Any, prompts: Sequence[str], length: int) -> dict[str, torch.Tensor]:
    """Return prompt embeddings and masks, by a pipeline that returns them in turn with the negative prompt's."""
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        device=pipeline.text_encoder.device,
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask.to(embeds.dtype)}
