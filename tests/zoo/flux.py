"""Flux and its kin: two stacks, packed latents, position ids."""

from __future__ import annotations

from typing import Any

from tests.zoo.entry import Entry, Inputs, ids, keep, t, x

DOUBLE = {"transformer_blocks": 3, "single_transformer_blocks": 3}
TINY: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 3,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}


def packed(axes: int = 3, width: int = 16) -> Inputs:
    """Packed latents and text with their position ids."""
    return {
        "hidden_states": x(1, 8, 4),
        "encoder_hidden_states": x(1, 6, width),
        "img_ids": ids(8, axes),
        "txt_ids": ids(6, axes) * 0,
        "timestep": t(0.5),
    }


ENTRIES = [
    Entry(
        name="flux",
        module="transformer_flux",
        model_class="FluxTransformer2DModel",
        config={**TINY, "pooled_projection_dim": 8},
        inputs=lambda: {**packed(), "pooled_projections": x(1, 8)},
        blocks=DOUBLE,
    ),
    Entry(
        name="flux-guided",
        module="transformer_flux",
        model_class="FluxTransformer2DModel",
        config={**TINY, "num_layers": 2, "num_single_layers": 4, "pooled_projection_dim": 8, "guidance_embeds": True},
        inputs=lambda: {**packed(), "pooled_projections": x(1, 8), "guidance": t(3.5)},
        blocks={"transformer_blocks": 2, "single_transformer_blocks": 4},
    ),
    Entry(
        name="flux2",
        module="transformer_flux2",
        model_class="Flux2Transformer2DModel",
        config={**TINY, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        inputs=lambda: {
            **packed(),
            "img_ids": ids(8, 4).long().unsqueeze(0),
            "txt_ids": ids(6, 4).long().unsqueeze(0),
            "guidance": t(3.5),
        },
        blocks=DOUBLE,
    ),
    Entry(
        name="flux3",
        module="transformer_flux3",
        model_class="Flux3Transformer2DModel",
        config={
            **{key: value for key, value in TINY.items() if key != "patch_size"},
            "cond_in_channels": 4,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        inputs=lambda: {**packed(axes=4), "image_cond_hidden_states": x(1, 5, 4), "image_cond_ids": ids(5, 4) + 1},
        blocks={
            "mode_blocks.image": 3,
            "mode_blocks.image_cond": 3,
            "txt_mode_blocks": 3,
            "single_transformer_blocks": 3,
        },
    ),
    Entry(
        name="bria",
        module="transformer_bria",
        model_class="BriaTransformer2DModel",
        config={**TINY, "attention_head_dim": 8, "axes_dims_rope": (0, 4, 4), "pooled_projection_dim": None},
        inputs=packed,
        blocks=DOUBLE,
    ),
    Entry(
        name="bria-fibo",  # one text layer a block, with its own projection
        module="transformer_bria_fibo",
        model_class="BriaFiboTransformer2DModel",
        config={
            **TINY,
            "attention_head_dim": 8,
            "axes_dims_rope": (0, 4, 4),
            "text_encoder_dim": 8,
            "pooled_projection_dim": None,
        },
        inputs=lambda: {**packed(), "text_encoder_layers": [x(1, 6, 8) for _ in range(6)]},
        blocks=DOUBLE,
    ),
    Entry(
        name="bria-fibo-2",
        module="transformer_bria_fibo2",
        model_class="BriaFibo2Transformer2DModel",
        config={
            "in_channels": 4,
            "patch_size": 2,
            "dim": 16,
            "n_layers": 4,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "cap_feat_dim": 8,
            "injection_layer_ids": (1, 3),
            "perceiver_num_layers": 2,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 32,
            "axes_dims": (4, 2, 2),
            "axes_lens": (32, 16, 16),
        },
        inputs=lambda: {"hidden_states": x(1, 4, 4, 4), "timestep": t(0.5), "encoder_hidden_states": x(1, 3, 6, 8)},
        blocks={"noise_refiner": 2, "perceiver.layers": 2, "layers": 4},
    ),
    Entry(
        name="chroma",
        module="transformer_chroma",
        model_class="ChromaTransformer2DModel",
        config={
            **TINY,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
        inputs=packed,
        optional=lambda: {"attention_mask": keep(1, 14, 12)},
        blocks=DOUBLE,
    ),
    Entry(
        name="longcat-image",
        module="transformer_longcat_image",
        model_class="LongCatImageTransformer2DModel",
        config={**TINY, "pooled_projection_dim": 8},
        inputs=lambda: {**packed(), "guidance": t(3.5)},
        blocks=DOUBLE,
    ),
    Entry(
        name="ovis-image",
        module="transformer_ovis_image",
        model_class="OvisImageTransformer2DModel",
        config={**TINY, "out_channels": 4},
        inputs=packed,
        blocks=DOUBLE,
    ),
    Entry(
        name="auraflow",
        module="auraflow_transformer_2d",
        model_class="AuraFlowTransformer2DModel",
        config={
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 3,
            "num_single_dit_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pos_embed_max_size": 64,
        },
        inputs=lambda: {
            "hidden_states": x(2, 4, 8, 8),
            "encoder_hidden_states": x(2, 6, 16),
            "timestep": t(0.3, 0.8),
        },
        blocks={"joint_transformer_blocks": 3, "single_transformer_blocks": 3},
    ),
]
