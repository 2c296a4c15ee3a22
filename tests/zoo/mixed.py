"""HiDream, OmniGen and PRX."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, keep, t, x
from tests.zoo.image import square

HIDREAM: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_channels": [8, 4],
    "text_emb_dim": 8,
    "num_routed_experts": 2,
    "num_activated_experts": 2,
    "axes_dims_rope": (4, 2, 2),
    "max_resolution": (16, 16),
    "llama_layers": (0, 1, 2, 3, 4, 5),
    "force_inference_output": True,
}

ENTRIES = [
    Entry(
        name="hidream",  # one Llama layer a block, given by its index
        module="transformer_hidream_image",
        model_class="HiDreamImageTransformer2DModel",
        config=HIDREAM,
        inputs=lambda: {
            "hidden_states": x(1, 4, 8, 8),
            "encoder_hidden_states_t5": x(1, 5, 8),
            "encoder_hidden_states_llama3": x(6, 1, 5, 4),
            "pooled_embeds": x(1, 8),
            "timesteps": t(500.0),
        },
        blocks={"double_stream_blocks": 3, "single_stream_blocks": 3},
    ),
    Entry(
        name="omnigen",
        module="transformer_omnigen",
        model_class="OmniGenTransformer2DModel",
        config={
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 4,
            "pad_token_id": 0,
            "vocab_size": 20,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        inputs=lambda: {
            "hidden_states": x(1, 4, 4, 4),
            "timestep": t(0.5),
            "input_ids": torch.arange(6).unsqueeze(0),
            "input_img_latents": [x(1, 4, 4, 4)],
            "input_image_sizes": {0: [[0, 4]]},
            "attention_mask": torch.ones(1, 11, 11),
            "position_ids": torch.arange(11).unsqueeze(0),
        },
        blocks={"layers": 4},
    ),
    Entry(
        name="prx",
        module="transformer_prx",
        model_class="PRXTransformer2DModel",
        config={
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 8,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 4,
            "axes_dim": [4, 4],
        },
        inputs=lambda: square(8),
        optional=lambda: {"attention_mask": keep(1, 6, 5)},
        blocks={"blocks": 4},
    ),
]
