"""Tiny stock transformers with random weights, and the inputs of one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, dict[str, Any]]


def draw(*shape: int) -> Tensor:
    """Random numbers on the default device."""
    return torch.randn(*shape)


def wan(**config: Any) -> Case:
    """One list, one stream."""
    from diffusers import WanTransformer3DModel

    base: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 4,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    inputs = {
        "hidden_states": draw(1, 4, 3, 8, 8),
        "timestep": torch.ones(1),
        "encoder_hidden_states": draw(1, 8, 16),
    }
    return WanTransformer3DModel(**{**base, **config}), inputs


def flux() -> Case:
    """Two lists in a row, both returning (text, image)."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": draw(1, 16, 4),
        "encoder_hidden_states": draw(1, 5, 32),
        "pooled_projections": draw(1, 32),
        "img_ids": draw(16, 3),
        "txt_ids": draw(5, 3),
        "timestep": torch.ones(1),
    }


def sd3(**config: Any) -> Case:
    """The last block differs: it returns no text stream."""
    from diffusers import SD3Transformer2DModel

    base: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 64,
        "out_channels": 4,
    }
    return SD3Transformer2DModel(**{**base, **config}), {
        "hidden_states": draw(1, 4, 8, 8),
        "encoder_hidden_states": draw(1, 5, 32),
        "pooled_projections": draw(1, 64),
        "timestep": torch.ones(1),
    }


def hunyuan_video() -> Case:
    """Three lists, one of them inside the text embedder, with three config keys."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return model, {
        "hidden_states": draw(1, 4, 2, 4, 4),
        "timestep": torch.ones(1),
        "encoder_hidden_states": draw(1, 6, 16),
        "pooled_projections": draw(1, 8),
        "encoder_attention_mask": torch.ones(1, 6),
        "guidance": torch.ones(1),
    }


def cogvideox() -> Case:
    """Returns (video, text), the other order."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    )
    return model, {
        "hidden_states": draw(1, 2, 4, 8, 8),
        "encoder_hidden_states": draw(1, 8, 8),
        "timestep": torch.ones(1, dtype=torch.long),
    }


def ltx_video() -> Case:
    """Weights that PyTorch's kernels round differently when they lie unaligned in memory."""
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    return model, {
        "hidden_states": draw(1, 8, 8),
        "encoder_hidden_states": draw(1, 6, 16),
        "timestep": torch.ones(1),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


def latte() -> Case:
    """Two lists that one config key counts and the forward zips."""
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        video_length=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return model, {
        "hidden_states": draw(1, 4, 2, 8, 8),
        "encoder_hidden_states": draw(1, 12, 32),
        "timestep": torch.ones(1, dtype=torch.long),
    }


def wan_vace() -> Case:
    """Config indices name blocks, and a second list feeds them."""
    from diffusers import WanVACETransformer3DModel

    model = WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=8,
    )
    return model, {
        "hidden_states": draw(1, 4, 2, 8, 8),
        "encoder_hidden_states": draw(1, 8, 32),
        "timestep": torch.ones(1),
        "control_hidden_states": draw(1, 8, 2, 8, 8),
        "control_hidden_states_scale": torch.ones(2),
    }


def mochi(**config: Any) -> Case:
    """The last block differs, and still returns its text stream."""
    from diffusers import MochiTransformer3DModel

    base: dict[str, Any] = {
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "qk_norm": "rms_norm",
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "activation_fn": "swiglu",
        "max_sequence_length": 16,
    }
    config = {**base, **config}
    return MochiTransformer3DModel(**config), {
        "hidden_states": draw(1, 4, 2, 8, 8),
        "encoder_hidden_states": draw(1, 8, config["text_embed_dim"]),
        "timestep": torch.ones(1),
        "encoder_attention_mask": torch.ones(1, 8, dtype=torch.bool),
    }


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's answer, evaluated without gradients."""
    model.eval()
    with torch.no_grad():
        answer: Tensor = model(**inputs, return_dict=False)[0]
    return answer
