"""CogVideoX's sine positions (2B: neither rotary nor learned) for an export: of any size, nothing filled in place.

The stock module keeps a table of its configuration's size, asks whether the clip has it, and else makes one in fp64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor


def free(module: Any) -> None:
    """Rewrite, in place, a `CogVideoXPatchEmbed`; leave any other module as it is."""
    if type(module).__name__ != "CogVideoXPatchEmbed":
        return
    module._get_positional_embeddings = partial(positions, module)
    if not module.use_learned_positional_embeddings:  # no clip has that size: never the table
        module.sample_height = module.sample_width = module.sample_frames = -1


def positions(module: Any, height: int, width: int, frames: int, device: torch.device | None = None) -> Tensor:
    """[1, text and clip tokens, channels], zero for the text, as `CogVideoXPatchEmbed._get_positional_embeddings`."""
    times = (frames - 1) // module.temporal_compression_ratio + 1
    rows, columns = height // module.patch_size, width // module.patch_size
    over_time, over_space = module.embed_dim // 4, 3 * module.embed_dim // 8
    axes = (
        sines(over_time, times, module.temporal_interpolation_scale, device)[:, None, None],
        sines(over_space, columns, module.spatial_interpolation_scale, device)[None, None],
        sines(over_space, rows, module.spatial_interpolation_scale, device)[None, :, None],
    )
    clip = torch.cat([one.expand(times, rows, columns, -1) for one in axes], dim=-1).flatten(0, 2)[None]
    return torch.cat([clip.new_zeros(1, module.max_text_seq_length, module.embed_dim), clip], dim=1)


def sines(channels: int, count: int, scale: float, device: torch.device | None) -> Tensor:
    """Sine, then cosine, of 0, 1/scale ... (count - 1)/scale at falling frequencies: [count, channels], fp32."""
    frequencies = 10000.0 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
    angles = (torch.arange(count, device=device) / scale)[:, None] * frequencies.float().to(device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
