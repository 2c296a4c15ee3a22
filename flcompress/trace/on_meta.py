"""What forwards of stock models need to run on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as meta_masks


@contextmanager
def runnable_on_meta(model: nn.Module) -> Iterator[None]:
    """For a weightless model, two things that PyTorch refuses on the meta device do what is right for counting.

    `torch.autocast("meta")` does nothing: Mochi and others ask for it on the device of their input, and without numbers
    there is nothing to cast. `torch.nonzero` takes every entry of a mask for set: a prompt without padding.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield
        return
    stock: Any = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else stock(device_type, *args, **kwargs)

    torch.autocast = autocast  # type: ignore[assignment,misc]
    try:
        with meta_masks.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
            yield
    finally:
        torch.autocast = stock  # type: ignore[misc]
