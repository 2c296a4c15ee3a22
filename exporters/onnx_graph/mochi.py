"""Mochi without what would fix an axis: a mask in place of its attention's loop over samples, counted positions.

torch.linspace takes the number of its steps for a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MaskedAttention:
    """In place of `MochiAttnProcessor2_0`, for prompts whose padding comes last."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
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
            query, key = turned(query, *image_rotary_emb), turned(key, *image_rotary_emb)
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


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of channels of x [n, tokens, heads, channels] rotated, in fp32."""
    a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack(((a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)), dim=-1).flatten(-2)


def centers(start: float, stop: float, num: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Middles of `num` equal parts, as `MochiRoPE._centers`."""
    return start + (torch.arange(num, device=device, dtype=dtype) + 0.5) * ((stop - start) / num)


def free(module: Any) -> None:
    """Rewrite, in place, Mochi's positions and attention; leave any other module as it is."""
    if type(module).__name__ == "MochiRoPE":
        module._centers = centers
    elif type(getattr(module, "processor", None)).__name__ == "MochiAttnProcessor2_0":
        module.processor = MaskedAttention()
