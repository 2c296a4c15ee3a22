"""QwenImage: an image model with packed latents and a masked language-model prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from flcompress.diffusion.network import Conditioning
from flcompress.models.families.conversions import normal, pack, pad_tokens
from flcompress.models.families.family import ClipSize, Compression, Config, LatentShape
from flcompress.models.families.shared import PackedImage


class QwenImage(PackedImage):
    """QwenImage.

    For an export the complex rotary tables, which its module `pos_embed` cuts to the sizes in `img_shapes`, are the
    inputs `image_rotary_emb.0` (for the image's tokens) and `.1` (for the text's), each
    [tokens, channels of a head / 2, 2]: cos and sin.
    """

    name: ClassVar[str] = "QwenImage"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("QwenImageTransformer2DModel",)
    masks_attention: ClassVar[bool] = True
    prompt_names: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "encoder_hidden_states_mask")
    fp32_arguments: ClassVar[tuple[str, ...]] = ("timestep", "guidance", "image_rotary_emb")

    @override
    def arguments(
        self,
        config: Config,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        return {
            "hidden_states": pack(x),
            "timestep": timestep / 1000.0,
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
            "encoder_hidden_states_mask": conditioning["encoder_hidden_states_mask"],
            "img_shapes": [[(1, x.shape[3] // 2, x.shape[4] // 2)]] * len(x),
        }

    @override
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, tokens, dtype=torch.long)
        mask[:, tokens - tokens // 4 :] = 0  # padding, as most prompts have
        return {
            "encoder_hidden_states": normal(draw, batch, tokens, config["joint_attention_dim"]),
            "encoder_hidden_states_mask": mask,
        }

    @override
    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        embeds, mask = pipeline.encode_prompt(
            list(prompts), max_sequence_length=length, device=pipeline.text_encoder.device
        )
        if mask is None:  # the pipeline omits a mask that masks nothing
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {
            "encoder_hidden_states": pad_tokens(embeds, length),
            "encoder_hidden_states_mask": pad_tokens(mask.long(), length),
        }

    @override
    def compression(self, autoencoder: Config) -> Compression:
        return 1, 2 ** len(autoencoder["temperal_downsample"])

    @override
    def usual(self, config: Config) -> tuple[Compression, ClipSize]:
        return (1, 8), ClipSize(height=1024, width=1024, frames=1, tokens=512)

    @override
    def export_arguments(self, config: Config, arguments: Mapping[str, Any]) -> dict[str, Any]:
        tensors = dict(arguments)
        text, x = tensors["encoder_hidden_states"].shape[1], tensors["hidden_states"]
        sizes = tensors["img_shapes"] if config.get("zero_cond_t") else tensors.pop("img_shapes")
        make = _rotary_tables(tuple(config["axes_dims_rope"]), bool(config.get("use_layer3d_rope")))
        tables = make(sizes, max_txt_seq_len=text, device=torch.device("cpu"))
        tensors["image_rotary_emb"] = tuple(torch.view_as_real(table).to(x.device) for table in tables)
        return tensors

    @override
    def take_export_arguments(self, transformer: Any) -> None:
        if not isinstance(transformer.pos_embed, RotaryInputs):
            RotaryInputs().attach(transformer)


class RotaryInputs(nn.Module):
    """The stock `pos_embed`'s substitute: returns the tables that the transformer was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: tuple[Tensor, ...] | None = None

    def attach(self, transformer: Any) -> None:
        """Put this module in place of a transformer's `pos_embed`, and have its forward take `image_rotary_emb`."""
        transformer.pos_embed = self
        transformer.register_forward_pre_hook(self._receive, with_kwargs=True)
        transformer.register_forward_hook(self._forget, always_call=True)

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Return this call's complex tables [tokens, channels of a head / 2], the image's and the text's."""
        if self.tables is None:
            raise RuntimeError("image_rotary_emb was not given to the transformer")
        return tuple(torch.view_as_complex(table) for table in self.tables)

    def _receive(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.tables = kwargs.pop("image_rotary_emb", None)
        return args, kwargs

    def _forget(self, *_: Any) -> None:
        self.tables = None


@lru_cache(maxsize=1)
def _rotary_tables(axes: tuple[int, ...], layered: bool) -> nn.Module:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedLayer3DRope, QwenEmbedRope

    make = QwenEmbedLayer3DRope if layered else QwenEmbedRope
    return make(theta=10000, axes_dim=list(axes), scale_rope=True)  # type: ignore[no-any-return]
