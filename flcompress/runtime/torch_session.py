"""A stock transformer run by torch, eagerly or through torch.compile."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flcompress.diffusion.network import Conditioning, to_device
from flcompress.errors import RequestError, UnavailableError
from flcompress.models.loading import frozen, load_transformer, meta_transformer, transformer_class
from flcompress.models.network import as_network, compile_blocks, missing_compiler
from flcompress.models.part_check import check_loaded, check_quantized, is_quantized
from flcompress.models.shards import folder_tensors
from flcompress.models.stock import no_progress_bars
from flcompress.tracing.counting import listed_blocks
from flcompress.tracing.self_attention import frame_local_network

TORCHAO = 0, 18
"""The lowest version of torchao whose quantised weights stock diffusers loads from safetensors here."""


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


def require_torchao(what: str) -> None:
    """Raise UnavailableError where torchao is missing or too old, which quantised weights need.

    Args:
        what: needs it, for the message.
    """
    if importlib.util.find_spec("torchao") is None:
        state = "is not installed"
    elif tuple(map(int, (here := importlib.metadata.version("torchao")).split(".")[:2])) < TORCHAO:
        state = f"{here} is installed, expected {'.'.join(map(str, TORCHAO))} or newer"
    else:
        return
    raise UnavailableError(
        f"{what}: torchao, which quantised weights need, {state}; pip install 'flcompress[quantize]'"
    )


def require_quantized(folder: Path, device: str, precision: TorchPrecision | None) -> None:
    """Raise RequestError where a transformer of quantised weights cannot run as asked; nothing if it has none.

    Args:
        folder: the transformer's.
        device: what is to run it.
        precision: what it is to compute in, where that was asked for.
    """
    if not is_quantized(folder):
        return
    require_torchao(str(folder))
    if precision not in (None, "bf16"):
        raise RequestError(
            f"--precision: {precision} given, but the weights of {folder} are quantised and compute in bf16; leave it "
            "out"
        )
    fp8 = any(tensor.dtype == "F8_E4M3" for tensor in folder_tensors(folder).values())
    if fp8 and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        major, minor = torch.cuda.get_device_capability()
        raise UnavailableError(
            f"{folder}: the weights are fp8, which {torch.cuda.get_device_name()} (sm{major}{minor}) cannot multiply; "
            "run it on a GPU from sm89 on, or export with diffusers.quantize: int8"
        )


@no_progress_bars()
def load_quantized(folder: Path, device: str = "cpu") -> Any:
    """Return a transformer of quantised weights as stock diffusers loads it, in bf16, without gradients."""
    check_quantized(folder, meta_transformer(folder))
    model, info = transformer_class(folder).from_pretrained(
        str(folder), use_safetensors=True, torch_dtype=torch.bfloat16, output_loading_info=True
    )
    check_loaded(folder, info)
    return frozen(model).to(device)


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
                Quantised weights compute in bf16.
        """
        quantized = is_quantized(folder)
        half = quantized or device == "cuda"
        self.device, self.precision = device, precision or ("bf16" if half else "fp32")
        self._guidance = guidance
        if quantized:
            self._set(load_quantized(folder, device))
        else:
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
        return sum(part.nbytes for tensor in tensors for part in _parts(tensor))

    def compiled(self) -> TorchSession:
        """Return a session of the same weights, in memory once, whose blocks are compiled."""
        shared = (*self.transformer.parameters(), *self.transformer.buffers())
        session = copy.copy(self)
        session._set(copy.deepcopy(self.transformer, {id(tensor): tensor for tensor in shared}))
        compile_blocks(session.transformer, listed_blocks(session.transformer))
        return session

    def frame_local(self, paths: Sequence[str]) -> TorchSession:
        """Return a session of the same model in which the blocks at `paths` attend within latent frames."""
        session = copy.copy(self)
        session._network = frame_local_network(self.transformer, paths, self._guidance)
        return session

    def _set(self, transformer: Any) -> None:
        self.transformer, self._network = transformer, as_network(transformer, self._guidance)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a quantised weight is made of; of any other, itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
