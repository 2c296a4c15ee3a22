"""Tiny text and image encoders with their tokenizers, all of stock classes, random weights."""

from __future__ import annotations

from typing import Any

from flcompress.data.blank_pipeline import _tokenizer

WIDTH = 32


def tokenizer(length: int = 16) -> Any:
    """The benchmark's word-level tokenizer; every word it does not know is one token too."""
    made = _tokenizer()
    made.model_max_length = length
    return made


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    words = tokenizer()
    return T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0)
    ).eval()


def umt5(width: int = WIDTH) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer()), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    ).eval()


def clip(*, projection: bool = False, width: int = WIDTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        max_position_embeddings=77,
        bos_token_id=words.eos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=4,
            projection_dim=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            intermediate_size=16,
            patch_size=16,
        )
    ).eval()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer()),
            hidden_size=WIDTH,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
        )
    ).eval()


def qwen() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer()),
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default", "rope_theta": 1e6},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
