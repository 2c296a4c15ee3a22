"""Whether an autoencoder takes clips whole. Tiles, whose seams change values slightly, are for what does not fit."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

import psutil
import torch

from flcompress.models.alive import Alive
from flcompress.models.garbage import free_gpu_memory

Method = Literal["encode", "decode"]

SMALL: dict[Method, int] = {"encode": 1 << 20, "decode": 1 << 12}
"""Positions (frames x height x width) of what one sample is given as, up to which it is never asked what it takes."""

SPARE = 0.25
"""Share of the free memory that is left for what is not counted: workspaces of convolutions, gaps between tensors."""


def make_room(vae: Any, given: torch.Tensor, method: Method, *more: torch.Tensor) -> None:
    """Have the autoencoder take samples one by one, or in tiles, where `given` [n, channels, ...] would not fit else.

    Args:
        vae: a stock autoencoder; one that knows no tiles stays as it is.
        given: what is encoded or decoded next.
        method: which of the two.
        more: the call's other arguments.
    """
    if not hasattr(vae, "use_tiling") or given[0, 0].numel() <= SMALL[method]:
        return
    config = json.dumps(dict(vae.config), sort_keys=True)
    shapes = tuple((tuple(one[:1].shape), one.dtype) for one in (given, *more))
    one, room = _most_alive(type(vae).__name__, config, method, shapes), (1.0 - SPARE) * _free_bytes(given.device)
    vae.use_slicing = len(given) * one > room
    if one > room:
        vae.enable_tiling()
    else:
        vae.disable_tiling()


@lru_cache(maxsize=64)
def _most_alive(kind: str, config: str, method: Method, shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]) -> int:
    """Bytes of tensors alive at the fullest moment of a call on one sample, counted on tensors that hold no memory."""
    import diffusers
    from torch._subclasses.fake_tensor import FakeTensorMode

    usual = torch.get_default_dtype()
    with FakeTensorMode(), torch.no_grad():
        try:
            torch.set_default_dtype(shapes[0][1])
            twin = getattr(diffusers, kind).from_config(json.loads(config)).eval()
        finally:
            torch.set_default_dtype(usual)
        given = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        alive = Alive()
        with alive:
            getattr(twin, method)(*given)
    return alive.most


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free_gpu_memory()
    return int(torch.cuda.mem_get_info(device)[0])
