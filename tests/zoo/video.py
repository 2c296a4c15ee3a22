"""Video models that are neither Wan nor Hunyuan."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Inputs, ids, keep, long, t, x

COGVIDEO: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 8,
    "num_layers": 4,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 6,
}


def cogvideo(frames: int = 2) -> Inputs:
    """Frames before channels."""
    return {
        "hidden_states": x(2, frames, 4, 8, 8),
        "encoder_hidden_states": x(2, 6, 8),
        "timestep": long(500, 300),
    }


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
        name="cogvideox",
        module="cogvideox_transformer_3d",
        model_class="CogVideoXTransformer3DModel",
        config=COGVIDEO,
        inputs=cogvideo,
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="cogvideox-1.5",
        module="cogvideox_transformer_3d",
        model_class="CogVideoXTransformer3DModel",
        config={**COGVIDEO, "num_layers": 3, "patch_size_t": 2, "use_rotary_positional_embeddings": True},
        inputs=cogvideo,
        blocks={"transformer_blocks": 3},
    ),
    Entry(
        name="consisid",  # a face adapter after every second block
        module="consisid_transformer_3d",
        model_class="ConsisIDTransformer3DModel",
        config={
            **COGVIDEO,
            "cross_attn_interval": 2,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        inputs=lambda: {**cogvideo(), "id_vit_hidden": [x(2, 2, 2)], "id_cond": x(2, 2)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="allegro",
        module="transformer_allegro",
        model_class="AllegroTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "cross_attention_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 2,
            "caption_channels": 8,
        },
        inputs=lambda: {
            "hidden_states": x(2, 4, 2, 8, 8),
            "encoder_hidden_states": x(2, 6, 8),
            "timestep": long(500, 300),
        },
        optional=lambda: {"encoder_attention_mask": keep(2, 6, 5).float()},
        blocks={"transformer_blocks": 4},
    ),
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
        name="easyanimate",  # the first blocks are of another kind than the rest
        module="transformer_easyanimate",
        model_class="EasyAnimateTransformer3DModel",
        config={
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 4,
            "mmdit_layers": 2,
            "num_layers": 4,
            "patch_size": 2,
            "sample_height": 60,
            "sample_width": 90,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        inputs=lambda: {
            "hidden_states": x(2, 4, 2, 4, 4),
            "timestep": t(500.0, 300.0),
            "encoder_hidden_states": x(2, 6, 16),
        },
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="latte",
        module="latte_transformer_3d",
        model_class="LatteTransformer3DModel",
        config={
            "sample_size": 8,
            "num_layers": 3,
            "patch_size": 2,
            "video_length": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
        inputs=lambda: {
            "hidden_states": x(1, 4, 2, 8, 8),
            "encoder_hidden_states": x(1, 6, 8),
            "timestep": long(500),
        },
        optional=lambda: {"enable_temporal_attentions": True},
        blocks={"transformer_blocks": 3, "temporal_transformer_blocks": 3},
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
        name="mochi",  # the last block leaves the text as it is
        module="transformer_mochi",
        model_class="MochiTransformer3DModel",
        config={
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 4,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "qk_norm": "rms_norm",
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "activation_fn": "swiglu",
            "max_sequence_length": 16,
        },
        inputs=lambda: {
            "hidden_states": x(1, 4, 2, 4, 4),
            "encoder_hidden_states": x(1, 6, 16),
            "timestep": t(500.0),
            "encoder_attention_mask": keep(1, 6, 6),
        },
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="motif-video",
        module="transformer_motif_video",
        model_class="MotifVideoTransformer3DModel",
        config={
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 3,
            "num_single_layers": 4,
            "num_decoder_layers": 2,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "image_embed_dim": 4,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        inputs=lambda: {
            "hidden_states": x(1, 9, 2, 4, 4),
            "encoder_hidden_states": x(1, 6, 16),
            "timestep": long(500),
        },
        blocks={"transformer_blocks": 3, "single_transformer_blocks": 4},
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
    Entry(
        name="temporal",
        module="transformer_temporal",
        model_class="TransformerTemporalModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 4,
            "norm_num_groups": 1,
        },
        inputs=lambda: {"hidden_states": x(6, 4, 4, 4), "num_frames": 3},
        blocks={"transformer_blocks": 4},
    ),
]
