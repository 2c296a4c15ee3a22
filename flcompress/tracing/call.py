"""One recorded call of a block: shapes only, so that recording a large model keeps no activation alive."""

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

# What foreign model code may raise on arguments that it was not made for.
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
    """A floating-point or complex tensor of which only shape and dtype were kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments and result of one call, tensors blanked; `flops` of the whole batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    flops: int


def spec_of(tensor: Tensor | Blank) -> TensorSpec:
    """Shape and dtype name of a tensor."""
    return TensorSpec(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def blank(tree: Any) -> Any:
    """The same structure with floating-point tensors blanked; integers and masks are small and steer, so they stay."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            return Blank(tuple(leaf.shape), leaf.dtype)
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    return tree_map(one, tree)


def fill(tree: Any, device: torch.device, generator: torch.Generator) -> Any:
    """The structure on `device`, with random numbers in place of the blanks; meta masks become true, integers zero."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Blank):
            wide = torch.complex64 if leaf.dtype.is_complex else torch.float32
            return torch.randn(leaf.shape, generator=generator, dtype=wide, device="cpu").to(device, leaf.dtype)
        if isinstance(leaf, Tensor):
            if leaf.is_meta:  # a mask that keeps everything, or an index that exists
                return torch.full_like(leaf, leaf.dtype is torch.bool, device=device)
            return leaf.to(device)
        return leaf

    return tree_map(one, tree)


@lru_cache(maxsize=256)
def positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a module class' `forward` that may be given by position, without `self`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, one in inspect.signature(forward).parameters.items() if one.kind in kinds)[1:]


def named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name; by position ("0") where `forward` gives them none."""
    names = positional_names(type(module).forward)
    places = [names[place] if place < len(names) else str(place) for place in range(len(args))]
    return dict(zip(places, args, strict=True)) | dict(kwargs)


def outputs_of(output: Any) -> tuple[Any, ...]:
    """What a block returned, as a tuple."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor in a structure or in what a model returned, in order."""
    # diffusers' outputs are ordered dictionaries, which pytree takes for leaves.
    values = list(tree.values()) if isinstance(tree, OrderedDict) else tree
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets back its mode, and buffers that a forward replaced."""
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
