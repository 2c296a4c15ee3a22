"""A transformer of any size in little memory: its structure without weights, and weights read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flcompress.exporters.shared import ExportPrecision
from flcompress.models.loading import frozen, transformer_class
from flcompress.models.part_check import matching_tensors
from flcompress.models.shards import folder_tensors

DTYPES: dict[ExportPrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_of(name: str, model_class: Any, precision: ExportPrecision) -> torch.dtype:
    """The type of a floating parameter, by the rule of diffusers' `from_pretrained(torch_dtype=...)`.

    Args:
        name: its full name.
        model_class: the diffusers class; its `_keep_in_fp32_modules` name the fp32 islands.
        precision: of the rest.
    """
    islands = set(model_class._keep_in_fp32_modules or ())
    return torch.float32 if islands & set(name.split(".")) else DTYPES[precision]


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


def skeleton(folder: Path, precision: ExportPrecision) -> Any:
    """The transformer with parameters on the meta device, each of the type it has at `precision`.

    Buffers are real: what `__init__` computes (rotary tables) lies in no file, and what lies in one is read.

    Raises:
        ModelError: the weights do not belong to the configuration.
    """
    from accelerate import init_empty_weights

    factory, files = transformer_class(folder), WeightFiles(folder)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])  # as stock loading has it while the class is built
    try:
        with init_empty_weights(include_buffers=False):
            model = factory.from_config(factory.load_config(str(folder)))
    finally:
        torch.set_default_dtype(default)
    matching_tensors(folder, model)
    for name, parameter in list(model.named_parameters()):
        owner, leaf = _owner(model, name)
        empty = torch.empty(parameter.shape, dtype=dtype_of(name, factory, precision), device="meta")
        owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
    for name, buffer in list(model.named_buffers()):
        owner, leaf = _owner(model, name)
        value = files[name].clone() if name in files else buffer
        # Stock loading casts every buffer of a class that has no fp32 islands, and none of a class that has.
        cast = value.is_floating_point() and not factory._keep_in_fp32_modules
        owner._buffers[leaf] = value.to(DTYPES[precision]) if cast else value
    return frozen(model)


def streamed(folder: Path, precision: ExportPrecision) -> Any:
    """The transformer, ready to run: every layer reads its weights when it is called and lets go of them after."""
    from accelerate.hooks import attach_align_device_hook

    model = skeleton(folder, precision)
    attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=WeightFiles(folder))
    return model


def lazily_allocated(model: Any) -> Any:
    """The same skeleton with parameters on the CPU that are never written, and so take no memory, for torch.export."""
    for name, parameter in list(model.named_parameters()):
        owner, leaf = _owner(model, name)
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
    return model


def _owner(model: Any, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
