"""Wan and what grew out of it."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from tests.zoo.entry import Entry, Inputs, long, t, x

TINY: dict[str, Any] = {
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
    "rope_max_seq_len": 32,
}
NORMED = {**TINY, "qk_norm": "rms_norm_across_heads"}


def video(channels: int = 4, frames: int = 2) -> Inputs:
    """Latents, text and timestep."""
    return {
        "hidden_states": x(1, channels, frames, 4, 4),
        "encoder_hidden_states": x(1, 6, 16),
        "timestep": t(500.0),
    }


def wan_animate() -> Inputs:
    """A pose video and a face video besides the latents; face frames are grouped by four, and by blocks."""
    return {
        "hidden_states": x(1, 12, 6, 4, 4),
        "timestep": t(500.0),
        "encoder_hidden_states": x(1, 6, 16),
        "encoder_hidden_states_image": x(1, 4, 16),
        "pose_hidden_states": x(1, 4, 5, 4, 4),
        "face_pixel_values": x(1, 3, 17, 16, 16),
    }


def wan_animate_2() -> Inputs:
    """Lists of unbatched tensors, and a cache that the blocks fill by their index."""
    return {
        "hidden_states": [x(16, 2, 4, 4)],
        "timestep": t(500.0),
        "encoder_hidden_states": [x(6, 32)],
        "condition_latents": [x(20, 2, 4, 4)],
        "encoder_hidden_states_image": x(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(num_layers=4),
        "kv_cache_mode": "extract",
        "seq_len": 8,
        "offset_grid_sizes": long(2, 2, 2).unsqueeze(0),
    }


def helios() -> Inputs:
    """Short, middle and long memories of earlier frames."""
    return {
        **video(),
        "indices_hidden_states": t(7.0, 8.0).unsqueeze(0),
        "indices_latents_history_short": t(6.0).unsqueeze(0),
        "indices_latents_history_mid": t(5.0, 4.0).unsqueeze(0),
        "indices_latents_history_long": t(0.0, 1.0, 2.0, 3.0).unsqueeze(0),
        "latents_history_short": x(1, 4, 1, 8, 8),
        "latents_history_mid": x(1, 4, 2, 8, 8),
        "latents_history_long": x(1, 4, 4, 8, 8),
        "hidden_states": x(1, 4, 2, 8, 8),
    }


ENTRIES = [
    Entry(
        name="wan-t2v",
        module="transformer_wan",
        model_class="WanTransformer3DModel",
        config=NORMED,
        inputs=video,
        blocks={"blocks": 4},
    ),
    Entry(
        name="wan-i2v",
        module="transformer_wan",
        model_class="WanTransformer3DModel",
        config={**NORMED, "in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24},
        inputs=lambda: {**video(channels=12), "encoder_hidden_states_image": x(1, 5, 8)},
        blocks={"blocks": 4},
    ),
    Entry(
        name="wan-ti2v",  # one timestep a token
        module="transformer_wan",
        model_class="WanTransformer3DModel",
        config={**NORMED, "num_layers": 3},
        inputs=lambda: {**video(), "timestep": t(*[0.0] * 4, *[500.0] * 4).unsqueeze(0)},
        blocks={"blocks": 3},
    ),
    Entry(
        name="wan-vace",
        module="transformer_wan_vace",
        model_class="WanVACETransformer3DModel",
        config={**NORMED, "num_layers": 5, "vace_layers": [0, 2], "vace_in_channels": 8},
        inputs=lambda: {
            **video(),
            "control_hidden_states": x(1, 8, 2, 4, 4),
            "control_hidden_states_scale": t(0.5, 0.7),  # one a hint
        },
        blocks={"blocks": 5, "vace_blocks": 2},
    ),
    Entry(
        name="wan-animate",
        module="transformer_wan_animate",
        model_class="WanAnimateTransformer3DModel",
        config={
            **NORMED,
            "num_layers": 4,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        inputs=wan_animate,
        blocks={"blocks": 4},
    ),
    Entry(
        name="wan-animate-2",
        module="transformer_wan_animate_2",
        model_class="WanAnimate2Transformer3DModel",
        config={
            "patch_size": (1, 2, 2),
            "text_len": 16,
            "in_dim": 36,
            "dim": 32,
            "ffn_dim": 48,
            "freq_dim": 32,
            "text_dim": 32,
            "out_dim": 16,
            "num_heads": 2,
            "num_layers": 4,
            "cross_attn_norm": True,
            "use_img_emb": True,
        },
        inputs=wan_animate_2,
        blocks={"blocks": 4},
    ),
    Entry(
        name="skyreels-v2",
        module="transformer_skyreels_v2",
        model_class="SkyReelsV2Transformer3DModel",
        config=NORMED,
        inputs=lambda: {**video(), "timestep": long(500)},
        blocks={"blocks": 4},
    ),
    Entry(
        name="skyreels-v2-diffusion-forcing",
        module="transformer_skyreels_v2",
        model_class="SkyReelsV2Transformer3DModel",
        config={**NORMED, "num_layers": 3, "inject_sample_info": True},
        inputs=lambda: {
            **video(),
            "timestep": long(500, 700).unsqueeze(0),
            "fps": long(1),
            "enable_diffusion_forcing": True,
        },
        blocks={"blocks": 3},
    ),
    Entry(
        name="chronoedit",
        module="transformer_chronoedit",
        model_class="ChronoEditTransformer3DModel",
        config={**NORMED, "rope_temporal_skip_len": 8, "image_dim": 8, "added_kv_proj_dim": 24},
        inputs=lambda: {**video(), "timestep": long(500), "encoder_hidden_states_image": x(1, 5, 8)},
        blocks={"blocks": 4},
    ),
    Entry(
        name="anyflow",
        module="transformer_anyflow",
        model_class="AnyFlowTransformer3DModel",
        config={**TINY, "gate_value": 0.25, "deltatime_type": "r"},
        inputs=lambda: {
            **video(),
            "hidden_states": x(1, 2, 4, 4, 4),
            "timestep": t(500.0, 500.0).unsqueeze(0),
            "r_timestep": t(250.0, 250.0).unsqueeze(0),
        },
        blocks={"blocks": 4},
    ),
    Entry(
        name="anyflow-far",
        module="transformer_anyflow_far",
        model_class="AnyFlowFARTransformer3DModel",
        config={
            **TINY,
            "compressed_patch_size": (1, 4, 4),
            "full_chunk_limit": 3,
            "gate_value": 0.25,
            "deltatime_type": "r",
        },
        inputs=lambda: {
            **video(),
            "hidden_states": x(1, 4, 4, 8, 8),
            "timestep": t(500.0, 500.0, 400.0, 400.0).unsqueeze(0),
            "r_timestep": t(250.0, 250.0, 200.0, 200.0).unsqueeze(0),
            "chunk_partition": [2, 2],
        },
        blocks={"blocks": 4},
    ),
    Entry(
        name="helios",
        module="transformer_helios",
        model_class="HeliosTransformer3DModel",
        config={
            **{key: value for key, value in NORMED.items() if key != "rope_max_seq_len"},
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        inputs=helios,
        blocks={"blocks": 4},
    ),
]
