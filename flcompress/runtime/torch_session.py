"""A stock transformer run by torch, eagerly or through torch.compile."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from flcompress.diffusion.network import Conditioning, to_device
from flcompress.errors import UnavailableError
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network, compile_blocks, half_precision, missing_compiler
from flcompress.tracing.counting import listed_blocks


def best_device() -> str:
    """Return the device that torch computes on: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_compiler(device: str) -> None:
    """Raise UnavailableError where torch.compile cannot compile: on a CPU without C++ compiler or Python's headers."""
    if device == "cpu" and (missing := missing_compiler()):
        raise UnavailableError(f"backend compile: {missing}")


class TorchSession:
    """A stock transformer run by torch, eagerly or through torch.compile; a `Network`.

    On a GPU it computes in bf16, as stock pipelines are run there, on a CPU in fp32.

    Attributes:
        transformer: the stock transformer.
        precision: "bf16" or "fp32".
        device: "cuda" or "cpu".
    """

    def __init__(self, folder: Path, device: str, guidance: float | None = None) -> None:
        """Load the transformer.

        Args:
            folder: the transformer's.
            device: what runs it.
            guidance: embedded guidance scale, where the network takes one; the family's usual one where None.
        """
        self.device, self._half = device, device == "cuda"
        self.precision = "bf16" if self._half else "fp32"
        self._guidance = guidance
        self._set(load_transformer(folder, device, torch.bfloat16 if self._half else None))

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict; the answer is on the device of `x` [n, channels, frames, height, width], in its dtype."""
        device = self.device
        with half_precision(device, enabled=self._half):
            return self._network(x.to(device), timestep.to(device), to_device(conditioning, device)).to(x)

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
