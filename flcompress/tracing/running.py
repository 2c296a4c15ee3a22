"""How a model is run to be recorded: as it is, on the meta device, or on the CPU with weights that take no memory."""

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
    """One way to run a model: the module to watch, and the arguments on the device of the run."""

    module: nn.Module
    inputs: Inputs
    tensors: dict[str, Tensor]  # in place of the module's own
    meta: bool = False

    def __call__(self) -> Any:
        with ExitStack() as stack:
            stack.enter_context(runnable_on_meta() if self.meta else dense_flex_attention())
            if not self.tensors:
                return self.module(**self.inputs)
            return torch.func.functional_call(self.module, self.tensors, (), self.inputs)


def runs(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[Run]:
    """The ways to run `model`, to be tried in turn; `model` itself is left as it is.

    A model without weights runs on the meta device. Where its forward reads values (of a mask, of token counts), a
    twin runs on the CPU whose every parameter is one zero, seen in its shape; of inputs without values, floats become
    random numbers, integers and masks ones.
    """
    given = dict(inputs)
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    if not any(one.is_meta for one in model.parameters()):
        meta = any(isinstance(one, Tensor) and one.is_meta for one in tree_leaves(given))
        yield Run(model, _mapped(given, _real_on(device)) if meta else given, {})
        return
    buffers = {name: torch.zeros_like(one, device="meta") for name, one in model.named_buffers()}
    yield Run(model, _mapped(given, lambda one: one.to("meta")), buffers, meta=True)
    if has_config(model):
        twin = build(model, {}).eval()
        zeros = {name: torch.zeros((), dtype=one.dtype).expand(one.shape) for name, one in twin.named_parameters()}
        yield Run(twin, _mapped(given, _real_on(torch.device("cpu"))), zeros)


def lacks_values(error: Exception) -> bool:
    """Whether a forward failed because the meta device has shapes only, and not because of the shapes."""
    return isinstance(error, NotImplementedError) or any(word in str(error) for word in ("meta", "scalarType"))


def _mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    mapped: Inputs = tree_map_only(Tensor, change, inputs)
    return mapped


def _real_on(device: torch.device) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)

    def real(one: Tensor) -> Tensor:
        if not one.is_meta:
            return one.to(device)
        if one.is_floating_point():
            return torch.rand(one.shape, generator=generator, device="cpu").to(device, one.dtype)
        return torch.ones_like(one, device=device)

    return real


class _NoModules:
    """Stands in for the counter's tracker of modules, which fails on blocks that are called with a bare parameter."""

    parents = frozenset(["Global"])

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _flash_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def flop_counter() -> FlopCounterMode:
    """A counter of every operation, attention on the CPU included, which PyTorch leaves out."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: _flash_on_cpu})
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def _dense(query: Tensor, key: Tensor, value: Tensor, *_: Any, **settings: Any) -> Any:
    """Attention without mask or score changes: they alter neither shapes, nor what flows where, nor the dense count."""
    groups = query.shape[-3] // key.shape[-3]
    scores = query @ key.repeat_interleave(groups, dim=-3).transpose(-1, -2)
    out = scores.softmax(dim=-1) @ value.repeat_interleave(groups, dim=-3)
    return (out, scores.logsumexp(dim=-1)) if settings.get("return_lse") else out


@contextmanager
def dense_flex_attention() -> Iterator[None]:
    """Flex attention compiles itself and cannot run under a dispatch mode; here it is plain matrix products."""
    stock = flex.flex_attention
    try:
        flex.flex_attention = _dense
        yield
    finally:
        flex.flex_attention = stock


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """`torch.autocast` refuses the meta device, where there is nothing to cast; Mochi's forward asks for it."""
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
    """What stock forwards need that meet tensors without values."""
    with dense_flex_attention(), _autocast_on_meta(), AllTrueMasks():
        yield


class AllTrueMasks(TorchFunctionMode):
    """Of meta and fake tensors no number is known: a mask counts as all true, as where nothing is padded.

    Mochi picks the valid tokens of a prompt this way.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unknown = func in (torch.nonzero, Tensor.nonzero) and (args[0].is_meta or isinstance(args[0], FakeTensor))
        if unknown and not (kwargs or {}).get("as_tuple"):
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device=args[0].device)
        return func(*args, **(kwargs or {}))
