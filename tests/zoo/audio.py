"""Sound, and the molecules."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Inputs, keep, t, x, yes


def proteina() -> Inputs:
    """A noisy backbone with its latents and what is known of the molecule."""
    return {
        "bb_ca": x(1, 5, 3),
        "local_latents": x(1, 5, 4),
        "bb_ca_time": t(0.3),
        "local_latents_time": t(0.6),
        "padding_mask": yes(1, 5),
        "token_type": torch.zeros(1, 5, dtype=torch.long),
        "conditioning": {"is_in_context_conditioning": ~yes(1, 5), "supports_local_latent": yes(1, 5)},
    }


PROTEINA: dict[str, Any] = {
    "nlayers": 5,
    "token_dim": 16,
    "nheads": 2,
    "dim_cond": 16,
    "pair_repr_dim": 8,
    "latent_dim": 4,
    "token_type_emb_dim": 8,
    "cath_emb_dim": 8,
    "t_emb_dim": 16,
    "xt_pair_dist_dim": 6,
    "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
    "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
    "feats_pair_repr": ("xt_bb_ca_pair_dists",),
    "update_pair_repr_every_n": 2,
    "tri_mult_c": 8,
}

STABLE_AUDIO_3: dict[str, Any] = {
    "io_channels": 8,
    "patch_size": 1,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "cond_token_dim": 16,
    "global_cond_dim": 12,
    "local_add_cond_dim": 5,
    "timestep_features_dim": 16,
    "ff_mult": 2,
    "num_memory_tokens": 3,
    "use_differential_attention": False,
}


def stable_audio_3() -> Inputs:
    """Channels before time."""
    return {
        "hidden_states": x(2, 8, 10),
        "timestep": t(0.3, 0.6),
        "encoder_hidden_states": x(2, 4, 16),
        "global_hidden_states": x(2, 12),
    }


ENTRIES = [
    Entry(
        name="ace-step",  # attention alternates between sliding and full, by index
        module="ace_step_transformer",
        model_class="AceStepTransformer1DModel",
        config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "sliding_window": 4,
        },
        inputs=lambda: {
            "hidden_states": x(2, 12, 8),
            "timestep": t(0.3, 0.6),
            "timestep_r": t(0.2, 0.5),
            "encoder_hidden_states": x(2, 6, 32),
            "context_latents": x(2, 12, 16),
        },
        blocks={"layers": 4},
    ),
    Entry(
        name="stable-audio",
        module="stable_audio_transformer",
        model_class="StableAudioDiTModel",
        config={
            "sample_size": 4,
            "in_channels": 3,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 3,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 4,
        },
        inputs=lambda: {
            "hidden_states": x(2, 3, 4),
            "timestep": t(0.3, 0.6),
            "encoder_hidden_states": x(2, 5, 4),
            "global_hidden_states": x(2, 1, 8),
            "rotary_embedding": (torch.ones(5, 4), torch.zeros(5, 4)),
        },
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="stable-audio-3",
        module="transformer_stable_audio3",
        model_class="StableAudio3DiTModel",
        config=STABLE_AUDIO_3,
        inputs=stable_audio_3,
        optional=lambda: {"local_add_cond": x(2, 5, 10)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="stable-audio-3-differential",
        module="transformer_stable_audio3",
        model_class="StableAudio3DiTModel",
        config={**STABLE_AUDIO_3, "depth": 3, "use_differential_attention": True},
        inputs=stable_audio_3,
        blocks={"transformer_blocks": 3},
    ),
    Entry(
        name="longcat-audio",
        module="transformer_longcat_audio_dit",
        model_class="LongCatAudioDiTTransformer",
        config={"dit_dim": 32, "dit_depth": 4, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 8, "text_conv": False},
        inputs=lambda: {
            "hidden_states": x(1, 9, 8),
            "encoder_hidden_states": x(1, 6, 16),
            "encoder_attention_mask": keep(1, 6, 5),
            "attention_mask": keep(1, 9, 8),
            "timestep": t(0.5),
        },
        optional=lambda: {"latent_cond": x(1, 9, 8)},
        blocks={"blocks": 4},
    ),
    Entry(
        name="minimax-music-3",
        module="transformer_minimax_music3",
        model_class="MiniMaxMusic3Transformer1DModel",
        config={
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        inputs=lambda: {"hidden_states": x(1, 8, 10), "encoder_hidden_states": x(1, 10, 16), "timestep": t(0.5)},
        blocks={"transformer_blocks": 4},
    ),
    Entry(
        name="minimax-music-3-rvq",
        module="minimax_music3_rvq_depth_decoder",
        model_class="MiniMaxMusic3RVQDepthDecoder",
        config={
            "hidden_size": 16,
            "num_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "audio_vocab_size": 11,
            "num_codebooks": 4,
            "max_position_embeddings": 8,
        },
        inputs=lambda: {"inputs_embeds": x(2, 4, 16)},
        blocks={"layers": 4},
    ),
    Entry(
        name="t5-film",
        module="t5_film_transformer",
        model_class="T5FilmDecoder",
        config={
            "input_dims": 8,
            "targets_length": 8,
            "d_model": 16,
            "num_layers": 4,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 24,
        },
        inputs=lambda: {
            "encodings_and_masks": [(x(1, 5, 16), torch.ones(1, 5))],
            "decoder_input_tokens": x(1, 8, 8),
            "decoder_noise_time": t(0.5),
        },
        blocks={"decoders": 4},
    ),
    Entry(
        name="rfd4-proteina",  # pair updates lie between the layers, after every second
        module="transformer_rfd4_proteina",
        model_class="RFD4ProteinaTransformer",
        config=PROTEINA,
        inputs=proteina,
        blocks={"transformer_layers": 5},
    ),
]
