"""Sizes that a stock forward takes as numbers, as tensors: an exported graph is of any size then.

A number becomes part of a graph, a tensor is an input of it. LTX takes the number of frames, height and width, from
which it makes positions; its forward takes positions too, `video_coords`. QwenImage takes `img_shapes`, from which its
module `pos_embed` cuts complex rotary tables; they become the inputs `image_rotary_emb.0` (of the image's tokens) and
`.1` (of the text's), each [tokens, channels of a head / 2, 2]: cos and sin.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


def with_positions(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The forward's arguments with tensors in place of sizes.

    Args:
        config: the transformer's.
        arguments: as its family makes them.
    """
    given = dict(arguments)
    if config["_class_name"] == "LTXVideoTransformer3DModel":
        shape = [given.pop(name) for name in ("num_frames", "height", "width")]
        patches = (config["patch_size_t"], config["patch_size"], config["patch_size"])
        scales = zip(given.pop("rope_interpolation_scale"), patches, strict=True)
        places = torch.meshgrid(*(torch.arange(count, dtype=torch.float32) for count in shape), indexing="ij")
        coords = torch.stack([one * scale * patch for one, (scale, patch) in zip(places, scales, strict=True)])
        x = given["hidden_states"]
        given["video_coords"] = coords.flatten(1).expand(len(x), -1, -1).contiguous().to(x.device)
    elif config["_class_name"] == "QwenImageTransformer2DModel":
        text, x = given["encoder_hidden_states"].shape[1], given["hidden_states"]
        sizes = given["img_shapes"] if config.get("zero_cond_t") else given.pop("img_shapes")
        make = _qwen_tables(tuple(config["axes_dims_rope"]), bool(config.get("use_layer3d_rope")))
        tables = make(sizes, max_txt_seq_len=text, device=torch.device("cpu"))
        given["image_rotary_emb"] = tuple(torch.view_as_real(one).to(x.device) for one in tables)
    return given


@lru_cache(maxsize=1)
def _qwen_tables(axes: tuple[int, ...], layered: bool) -> nn.Module:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedLayer3DRope, QwenEmbedRope

    make = QwenEmbedLayer3DRope if layered else QwenEmbedRope
    return make(theta=10000, axes_dim=list(axes), scale_rope=True)  # type: ignore[no-any-return]


class GivenTables(nn.Module):
    """In place of QwenImage's `pos_embed`: answers with the tables that it was handed for this call."""

    def __init__(self) -> None:
        super().__init__()
        self.given: tuple[Tensor, ...] | None = None

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        if self.given is None:
            raise RuntimeError("image_rotary_emb was not given; Denoiser hands it over")
        return tuple(torch.view_as_complex(one) for one in self.given)


def take_tables(transformer: Any) -> GivenTables | None:
    """The module that hands rotary tables to a transformer that would make them itself, put in place; or None."""
    if type(transformer).__name__ != "QwenImageTransformer2DModel":
        return None
    transformer.pos_embed = GivenTables()
    return transformer.pos_embed  # type: ignore[no-any-return]
