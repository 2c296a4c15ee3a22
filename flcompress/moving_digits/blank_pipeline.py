"""Write the configurations of the benchmark's teacher: a stock `WanPipeline` folder without weights.

`python -m flcompress.moving_digits.blank_pipeline FOLDER` writes it; a recipe with `weights: random` starts from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from flcompress.moving_digits import digits

TEXT_CHANNELS = 64


def write_blank(
    folder: Path, *, layers: int = 16, heads: int = 6, feed_forward: int = 400, vae_channels: int = 8
) -> None:
    """Write the folder.

    Args:
        folder: the folder; created if missing.
        layers: transformer blocks.
        heads: attention heads of 16 channels each.
        feed_forward: hidden width of the feed-forward parts.
        vae_channels: base width of the autoencoder.
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from transformers import UMT5Config

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT_CHANNELS,
            freq_dim=64,
            ffn_dim=feed_forward,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )
        vae = AutoencoderKLWan(
            base_dim=vae_channels,
            decoder_base_dim=vae_channels,
            z_dim=16,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True, True],
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
            scale_factor_spatial=4,
            scale_factor_temporal=4,
        )
    transformer.save_config(str(folder / "transformer"))
    vae.save_config(str(folder / "vae"))
    UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_CHANNELS,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        is_encoder_decoder=False,
        architectures=["UMT5EncoderModel"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(str(folder / "text_encoder"))
    FlowMatchEulerDiscreteScheduler().save_pretrained(str(folder / "scheduler"))
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.39.0",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tokenizer() -> Any:
    """Return a word-level tokenizer of the benchmark's vocabulary: one token per word, then the end token, as in T5."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    texts = [caption.text for split in ("train", "heldout") for caption in digits.captions(split)]
    words = sorted({word for text in texts for word in text.replace(",", " , ").split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


if __name__ == "__main__":
    write_blank(Path(sys.argv[1]))
