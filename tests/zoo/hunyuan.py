"""Hunyuan and Kandinsky."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Inputs, keep, long, t, x

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 3,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
REFINER = "context_embedder.token_refiner.refiner_blocks"
STACKS = {REFINER: 2, "transformer_blocks": 3, "single_transformer_blocks": 3}


def video(channels: int = 4) -> Inputs:
    """Latents, two kinds of text, a mask, a timestep."""
    return {
        "hidden_states": x(1, channels, 2, 4, 4),
        "timestep": t(500.0),
        "encoder_hidden_states": x(1, 6, 16),
        "pooled_projections": x(1, 8),
        "encoder_attention_mask": keep(1, 6, 5),
    }


def framepack() -> Inputs:
    """Packed history frames besides the latents."""
    return {
        **video(),
        "guidance": t(6.0),
        "image_embeds": x(1, 3, 8),
        "indices_latents": long(1, 2),
        "latents_clean": x(1, 4, 2, 4, 4),
        "indices_latents_clean": long(0, 3),
        "latents_history_2x": x(1, 4, 2, 4, 4),
        "indices_latents_history_2x": long(4, 5),
        "latents_history_4x": x(1, 4, 8, 4, 4),
        "indices_latents_history_4x": torch.arange(6, 14),
    }


def hunyuan_dit() -> Inputs:
    """Two text encoders, sizes, a style and rotary embeddings made outside."""
    return {
        "hidden_states": x(2, 4, 8, 8),
        "encoder_hidden_states": x(2, 4, 8),
        "text_embedding_mask": keep(2, 4, 3).float(),
        "encoder_hidden_states_t5": x(2, 4, 8),
        "text_embedding_mask_t5": keep(2, 4, 3).float(),
        "timestep": t(500.0, 300.0),
        "image_meta_size": x(2, 6),
        "style": long(0, 0),
        "image_rotary_emb": [x(16, 8), x(16, 8)],
    }


def kandinsky5() -> Inputs:
    """Channels last."""
    return {
        "hidden_states": x(1, 2, 4, 4, 4),
        "encoder_hidden_states": x(1, 6, 8),
        "timestep": t(500.0),
        "pooled_projections": x(1, 8),
        "visual_rope_pos": (torch.arange(2), torch.arange(2), torch.arange(2)),
        "text_rope_pos": torch.arange(6),
    }


def kandinsky6() -> Inputs:
    """Video and audio together."""
    return {
        "hidden_states": x(1, 2, 4, 4, 9),
        "encoder_hidden_states": x(1, 6, 8),
        "pooled_projections": x(1, 8),
        "timestep": t(500.0),
        "audio_hidden_states": x(1, 5, 6),
    }


KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 8,
    "in_text_dim2": 8,
    "time_dim": 16,
    "patch_size": (1, 2, 2),
    "model_dim": 16,
    "ff_dim": 32,
    "num_visual_blocks": 4,
    "axes_dims": (2, 2, 4),
}

ENTRIES = [
    Entry(
        name="hunyuan-video",
        module="transformer_hunyuan_video",
        model_class="HunyuanVideoTransformer3DModel",
        config=TINY,
        inputs=lambda: {**video(), "guidance": t(6.0)},
        blocks=STACKS,
    ),
    Entry(
        name="hunyuan-video-latent-concat",
        module="transformer_hunyuan_video",
        model_class="HunyuanVideoTransformer3DModel",
        config={**TINY, "in_channels": 9, "guidance_embeds": False, "image_condition_type": "latent_concat"},
        inputs=lambda: video(channels=9),
        blocks=STACKS,
    ),
    Entry(
        name="hunyuan-video-token-replace",
        module="transformer_hunyuan_video",
        model_class="HunyuanVideoTransformer3DModel",
        config={**TINY, "num_layers": 2, "num_single_layers": 2, "image_condition_type": "token_replace"},
        inputs=lambda: {**video(), "guidance": t(6.0)},
        blocks={REFINER: 2, "transformer_blocks": 2, "single_transformer_blocks": 2},
    ),
    Entry(
        name="hunyuan-video-framepack",
        module="transformer_hunyuan_video_framepack",
        model_class="HunyuanVideoFramepackTransformer3DModel",
        config={**TINY, "patch_size": 2, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        inputs=framepack,
        blocks=STACKS,
    ),
    Entry(
        name="hunyuan-video-15",
        module="transformer_hunyuan_video15",
        model_class="HunyuanVideo15Transformer3DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "num_refiner_layers": 2,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        inputs=lambda: {
            "hidden_states": x(1, 4, 2, 4, 4),
            "timestep": t(500.0),
            "encoder_hidden_states": x(1, 6, 16),
            "encoder_attention_mask": keep(1, 6, 5).float(),
            "encoder_hidden_states_2": x(1, 4, 8),
            "encoder_attention_mask_2": keep(1, 4, 3).float(),
            "image_embeds": x(1, 3, 12),
        },
        blocks={REFINER: 2, "transformer_blocks": 3},
    ),
    Entry(
        name="hunyuan-image",
        module="transformer_hunyuanimage",
        model_class="HunyuanImageTransformer2DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "num_single_layers": 3,
            "num_refiner_layers": 2,
            "patch_size": (1, 1),
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "rope_axes_dim": (4, 4),
        },
        inputs=lambda: {
            "hidden_states": x(1, 4, 4, 4),
            "timestep": t(500.0),
            "encoder_hidden_states": x(1, 6, 16),
            "encoder_attention_mask": keep(1, 6, 5),
            "encoder_hidden_states_2": x(1, 4, 8),
            "encoder_attention_mask_2": keep(1, 4, 3),
        },
        blocks=STACKS,
    ),
    Entry(
        name="hunyuan-dit",  # the second half reads what the first half left
        module="hunyuan_transformer_2d",
        model_class="HunyuanDiT2DModel",
        config={
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 6,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        inputs=hunyuan_dit,
        blocks={"blocks": 6},
    ),
    Entry(
        name="kandinsky-5",
        module="transformer_kandinsky",
        model_class="Kandinsky5Transformer3DModel",
        config={**KANDINSKY, "num_text_blocks": 2},
        inputs=kandinsky5,
        blocks={"text_transformer_blocks": 2, "visual_transformer_blocks": 4},
    ),
    Entry(
        name="kandinsky-6",
        module="transformer_kandinsky6",
        model_class="Kandinsky6Transformer3DModel",
        config={**KANDINSKY, "num_text_blocks": 2, "in_audio_dim": 6, "out_audio_dim": 6, "cross_gates": True},
        inputs=kandinsky6,
        optional=lambda: {"encoder_attention_mask": keep(1, 6, 5)},
        blocks={
            "video_text_transformer_blocks": 2,
            "audio_text_transformer_blocks": 2,
            "visual_transformer_blocks": 4,
        },
    ),
    Entry(
        name="kandinsky-6-sr",
        module="transformer_kandinsky6_sr",
        model_class="Kandinsky6SRTransformer3DModel",
        config={
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
        },
        inputs=lambda: {"hidden_states": x(1, 1, 8, 8, 9), "timestep": t(500.0)},
        blocks={"visual_transformer_blocks": 3},
    ),
]
