"""A stock transformer run by torch, eagerly or through torch.compile."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch

from flcompress.diffusion.network import Conditioning, to_device
from flcompress.errors import UnavailableError
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network, compile_blocks, missing_compiler
from flcompress.tracing.counting import listed_blocks


def best_device() -> str:
    """Return the device that torch computes on: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


TorchPrecision = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[TorchPrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def require_precision(precision: TorchPrecision, device: str) -> None:
    """Raise UnavailableError where the GPU lacks a precision that was asked for, which torch would emulate slowly."""
    if precision == "bf16" and device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        raise UnavailableError(
            f"--precision: bf16 given, but {torch.cuda.get_device_name()} (sm{major}{minor}) has none; use --precision "
            "fp16 or fp32"
        )


def require_compiler(device: str) -> None:
    """Raise UnavailableError where torch.compile cannot compile: on a CPU without C++ compiler or Python's headers."""
    if device == "cpu" and (missing := missing_compiler()):
        raise UnavailableError(f"backend compile: {missing}")


class TorchSession:
    """A stock transformer run by torch, eagerly or through torch.compile; a `Network`.

    On a GPU it computes in bf16 by default, as stock pipelines are run there, on a CPU in fp32.

    Attributes:
        transformer: the stock transformer.
        precision: what it computes in.
        device: "cuda" or "cpu".
    """

    def __init__(
        self, folder: Path, device: str, guidance: float | None = None, precision: TorchPrecision | None = None
    ) -> None:
        """Load the transformer.

        Args:
            folder: the transformer's.
            device: what runs it.
            guidance: embedded guidance scale, where the network takes one; the family's usual one where None.
            precision: what it computes in; bf16 and fp16 hold the weights so too, but for what the class keeps in fp32.
        """
        self.device, self.precision = device, precision or ("bf16" if device == "cuda" else "fp32")
        self._guidance = guidance
        self._set(load_transformer(folder, device, DTYPES[self.precision] if self._half else None))

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict; the answer is on the device of `x` [n, channels, frames, height, width], in its dtype."""
        device = self.device
        return self._network(x.to(device), timestep.to(device), to_device(conditioning, device)).to(x)

    @property
    def _half(self) -> bool:
        return self.precision != "fp32"

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and buffers."""
        tensors = (*self.transformer.parameters(), *self.transformer.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def compiled(self) -> TorchSession:
        """Return a session of the same weights, in memory once, whose blocks are compiled."""
        shared = (*self.transformer.parameters(), *self.transformer.buffers())
        session = copy.copy(self)
        session._set(copy.deepcopy(self.transformer, {id(tensor): tensor for tensor in shared}))
        compile_blocks(session.transformer, listed_blocks(session.transformer))
        return session

    def _set(self, transformer: Any) -> None:
        self.transformer, self._network = transformer, as_network(transformer, self._guidance)
