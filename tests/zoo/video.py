"""Cosmos, LTX, Sana and others: video with sound, cameras or worlds."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Inputs, ids, keep, long, t, x

COSMOS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 4,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": False,  # the mask is resized by torchvision, which is not needed for anything else
    "extra_pos_embed_type": "learnable",
}


def cosmos() -> Inputs:
    """Latents, text and its mask."""
    return {
        "hidden_states": x(1, 4, 2, 4, 4),
        "timestep": t(500.0),
        "encoder_hidden_states": x(1, 6, 16),
        "attention_mask": keep(1, 6, 5),
        "fps": 30,
    }


def cosmos_3() -> Inputs:
    """Text and video tokens in one sequence without a batch axis."""
    return {
        "input_ids": long(1, 2, 3),
        "text_indexes": long(0, 1, 2),
        "position_ids": torch.arange(7).expand(3, 7),
        "und_len": 3,
        "sequence_length": 7,
        "vision_tokens": [x(1, 2, 1, 2, 2)],
        "vision_token_shapes": [(1, 2, 2)],
        "vision_sequence_indexes": long(3, 4, 5, 6),
        "vision_mse_loss_indexes": long(3, 4, 5, 6),
        "vision_timesteps": t(0.7, 0.7, 0.7, 0.7),
        "vision_noisy_frame_indexes": [long(0)],
    }


LTX: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 4,
    "qk_norm": "rms_norm_across_heads",
    "caption_channels": 8,
}
LTX_AUDIO: dict[str, Any] = {
    **LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "rope_double_precision": False,
}


def ltx() -> Inputs:
    """Packed latents."""
    return {
        "hidden_states": x(2, 8, 4),
        "encoder_hidden_states": x(2, 6, 8),
        "timestep": t(500.0, 300.0),
        "encoder_attention_mask": keep(2, 6, 5),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


def minimax_h3() -> Inputs:
    """Text, sound and video tokens in one sequence, told apart by tags and indices."""
    return {
        "hidden_states": x(2, 8, 16),
        "audio_hidden_states": x(2, 6, 6),
        "encoder_hidden_states": x(2, 4, 8),
        "timestep": t(0.7, 0.3),
        "timestep_indices": torch.tensor([0] * 4 + [1] * 6 + [0] * 8),
        "token_tags": torch.tensor([1] * 4 + [2] * 6 + [0] * 8),
        "position_ids": ids(18, 3),
        "video_indices": torch.arange(10, 18),
        "audio_indices": torch.arange(4, 10),
        "text_indices": torch.arange(4),
    }


def sana_wm() -> Inputs:
    """One timestep a frame, and a camera a frame."""
    pose = torch.eye(4).flatten().repeat(1, 2, 1) + 0.01 * x(1, 2, 16)
    return {
        "hidden_states": x(1, 4, 2, 4, 4),
        "timestep": t(500.0, 300.0).view(1, 1, 2),
        "encoder_hidden_states": x(1, 1, 6, 8),
        "encoder_attention_mask": keep(1, 6, 5),
        "camera_conditions": torch.cat([pose, t(4.0, 4.0, 2.0, 2.0).expand(1, 2, 4)], dim=-1),
        "chunk_plucker": x(1, 6, 2, 4, 4),
    }


ENTRIES = [
    Entry(
        name="cosmos",
        module="transformer_cosmos",
        model_class="CosmosTransformer3DModel",
        config=COSMOS,
        inputs=cosmos,
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="cosmos-video-to-world",
        module="transformer_cosmos",
        model_class="CosmosTransformer3DModel",
        config={**COSMOS, "in_channels": 5, "num_layers": 3},
        inputs=lambda: {**cosmos(), "condition_mask": torch.ones(1, 1, 2, 4, 4)},
        blocks={"transformer_blocks": 3},
    ),
    Entry(
        name="cosmos-3",
        module="transformer_cosmos3",
        model_class="Cosmos3OmniTransformer",
        config={
            "head_dim": 6,
            "hidden_act": "relu2",
            "hidden_size": 12,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "qk_norm_for_text": False,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 32,
        },
        inputs=cosmos_3,
        blocks={"layers": 4},
    ),
    Entry(
        name="ltx",
        module="transformer_ltx",
        model_class="LTXVideoTransformer3DModel",
        config=LTX,
        inputs=ltx,
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="ltx-2",
        module="transformer_ltx2",
        model_class="LTX2VideoTransformer3DModel",
        config=LTX_AUDIO,
        inputs=lambda: {
            **ltx(),
            "audio_hidden_states": x(2, 5, 4),
            "audio_encoder_hidden_states": x(2, 6, 8),
            "audio_num_frames": 5,
            "fps": 25.0,
        },
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="sana-wm-refiner",
        module="transformer_sana_wm_refiner",
        model_class="SanaWMLTX2RefinerTransformer3DModel",
        config=LTX_AUDIO,
        inputs=lambda: {
            "hidden_states": x(1, 8, 4),
            "encoder_hidden_states": x(1, 6, 8),
            "timestep": x(1, 8) * 100 + 500,
            "video_rotary_emb": (x(1, 8, 16).cos(), x(1, 8, 16).sin()),
        },
        optional=lambda: {"encoder_attention_mask": keep(1, 6, 5)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="minimax-h3",
        module="transformer_minimax_h3",
        model_class="MiniMaxH3Transformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 4,
            "num_refiner_layers": 2,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "patch_size": (1, 2, 2),
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        inputs=minimax_h3,
        blocks={"token_refiner.refiner_blocks": 2, "transformer_blocks": 4},
    ),
    Entry(
        name="sana-video",
        module="transformer_sana_video",
        model_class="SanaVideoTransformer3DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "mlp_ratio": 2.0,
            "sample_size": 8,
            "patch_size": (1, 2, 2),
            "rope_max_seq_len": 32,
        },
        inputs=lambda: {
            "hidden_states": x(1, 4, 2, 8, 8),
            "encoder_hidden_states": x(1, 6, 8),
            "timestep": t(500.0),
        },
        optional=lambda: {"encoder_attention_mask": keep(1, 6, 5)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="sana-wm",  # every second block attends in another way
        module="transformer_sana_wm",
        model_class="SanaWMTransformer3DModel",
        config={
            "in_channels": 4,
            "num_layers": 5,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 5,
            "caption_channels": 8,
            "mlp_ratio": 2.0,
        },
        inputs=sana_wm,
        blocks={"blocks": 5},
    ),
]
