"""Run a model to record it: as it is, on the meta device, or on the CPU with weights that take no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as flex
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flcompress.tracing.config_keys import build, has_config

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """A way to run a model: the module to watch, and the arguments on the device of the run.

    Attributes:
        module: the module to watch.
        inputs: keyword arguments of its forward.
        tensors: replacements of its parameters and buffers, by name.
        meta: whether it runs on the meta device.
    """

    module: nn.Module
    inputs: Inputs
    tensors: dict[str, Tensor]
    meta: bool = False

    def __call__(self) -> Any:
        """Run the forward, and return its output."""
        with ExitStack() as stack:
            stack.enter_context(runnable_on_meta() if self.meta else dense_flex_attention())
            if not self.tensors:
                return self.module(**self.inputs)
            return torch.func.functional_call(self.module, self.tensors, (), self.inputs)


def runs(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[Run]:
    """Yield the ways to run `model`, to be tried in turn; `model` itself is not changed.

    A model without weights runs on the meta device. If its forward reads values (of a mask, of token counts), a twin
    runs on the CPU whose parameters are a single zero expanded to their shape; among inputs without values, floats
    become random, integers and masks become ones.
    """
    arguments = dict(inputs)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if not any(tensor.is_meta for tensor in model.parameters()):
        meta = any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tree_leaves(arguments))
        yield Run(model, _map_tensors(arguments, _real_on(device)) if meta else arguments, {})
        return
    buffers = {name: torch.zeros_like(tensor, device="meta") for name, tensor in model.named_buffers()}
    yield Run(model, _map_tensors(arguments, lambda tensor: tensor.to("meta")), buffers, meta=True)
    if has_config(model):
        twin = build(model, {}).eval()
        zeros = {name: torch.zeros((), dtype=w.dtype).expand(w.shape) for name, w in twin.named_parameters()}
        yield Run(twin, _map_tensors(arguments, _real_on(torch.device("cpu"))), zeros)


def lacks_values(error: Exception) -> bool:
    """Return whether a forward failed because meta tensors have no values, and not because of the shapes."""
    return isinstance(error, NotImplementedError) or any(word in str(error) for word in ("meta", "scalarType"))


def _map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    mapped: Inputs = tree_map_only(Tensor, change, inputs)
    return mapped


def _real_on(device: torch.device) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)

    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        if tensor.is_floating_point():
            return torch.rand(tensor.shape, generator=generator, device="cpu").to(device, tensor.dtype)
        return torch.ones_like(tensor, device=device)

    return real


class _NoModules:
    """Replaces the counter's module tracker, which fails on blocks that are called with a bare parameter."""

    parents = frozenset(["Global"])

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _flash_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def flop_counter() -> FlopCounterMode:
    """Return a counter of every operation, including attention on the CPU, which PyTorch omits."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: _flash_on_cpu})
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def _dense(query: Tensor, key: Tensor, value: Tensor, *_: Any, **settings: Any) -> Any:
    """Compute attention without mask and score changes, which affect neither shapes, nor flows, nor the dense count."""
    groups = query.shape[-3] // key.shape[-3]
    scores = query @ key.repeat_interleave(groups, dim=-3).transpose(-1, -2)
    out = scores.softmax(dim=-1) @ value.repeat_interleave(groups, dim=-3)
    return (out, scores.logsumexp(dim=-1)) if settings.get("return_lse") else out


@contextmanager
def dense_flex_attention() -> Iterator[None]:
    """Replace flex attention, which compiles itself and cannot run under a dispatch mode, by plain matrix products."""
    stock = flex.flex_attention
    try:
        flex.flex_attention = _dense
        yield
    finally:
        flex.flex_attention = stock


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Ignore `torch.autocast` on the meta device, which it refuses; Mochi's forward asks for it."""
    stock = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else stock(device_type, *args, **kwargs)

    torch.autocast = autocast  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = stock  # type: ignore[misc]


@contextmanager
def runnable_on_meta() -> Iterator[None]:
    """Patch everything that keeps stock forwards from running on tensors without values."""
    with dense_flex_attention(), _autocast_on_meta(), AllTrueMasks():
        yield


class AllTrueMasks(TorchFunctionMode):
    """Meta and fake tensors have no values: treat masks as all true, as without padding.

    Mochi selects the valid tokens of a prompt this way.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unknown = func in (torch.nonzero, Tensor.nonzero) and (args[0].is_meta or isinstance(args[0], FakeTensor))
        if unknown and not (kwargs or {}).get("as_tuple"):
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device=args[0].device)
        return func(*args, **(kwargs or {}))
