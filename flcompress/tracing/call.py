"""Recorded calls of blocks: shapes only, so that recording a large model keeps no activation alive."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flcompress.ir.block import TensorSpec

# Errors that foreign model code may raise on unsuitable arguments.
FORWARD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    NameError,
)


@dataclass(frozen=True, slots=True)
class Blank:
    """Shape and dtype of a floating-point or complex tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments and result of a call, with tensors blanked; `flops` covers the whole batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    flops: int


def spec_of(tensor: Tensor | Blank) -> TensorSpec:
    """Return the shape and dtype name of a tensor."""
    return TensorSpec(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def blank(tree: Any) -> Any:
    """Blank the floating-point tensors of a structure; integers and masks control the forward and are small."""

    def blank_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            return Blank(tuple(leaf.shape), leaf.dtype)
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    return tree_map(blank_leaf, tree)


def fill(tree: Any, device: torch.device, generator: torch.Generator) -> Any:
    """Replace the blanks of a structure by random numbers on `device`; meta masks become true, meta integers zero."""

    def fill_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Blank):
            wide = torch.complex64 if leaf.dtype.is_complex else torch.float32
            return torch.randn(leaf.shape, generator=generator, dtype=wide, device="cpu").to(device, leaf.dtype)
        if isinstance(leaf, Tensor):
            if leaf.is_meta:  # a mask that keeps everything, or an index that exists
                return torch.full_like(leaf, leaf.dtype is torch.bool, device=device)
            return leaf.to(device)
        return leaf

    return tree_map(fill_leaf, tree)


@lru_cache(maxsize=256)
def positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of `forward`'s positional arguments, without `self`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters
    return tuple(name for name, parameter in parameters.items() if parameter.kind in kinds)[1:]


def arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by name; by position ("0") for those that `forward` does not name."""
    names = positional_names(type(module).forward)
    by_position = [names[index] if index < len(names) else str(index) for index in range(len(args))]
    return dict(zip(by_position, args, strict=True)) | dict(kwargs)


def outputs_of(output: Any) -> tuple[Any, ...]:
    """Return a block's output as a tuple."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def tensors_of(tree: Any) -> list[Tensor]:
    """Return every tensor of a structure or of a model's output, in order."""
    # diffusers' outputs are ordered dictionaries, which pytree takes for leaves.
    values = list(tree.values()) if isinstance(tree, OrderedDict) else tree
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Enter evaluation mode without gradients; on exit restore modes, and buffers that a forward replaced."""
    before = [(part, part.training, dict(part._buffers)) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode, buffers in before:
            part.training = mode
            part._buffers.update(buffers)
