"""Image models that are not of Flux's kind."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Inputs, keep, long, t, x, yes

SD3: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 8,
    "out_channels": 4,
    "pos_embed_max_size": 16,
}


def sd3() -> Inputs:
    """Latents, two kinds of text, a timestep."""
    return {
        "hidden_states": x(1, 4, 4, 4),
        "encoder_hidden_states": x(1, 6, 16),
        "pooled_projections": x(1, 8),
        "timestep": t(500.0),
    }


def square(text: int, tokens: int = 6, batch: int = 1) -> Inputs:
    """Latents, text and a timestep."""
    return {
        "hidden_states": x(batch, 4, 8, 8),
        "encoder_hidden_states": x(batch, tokens, text),
        "timestep": t(*[0.5] * batch),
    }


def sizes() -> Inputs:
    """The sizes that CogView is told."""
    return {
        "original_size": t(64.0, 64.0).unsqueeze(0),
        "target_size": t(64.0, 64.0).unsqueeze(0),
        "crop_coords": t(0.0, 0.0).unsqueeze(0),
    }


BASIC: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 4}
PATCHED: dict[str, Any] = {
    **BASIC,
    "sample_size": 8,
    "patch_size": 2,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
}
COGVIEW: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "out_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 4,
}

ENTRIES = [
    Entry(
        name="sd3",
        module="transformer_sd3",
        model_class="SD3Transformer2DModel",
        config=SD3,
        inputs=sd3,
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="sd3.5",
        module="transformer_sd3",
        model_class="SD3Transformer2DModel",
        config={**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        inputs=sd3,
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="dit",
        module="dit_transformer_2d",
        model_class="DiTTransformer2DModel",
        config={**PATCHED, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 8},
        inputs=lambda: {"hidden_states": x(2, 4, 8, 8), "timestep": long(500, 300), "class_labels": long(0, 3)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="pixart",
        module="pixart_transformer_2d",
        model_class="PixArtTransformer2DModel",
        config={
            **PATCHED,
            "cross_attention_dim": 16,
            "num_embeds_ada_norm": 8,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
            "caption_channels": None,
        },
        inputs=lambda: {
            **square(16, batch=2),
            "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        },
        optional=lambda: {"encoder_attention_mask": keep(2, 6, 5)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="transformer-2d",
        module="transformer_2d",
        model_class="Transformer2DModel",
        config={**BASIC, "norm_num_groups": 1, "cross_attention_dim": 8},
        inputs=lambda: {"hidden_states": x(1, 4, 4, 4), "encoder_hidden_states": x(1, 5, 8)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="transformer-2d-vectorised",
        module="transformer_2d",
        model_class="Transformer2DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "sample_size": 4,
            "num_vector_embeds": 11,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm",
        },
        inputs=lambda: {"hidden_states": torch.arange(16).unsqueeze(0) % 11, "timestep": torch.tensor(500)},
        blocks={"transformer_blocks": 3},
    ),
    Entry(
        name="dreamlite",
        module="transformer_2d_dreamlite",
        model_class="DreamLiteTransformer2DModel",
        config={**BASIC, "norm_num_groups": 1, "cross_attention_dim": 8, "qk_norm": "rms_norm"},
        inputs=lambda: {"hidden_states": x(1, 4, 4, 4), "encoder_hidden_states": x(1, 5, 8)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="dreamlite-cross",  # no self-attention: only the norm of the stream enters a block
        module="transformer_2d_dreamlite",
        model_class="DreamLiteTransformer2DModel",
        config={**BASIC, "norm_num_groups": 1, "cross_attention_dim": 8, "use_self_attention": False},
        inputs=lambda: {"hidden_states": x(1, 4, 4, 4), "encoder_hidden_states": x(1, 5, 8)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="prior",
        module="prior_transformer",
        model_class="PriorTransformer",
        config={**{k: v for k, v in BASIC.items() if k != "in_channels"}, "embedding_dim": 8, "num_embeddings": 6},
        inputs=lambda: {
            "hidden_states": x(2, 8),
            "timestep": 2,
            "proj_embedding": x(2, 8),
            "encoder_hidden_states": x(2, 6, 8),
        },
        optional=lambda: {"attention_mask": keep(2, 6, 5)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="sana",
        module="sana_transformer",
        model_class="SanaTransformer2DModel",
        config={
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        inputs=lambda: square(8),
        optional=lambda: {"encoder_attention_mask": keep(1, 6, 5)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="cogview3",
        module="transformer_cogview3plus",
        model_class="CogView3PlusTransformer2DModel",
        config={**COGVIEW, "pos_embed_max_size": 8, "sample_size": 8},
        inputs=lambda: {**square(8), **sizes()},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="cogview4",
        module="transformer_cogview4",
        model_class="CogView4Transformer2DModel",
        config=COGVIEW,
        inputs=lambda: {**square(8), **sizes()},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="glm-image",
        module="transformer_glm_image",
        model_class="GlmImageTransformer2DModel",
        config={
            **COGVIEW,
            "time_embed_dim": 16,
            "prior_vq_quantizer_codebook_size": 16,
        },
        inputs=lambda: {
            **square(8),
            "prior_token_id": long(3),
            "prior_token_drop": ~yes(1),
            **{key: value for key, value in sizes().items() if key != "original_size"},
        },
        blocks={"transformer_blocks": 4},
    ),
]
