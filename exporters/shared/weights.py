"""A transformer of any size in little memory: its structure without weights, and weights read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flcompress.exporters.shared import ExportPrecision
from flcompress.files import replacing, write_text
from flcompress.models.loading import empty_transformer, loaded_dtype, put, transformer_class
from flcompress.models.shards import folder_tensors
from flcompress.models.stock_files import stock_files

DTYPES: dict[ExportPrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a component's safetensors files by name; each is read when asked for and not kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {name: tensor.file for name, tensor in folder_tensors(folder).items()}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        # Opened anew each time: an open file keeps every page that was ever read mapped into memory.
        with safe_open(str(self.files[name]), framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def store_in(folder: Path, precision: ExportPrecision) -> None:
    """Write a transformer's floating tensors again in the type that diffusers loads them in at a precision, in place.

    One file of the weights is in memory at a time.
    """
    from safetensors.torch import load_file, save_file

    stock, weights = transformer_class(folder), stock_files(folder)
    total = 0
    for file in weights.files:
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(loaded_dtype(name, stock, DTYPES[precision]))
        total += sum(tensor.nbytes for tensor in tensors.values())
        with replacing(file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    if weights.index is not None:
        index = json.loads(weights.index.read_text(encoding="utf-8"))
        index.setdefault("metadata", {})["total_size"] = total
        write_text(weights.index, json.dumps(index, indent=2) + "\n")


def skeleton(folder: Path, precision: ExportPrecision) -> Any:
    """Return the transformer with parameters on the meta device, each of the type it has at `precision`.

    Buffers are real: what `__init__` computes (rotary tables) is in no file, and what is in one is read.

    Raises:
        ModelError: the weights do not belong to the configuration.
    """
    model, stored = empty_transformer(folder, dtype=DTYPES[precision])
    for name, buffer in model.named_buffers():
        if name in stored:
            stored[name].fill(buffer)
    return model


def stream_weights(folder: Path, precision: ExportPrecision, device: str = "cpu") -> Any:
    """Return the transformer, ready to run on a device: a layer reads its weights when called, and drops them then."""
    from accelerate.hooks import attach_align_device_hook

    model = skeleton(folder, precision)
    attach_align_device_hook(model, execution_device=device, offload=True, weights_map=WeightFiles(folder))
    return model


def lazily_allocated(model: Any) -> Any:
    """Move a skeleton's parameters to the CPU, never written, so that they take no memory; for torch.export."""
    for name, parameter in list(model.named_parameters()):
        put(model, name, torch.empty_like(parameter, device="cpu"))
    return model
