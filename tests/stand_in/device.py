# mypy: disable-error-code="no-untyped-call"
"""A device that says it is cuda and computes on the CPU: placement, synchronisations and kernels without a GPU.

Only in a process that loaded `hooks` before torch. As on the real device, tensors of two devices do not mix, a
generator draws on its own device only, and autocast has CUDA's rules. There are numbers, so that whole runs go through.
It cannot show the numerics and speed of CUDA's kernels, memory, streams, NCCL, or what reads addresses (DDP,
DeepSpeed).
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # lists the functions that are replaced here, so it must come before
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
NAME = "NVIDIA H100 80GB HBM3"
PAGE_LOCKED = "page_locked"
HALF = (torch.float16, torch.bfloat16)

_CPU_INDICES = {  # CUDA takes indices from the CPU, of any shape
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
_WAITS = {  # their result, or its size, is read by the host
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.is_nonzero.default,
    aten.repeat_interleave.Tensor,
}
_COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}


class MixedDevicesError(RuntimeError):
    """What CUDA refuses: tensors, or a generator and a tensor, on two devices."""


class OnCuda(torch.Tensor):
    """A tensor that says it is on cuda; `numbers` holds its values."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnCuda:
        made: OnCuda = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.numbers = values
        return made

    def __init__(self, values: torch.Tensor) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) not in memo:
            copied: Any = OnCuda(self.numbers.detach().clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = (
                torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
            )
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} on a stand-in tensor outside the stand-in device")


_STOCK_DATA: Any = torch._C.TensorBase.data


def _data(tensor: Any) -> Any:
    return tensor.detach() if isinstance(tensor, OnCuda) else _STOCK_DATA.__get__(tensor)


def _set_data(tensor: Any, value: Any) -> None:
    """`tensor.data = value`; a tensor that moves to the device in this way becomes another kind of object."""
    if not isinstance(value, OnCuda) and not isinstance(tensor, OnCuda):
        _STOCK_DATA.__set__(tensor, value)
        return
    fresh: Any = value.detach()
    if isinstance(tensor, torch.nn.Parameter):
        fresh = torch.nn.Parameter(fresh, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, fresh)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _plain(tree: Any) -> Any:
    """Return arguments or results with the numbers in place of the device's tensors."""
    return _each(tree, lambda tensor: tensor.numbers if isinstance(tensor, OnCuda) else tensor)


def _each(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([_each(part, function) for part in tree])
    return {name: _each(part, function) for name, part in tree.items()} if isinstance(tree, dict) else tree


def _tensors(parts: Iterable[Any]) -> Iterator[torch.Tensor]:
    for part in parts:
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, (tuple, list)):
            yield from _tensors(part)


def _page_locking(stock: Any) -> Callable[..., torch.Tensor]:
    """Return `empty_like` that marks what is to be page-locked, for which a CPU build has no memory."""

    def empty_like(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        empty: torch.Tensor = stock(*args, **kwargs)
        if pin_memory:
            setattr(empty, PAGE_LOCKED, True)
        return empty

    return empty_like


@lru_cache(None)
def _aliases(function: Any) -> bool:
    """Whether results of an operation share memory with its arguments."""
    return any(argument.alias_info is not None for argument in function._schema.arguments)


def _line() -> str:
    """The line of the package that an operation comes from."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(part in path for part in ("/flcompress/", "/passes/", "/exporters/")) and "site-packages" not in path:
            return f"{path.rsplit('/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


class StandIn(TorchDispatchMode):
    """The device, while the `with` lasts.

    Attributes:
        phase: what the program does; counts are kept apart by it.
        operations: phase -> operations on the device.
        waits: (phase, operation, line) -> how often the host waited for the device.
        uploads: (phase, line, "page-locked" or "pageable") -> copies from the host, without tensors of one number.
        products: (phase, dtype) -> FLOPs of matrix products and convolutions, after autocast.
        attention: (phase, kernel, dtypes of query, key and value as they came, whether under autocast) -> calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.operations: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self.uploads: Counter[tuple[str, str, str]] = Counter()
        self.products: Counter[tuple[str, str]] = Counter()
        self.attention: Counter[tuple[str, str, str, bool]] = Counter()
        self._stack = ExitStack()
        self._in_attention = False

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count as `phase` while active."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def counts(self) -> dict[str, list[list[Any]]]:
        """Return all counts as plain JSON values, each a row of its key and the number."""
        tables = {"waits": self.waits, "uploads": self.uploads, "products": self.products, "attention": self.attention}
        rows = {name: [[*key, number] for key, number in table.items()] for name, table in tables.items()}  # type: ignore[attr-defined]
        return {**rows, "operations": [[phase, number] for phase, number in self.operations.items()]}

    def __enter__(self) -> StandIn:
        stack = self._stack
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)

        def patch(owner: Any, **values: Any) -> None:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))

        def nothing(*_: Any, **__: Any) -> None:
            return None

        patch(
            torch.cuda,
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            get_device_name=lambda *_: NAME,
            get_device_capability=lambda *_: (9, 0),
            is_bf16_supported=lambda *_, **__: True,
            get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
            memory_allocated=lambda *_: 0,
            max_memory_allocated=lambda *_: 0,
            max_memory_reserved=lambda *_: 0,
            mem_get_info=lambda *_: (80 * 10**9, 80 * 10**9),
            is_current_stream_capturing=lambda: False,
            **dict.fromkeys(
                ("_lazy_init", "set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all",
                 "set_rng_state", "reset_peak_memory_stats"),
                nothing,
            ),
        )  # fmt: skip
        from torch.amp import autocast_mode

        patch(autocast_mode, amp_definitely_not_available=lambda: False)
        patch(torch.cuda.amp.common, amp_definitely_not_available=lambda: False)
        patch(torch.Tensor, data=property(_data, _set_data))
        patch(
            torch.nn.functional,
            scaled_dot_product_attention=self._attend(torch.nn.functional.scaled_dot_product_attention),
        )
        patch(torch, empty_like=_page_locking(torch.empty_like))
        self._patch_addresses(patch)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @staticmethod
    def _patch_addresses(patch: Callable[..., None]) -> None:
        """Give what looks at addresses of memory (to find tensors that share some) the numbers themselves."""
        import safetensors.torch
        from huggingface_hub.serialization import _torch as sharing

        def plainly(function: Any) -> Callable[..., Any]:
            return lambda first, *args, **kwargs: function(_plain(first), *args, **kwargs)

        patch(sharing, storage_ptr=plainly(sharing.storage_ptr))
        save, save_file = safetensors.torch.save, safetensors.torch.save_file
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").split(".")[0] in ("flcompress", "safetensors"):
                for name, stock in (("save", save), ("save_file", save_file)):
                    if vars(module).get(name) is stock:
                        patch(module, **{name: plainly(stock)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = list(_tensors((*args, *kwargs.values())))
        ours, wanted = any(isinstance(leaf, OnCuda) for leaf in leaves), kwargs.get("device")
        to_cuda = _is_cuda(wanted)
        if not ours and not to_cuda:
            return func(*args, **kwargs)
        self.operations[self.phase] += 1
        if func in _COPIES:
            return self._copy(func, args, kwargs)
        self._check(func, args, kwargs, leaves, ours)
        if func in _WAITS and ours:
            self.waits[self.phase, str(func), _line()] += 1
        if not self._in_attention:
            self._count(func, args)
        inner = {**kwargs, "device": torch.device("cpu") if to_cuda else wanted} if wanted is not None else kwargs
        out = func(*_plain(args), **_plain(inner))
        if func in (aten._local_scalar_dense.default, aten.equal.default) or (wanted is not None and not to_cuda):
            return out
        wrapped = _each(out, lambda t: t if isinstance(t, OnCuda) else OnCuda(t))
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours and _aliases(func) else wrapped

    def _check(self, func: Any, args: Any, kwargs: Any, leaves: list[torch.Tensor], ours: bool) -> None:
        wanted, generator = kwargs.get("device"), kwargs.get("generator")
        on_cuda = _is_cuda(wanted) if wanted is not None else ours
        if generator is not None and (generator.device.type == "cuda") != on_cuda:
            raise MixedDevicesError(f"{func}: a generator of {generator.device} at {_line()}")
        if not ours:
            return
        theirs = [leaf for leaf in leaves if not isinstance(leaf, OnCuda) and leaf.ndim]
        if func in _CPU_INDICES and isinstance(args[0], OnCuda):
            theirs = []
        if theirs:
            shapes = [(tuple(leaf.shape), "cuda" if isinstance(leaf, OnCuda) else "cpu") for leaf in leaves]
            raise MixedDevicesError(f"{func}: tensors on two devices, {shapes}, at {_line()}")

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._to_copy.default:
            source, wanted = args[0], kwargs.get("device")
            here, there = isinstance(source, OnCuda), isinstance(source, OnCuda) if wanted is None else _is_cuda(wanted)
            self._note_copy(source, here, there, waits=not kwargs.get("non_blocking"))
            inner = {**kwargs, "non_blocking": False}
            if wanted is not None:
                inner["device"] = torch.device("cpu") if there else wanted
            out = func(_plain(source), **inner)
            return OnCuda(out) if there else out
        target, source, *rest = args
        if not (rest and rest[0]):  # the host does not wait for non-blocking copies, whose memory is page-locked there
            self._note_copy(source, isinstance(source, OnCuda), isinstance(target, OnCuda))
        func(_plain(target), _plain(source), *_plain(rest), **kwargs)
        return target

    def _note_copy(self, source: torch.Tensor, here: bool, there: bool, *, waits: bool = True) -> None:
        if here and not there:
            self.waits[self.phase, "copy to the host", _line()] += 1
        elif there and not here and source.device.type == "cpu" and source.ndim:
            kind = "page-locked" if hasattr(source, PAGE_LOCKED) and not waits else "pageable"
            self.uploads[self.phase, _line(), kind] += 1

    def _count(self, func: Any, args: Any) -> None:
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default):
            left, right = args[:2] if func in (aten.mm.default, aten.bmm.default) else args[1:3]
            self.products[self.phase, _name(left.dtype)] += 2 * left.numel() * right.shape[-1]
        elif func is aten.convolution.default:
            x, weight = args[:2]
            self.products[self.phase, _name(x.dtype)] += 2 * x.numel() * weight.shape[0]

    def _attend(self, stock: Any) -> Callable[..., Any]:
        """Return attention that counts the kernel which its dtypes and mask leave it on an H100, after autocast."""

        def attention(
            query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
            scale: float | None = None, enable_gqa: bool = False,
        ) -> Any:  # fmt: skip
            if torch._C._is_torch_function_mode_enabled():  # a mode meets it, as it meets the stock function
                given = (query, key, value, attn_mask, dropout_p, is_causal)
                options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
                return torch.overrides.handle_torch_function(attention, (query, key, value), *given, **options)
            if query.device.type != "cuda":
                return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            dtypes, autocast = "/".join(_name(part.dtype) for part in (query, key, value)), False
            if torch.is_autocast_enabled("cuda"):
                half, autocast = torch.get_autocast_dtype("cuda"), True
                query, key, value = (part.to(half) for part in (query, key, value))
            assert query.dtype == key.dtype == value.dtype, f"attention of {dtypes} at {_line()}"
            flash = query.dtype in HALF and attn_mask is None and query.shape[-1] <= 256
            kernel = f"{'flash' if flash else 'memory-efficient'} {_name(query.dtype)}"
            self.attention[self.phase, kernel, dtypes, autocast] += 1
            self._in_attention = True
            try:
                with torch.autocast("cuda", enabled=False):
                    return _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
            finally:
                self._in_attention = False

        return attention


def _attention(
    query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Any:
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scores = (query.float() @ key.float().transpose(-1, -2)) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    return (scores.softmax(-1).nan_to_num() @ value.float()).to(query.dtype)


def _name(dtype: torch.dtype) -> str:
    return {"torch.float32": "fp32", "torch.bfloat16": "bf16"}.get(str(dtype), str(dtype))
