"""CogVideoX and other video models with one stream of latents and one of text."""

from __future__ import annotations

from typing import Any

from tests.zoo.entry import Entry, Inputs, keep, long, t, x

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
