"""HunyuanVideo's own attention with a switch for its mask, which the stock forward builds whatever it is given."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from typing_extensions import override

from flcompress.errors import RequestError
from flcompress.models.families.unmasked import MaskSwitch


class UnmaskedAttention(HunyuanVideoAttnProcessor2_0):  # type: ignore[misc]
    """The stock processor of a block; without the mask where its transformer's switch says so."""

    def __init__(self, switch: MaskSwitch) -> None:
        super().__init__()
        self.switch = switch

    @override
    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        mask = None if self.switch.absent else attention_mask
        if mask is not None and self._attention_backend == AttentionBackendName._NATIVE_FLASH:
            raise RequestError(
                "training.attention: flash given, but the prompt's mask has a gap or prompts of different lengths are "
                "in one forward, which flash attention cannot; set training.micro_batch: 1, or attention to native"
            )
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def mask_switch(transformer: Any) -> MaskSwitch:
    """Return the one switch of a transformer's masks; the first call replaces the processors of its blocks."""
    modules = [module for module in transformer.modules() if hasattr(module, "processor")]
    ours = (module.processor for module in modules if isinstance(module.processor, UnmaskedAttention))
    switch = next((processor.switch for processor in ours), None) or MaskSwitch()
    for module in modules:
        stock = module.processor
        if type(stock) is HunyuanVideoAttnProcessor2_0:
            own = UnmaskedAttention(switch)
            own.__dict__.update(vars(stock))  # the chosen kernel
            module.set_processor(own)
    return switch
