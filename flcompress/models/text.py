"""Prompts to embeddings, exactly as the stock pipeline makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def encode_prompts(text_encoder: Any, tokenizer: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
    """Embeddings [prompts, max_sequence_length, channels], zero past a prompt's end, as in WanPipeline."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask.to(text_encoder.device)
    embeds = text_encoder(tokens.input_ids.to(text_encoder.device), mask).last_hidden_state
    return embeds * mask.unsqueeze(-1).to(embeds.dtype)  # type: ignore[no-any-return]
