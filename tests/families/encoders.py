"""Tiny text and image encoders with their tokenizers, all of stock classes, random weights."""

from __future__ import annotations

from typing import Any

from flcompress.moving_digits.blank_pipeline import _tokenizer

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


def llava_tokenizer() -> Any:
    """As LLaVA-Llama-3's: it begins with a token of its own, and knows those of chats and the place of a picture."""
    from tokenizers import normalizers, processors

    made = tokenizer(512)
    made.add_special_tokens(
        {
            "bos_token": "<|begin_of_text|>",
            "additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "\n\n"],
        }
    )
    words = made.backend_tokenizer
    # HunyuanVideo's template counts on its being 103 tokens long, which real ones make of it.
    split = normalizers.Replace("background environment", "back ground environ ment")
    words.normalizer = normalizers.Sequence([split, normalizers.Lowercase()])
    first = ("<|begin_of_text|>", made.bos_token_id)
    words.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[first])
    return made


def llava() -> Any:
    """It makes 576 tokens of a picture, as HunyuanVideo's template has it."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    words = llava_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=8,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        intermediate_size=16,
        patch_size=2,
    )
    text = llama(len(words)).config
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
        pad_token_id=words.pad_token_id,
    )
    return LlavaForConditionalGeneration(config).eval()


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


def llama(words: int | None = None) -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=words or len(tokenizer()),
            hidden_size=WIDTH,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
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
