"""A stock transformer as the network that objectives, samplers and exporters know; half precision, compilation."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flcompress.diffusion.network import Conditioning, Network
from flcompress.ir.graph import BlockGraph
from flcompress.models.families import family_of, find_family


def as_network(transformer: Any, guidance: float | None = None) -> Network:
    """Return the transformer behind its family's adapter.

    Args:
        transformer: of a class that a family knows, or what an engine wrapped around one.
        guidance: embedded guidance scale, if the network takes one; the family's usual one by default.
    """
    inner = stock_model(transformer)
    family, config = family_of(stock_name(inner)), inner.config

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        arguments = family.arguments(config, x, timestep, conditioning, guidance)
        output = transformer(**arguments, return_dict=False)[0]
        return family.prediction(config, output, x, timestep, conditioning)

    return call


def stock_model(wrapped: Any) -> Any:
    """Return the stock model inside a wrapper of torch.compile, DistributedDataParallel, DeepSpeed or a LoRA."""
    for name in ("_orig_mod", "module", "inner"):
        inner = vars(wrapped).get("_modules", {}).get(name)
        if inner is None:
            inner = vars(wrapped).get(name)
        if inner is not None:
            return stock_model(inner)
    return wrapped


def stock_name(model: Any) -> str:
    """Return the name of the class that a family or diffusers has; fully_shard gives a model a class of its own."""
    bases = type(model).__mro__
    known = (base for base in bases if find_family(base.__name__) or base.__module__.startswith("diffusers."))
    return next((base.__name__ for base in known), "")


@contextmanager
def half_precision(device: str, *, enabled: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Compute in bf16 (or fp16) where that is safe, without autocast's cache of such weights.

    A training step updates weights several times, and the cache would keep serving stale copies.
    """
    with warnings.catch_warnings(), torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
        # Norms keep fp32 weights on purpose; PyTorch says that it has no fused kernel for that.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def missing_compiler() -> str:
    """Return what torch.compile lacks on this machine's CPU, and the fix; empty if nothing."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) for torch.compile; install g++ or set CXX"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"no {header} for torch.compile; install Python's development headers"
    return ""


def compile_blocks(model: nn.Module, graph: BlockGraph) -> None:
    """Compile the forward of every block of `model`, in place.

    Not the modules themselves: their hooks, and the forwards that `skip` puts in place of theirs, must keep working.
    """
    forwards: dict[type[nn.Module], Any] = {}
    for block in graph.blocks:
        module = model.get_submodule(block.path)
        kind = type(module)
        forwards.setdefault(kind, torch.compile(kind.forward, dynamic=False))
        vars(module)["forward"] = partial(forwards[kind], module)
