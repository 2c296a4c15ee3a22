"""A stock transformer as the network that objectives, samplers and exporters know; half precision, compilation."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from flcompress.diffusion.network import Conditioning, Network, beside
from flcompress.errors import RequestError
from flcompress.ir.graph import BlockGraph
from flcompress.models.families import family_of, find_family
from flcompress.models.families.unmasked import MaskSwitch

IN_FP32 = frozenset(
    {"__pow__", "cosine_similarity", "exp", "group_norm", "layer_norm", "log", "log_softmax", "norm", "normalize",
     "pow", "reciprocal", "rms_norm", "rsqrt", "softmax", "softplus"}
)  # fmt: skip
"""Functions of torch, by name, that CUDA's autocast computes in fp32 and the CPU's in the dtype of their input."""


def as_network(transformer: Any, guidance: float | None = None) -> Network:
    """Return the transformer behind its family's adapter.

    Weights that are held in half precision compute in it, without autocast, as stock pipelines run them; noise levels
    and rotary tables stay in fp32, and so does what a class keeps so. Weights in fp32 compute in the precision around
    the call. Where the family can leave out attention's mask, prompts of one length are cut to it, without a mask.

    Args:
        transformer: of a class that a family knows, or what an engine wrapped around one.
        guidance: embedded guidance scale, if the network takes one; the family's usual one by default.
    """
    inner = stock_model(transformer)
    family, config, half = family_of(stock_name(inner)), inner.config, _half_dtype(transformer)
    switch = family.mask_switch(inner)

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        given, absent = (conditioning, False) if switch is None else switch.cut(conditioning)
        given = beside(x, given)
        with nullcontext() if switch is None else switch.without_mask(absent=absent):
            if half is None:
                arguments = family.arguments(config, x, timestep, given, guidance)
                output = transformer(**arguments, return_dict=False)[0]
            else:
                cast = {name: t.to(half) if t.is_floating_point() else t for name, t in given.items()}
                with half_precision(x.device.type, enabled=False):
                    arguments = family.arguments(config, x.to(half), timestep, cast, guidance)
                    output = transformer(**arguments, return_dict=False)[0].to(x.dtype)
        return family.prediction(config, output, x, timestep, given)

    return call


def _half_dtype(transformer: Any) -> torch.dtype | None:
    """Return the half precision that a module's own parameters are held in, apart from what a class keeps in fp32."""
    dtypes = {parameter.dtype for parameter in transformer.parameters()} - {torch.float32}
    return min(dtypes & {torch.bfloat16, torch.float16}, key=str, default=None)


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


def mask_switch(model: Any) -> MaskSwitch | None:
    """Return what lets the attention of a stock model leave out its mask, by its family; None if nothing does."""
    family = find_family(stock_name(model))
    return None if family is None else family.mask_switch(model)


@contextmanager
def half_precision(device: str, *, enabled: bool) -> Iterator[None]:
    """Compute in bf16 where that is safe, or as the weights are, without autocast's cache of bf16 weights.

    A training step updates weights several times, and the cache would keep serving stale copies.
    """
    with warnings.catch_warnings(), torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False):
        # Norms keep fp32 weights on purpose; PyTorch says that it has no fused kernel for that.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


class CudaAutocast(TorchFunctionMode):
    """Give CPU tensors CUDA's autocast while the CPU's is enabled: norms, powers and softmax in fp32.

    The lists of functions that become bf16 are the same for what transformers are made of: products, convolutions and
    attention. Without a GPU, fake tensors of the device cuda have no autograd.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, _exact, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def choose_attention(model: Any, name: str) -> None:
    """Set the kernel of a diffusers transformer's attention, through diffusers' own switch.

    Args:
        model: the transformer.
        name: a `training.attention`.

    Raises:
        RequestError: diffusers has no switch for a model of this class.
    """
    from diffusers.models import modeling_utils
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    if name != "native":
        processors = [getattr(module, "processor", None) for module in model.modules()]
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise RequestError(
                f"training.attention: {name} given, but {stock_name(model)} has no choice of kernels in this "
                "diffusers; set it to native"
            )
        level = modeling_utils.logger.level
        modeling_utils.logger.setLevel("ERROR")  # it warns that the switch is experimental
        try:
            with attention_backend(AttentionBackendName.NATIVE):  # which restores the choice of other models
                model.set_attention_backend(f"_native_{name}")
        finally:
            modeling_utils.logger.setLevel(level)


@contextmanager
def attention_with_gradients(name: str) -> Iterator[None]:
    """Keep cuDNN's attention out of torch's own choice of kernels while active: its backward can be wrong.

    On an H200 with torch 2.11 it gave gradients of 1e36 and NaN to a transformer of 17 tokens, whose forward was right;
    torch 2.13 chooses it on Hopper, too. The choice holds for recomputed forwards, too, so for the whole process.

    Args:
        name: a `training.attention`; only "native" leaves torch a choice.
    """
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(before and name != "native")
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


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
    Masks of attention stay: without them every length of a prompt would be compiled anew.
    """
    if (switch := mask_switch(model)) is not None:
        switch.kept = True
    forwards: dict[type[nn.Module], Any] = {}
    for block in graph.blocks:
        module = model.get_submodule(block.path)
        kind = type(module)
        forwards.setdefault(kind, torch.compile(kind.forward, dynamic=False))
        vars(module)["forward"] = partial(forwards[kind], module)
