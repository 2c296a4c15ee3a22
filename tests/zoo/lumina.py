"""Lumina, Z-Image, Qwen-Image and other single-stream image models."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Inputs, ids, keep, t, x, yes

QWEN: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}
Z_IMAGE: dict[str, Any] = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 4,
    "dim": 16,
    "n_layers": 4,
    "n_refiner_layers": 2,
    "n_heads": 1,
    "n_kv_heads": 1,
    "cap_feat_dim": 8,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 32, 32],
}
LUMINA: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 4,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
}


def qwen() -> Inputs:
    """Packed latents and the shape they had."""
    return {
        "hidden_states": x(1, 16, 16),
        "encoder_hidden_states": x(1, 6, 16),
        "encoder_hidden_states_mask": keep(1, 6, 5).long(),
        "timestep": t(0.5),
        "img_shapes": [(1, 4, 4)],
    }


JOY: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 4,
    "rope_dim_list": [4, 6, 6],
}

ENTRIES = [
    Entry(
        name="lumina-next",
        module="lumina_nextdit2d",
        model_class="LuminaNextDiT2DModel",
        config={**LUMINA, "multiple_of": 16, "learn_sigma": False, "cross_attention_dim": 16},
        inputs=lambda: {
            "hidden_states": x(2, 4, 8, 8),
            "encoder_hidden_states": x(2, 6, 16),
            "timestep": t(0.3, 0.6),
            "encoder_mask": keep(2, 6, 5).float(),
            "image_rotary_emb": torch.polar(torch.ones(16, 16, 4), x(16, 16, 4)),
            "cross_attention_kwargs": {},
        },
        blocks={"layers": 4},
    ),
    Entry(
        name="lumina-2",
        module="transformer_lumina2",
        model_class="Lumina2Transformer2DModel",
        config={
            **LUMINA,
            "num_refiner_layers": 2,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 16,
        },
        inputs=lambda: {
            "hidden_states": x(2, 4, 8, 8),
            "encoder_hidden_states": x(2, 6, 16),
            "timestep": t(0.3, 0.6),
            "encoder_attention_mask": yes(2, 6),
        },
        blocks={"noise_refiner": 2, "context_refiner": 2, "layers": 4},
    ),
    Entry(
        name="z-image",
        module="transformer_z_image",
        model_class="ZImageTransformer2DModel",
        config=Z_IMAGE,
        inputs=lambda: {"x": [x(4, 1, 8, 8)], "cap_feats": [x(6, 8)], "t": t(0.5)},
        blocks={"noise_refiner": 2, "context_refiner": 2, "layers": 4},
    ),
    Entry(
        name="qwen-image",
        module="transformer_qwenimage",
        model_class="QwenImageTransformer2DModel",
        config=QWEN,
        inputs=qwen,
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="qwen-image-edit",  # the condition image is modulated from timestep zero
        module="transformer_qwenimage",
        model_class="QwenImageTransformer2DModel",
        config={**QWEN, "num_layers": 3, "zero_cond_t": True},
        inputs=lambda: {**qwen(), "hidden_states": x(1, 20, 16), "img_shapes": [[(1, 4, 4), (1, 2, 2)]]},
        blocks={"transformer_blocks": 3},
    ),
    Entry(
        name="qwen-image-2.1",
        module="transformer_qwenimage21",
        model_class="QwenImage21Transformer2DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        inputs=lambda: {
            "hidden_states": x(1, 16, 4),
            "encoder_hidden_states": x(1, 6, 16),
            "timestep": t(0.5),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.arange(10).unsqueeze(0) >= 6,
        },
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="nucleus-moe",  # one capacity factor a block
        module="transformer_nucleusmoe_image",
        model_class="NucleusMoEImageTransformer2DModel",
        config={**QWEN, "moe_enabled": False, "capacity_factors": [8.0, 8.0, 8.0, 8.0]},
        inputs=qwen,
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="ernie-image",
        module="transformer_ernie_image",
        model_class="ErnieImageTransformer2DModel",
        config={
            "hidden_size": 16,
            "num_attention_heads": 1,
            "num_layers": 4,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_axes_dim": (8, 4, 4),
        },
        inputs=lambda: {
            "hidden_states": x(1, 4, 4, 4),
            "timestep": t(0.5),
            "text_bth": x(1, 6, 16),
            "text_lens": torch.tensor([6]),
        },
        blocks={"layers": 4},
    ),
    Entry(
        name="ideogram-4",
        module="transformer_ideogram4",
        model_class="Ideogram4Transformer2DModel",
        config={
            "in_channels": 8,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (2, 1, 1),
        },
        inputs=lambda: {
            "hidden_states": x(1, 8, 8),
            "encoder_hidden_states": x(1, 8, 24),
            "timestep": t(0.5),
            "position_ids": ids(8, 3).long().unsqueeze(0),
            "segment_ids": torch.ones(1, 8, dtype=torch.long),
            "indicator": torch.tensor([[3, 3, 3, 3, 2, 2, 2, 2]]),
        },
        blocks={"layers": 4},
    ),
    Entry(
        name="joy-image-edit",
        module="transformer_joyimage",
        model_class="JoyImageEditTransformer3DModel",
        config=JOY,
        inputs=lambda: {
            "hidden_states": x(1, 4, 1, 4, 4),
            "encoder_hidden_states": x(1, 6, 16),
            "timestep": t(500.0),
        },
        blocks={"double_blocks": 4},
    ),
    Entry(
        name="joy-image-edit-plus",
        module="transformer_joyimage_edit_plus",
        model_class="JoyImageEditPlusTransformer3DModel",
        config=JOY,
        inputs=lambda: {
            "hidden_states": x(1, 2, 4, 1, 2, 2),
            "encoder_hidden_states": x(1, 6, 16),
            "timestep": t(500.0),
            "shape_list": [[(1, 1, 1), (1, 1, 1)]],
        },
        blocks={"double_blocks": 4},
    ),
    Entry(
        name="krea-2",
        module="transformer_krea2",
        model_class="Krea2Transformer2DModel",
        config={
            "in_channels": 8,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2,
            "axes_dims_rope": (4, 2, 2),
        },
        inputs=lambda: {
            "hidden_states": x(1, 4, 8),
            "encoder_hidden_states": x(1, 4, 3, 16),
            "timestep": t(0.5),
            "position_ids": ids(8, 3),
            "encoder_attention_mask": keep(1, 4, 3),
        },
        blocks={"text_fusion.layerwise_blocks": 2, "text_fusion.refiner_blocks": 2, "transformer_blocks": 4},
    ),
]
