"""A Wan transformer rewritten, on its own instance, into what ONNX and TensorRT express well.

The numbers stay the same. Two things change:
- the rotary tables become two fp32 constants of the exported size (stock code slices and expands them at every call);
- queries and keys are turned pairwise by stack and flatten (stock code writes every second channel in place, which
  becomes ScatterND with index tensors: a third more nodes, and no fused kernel).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flcompress.errors import ModelError
from flcompress.exporters.parity import Inputs
from flcompress.exporters.shapes import Shapes


class Denoiser(nn.Module):
    """The transformer as a plain function of three tensors, which is what the exported graph has as inputs."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Velocity [n, channels, frames, height, width]."""
        return self.transformer(  # type: ignore[no-any-return]
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            return_dict=False,
        )[0]

    def on(self, inputs: Inputs) -> Tensor:
        """The same, as a `flcompress.exporters.parity.Denoiser`."""
        return self(**inputs)  # type: ignore[no-any-return]


class ConstantRotary(nn.Module):
    """In place of `WanRotaryPosEmbed`: cos and sin [1, tokens, 1, head channels / 2] of one latent size."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin


class PairwiseRotation:
    """Attention processor: self-attention with rotary positions; everything else is left to the stock processor."""

    _attention_backend = None  # diffusers sets and reads these two on every processor
    _parallel_config = None

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if rotary_emb is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask)  # type: ignore[no-any-return]
        query = turned(_heads(attn, attn.norm_q(attn.to_q(hidden_states))), *rotary_emb)
        key = turned(_heads(attn, attn.norm_k(attn.to_k(hidden_states))), *rotary_emb)
        value = _heads(attn, attn.to_v(hidden_states))
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=attention_mask
        )
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3)))  # type: ignore[no-any-return]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of channels of x [n, tokens, heads, channels] rotated: (a, b) -> (a cos - b sin, a sin + b cos)."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def adapted(transformer: Any, shapes: Shapes) -> Denoiser:
    """Rewrite this `WanTransformer3DModel` instance in place and wrap it for export.

    Raises:
        ModelError: it takes an image beside the text, which this export does not.
    """
    if transformer.config.image_dim is not None or transformer.config.added_kv_proj_dim is not None:
        raise ModelError(
            f"onnx: image_dim {transformer.config.image_dim} given, expected null: only text-to-video Wan is exported"
        )
    cos, sin = transformer.rope(torch.zeros(1, *shapes.latents))
    # The stock tables hold every angle twice, once for each channel of a pair.
    transformer.rope = ConstantRotary(cos[..., 0::2].float().contiguous(), sin[..., 1::2].float().contiguous())
    for block in transformer.blocks:
        block.attn1.set_processor(PairwiseRotation(block.attn1.processor))
    return Denoiser(transformer)


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], attn.heads, -1)
