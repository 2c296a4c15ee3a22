"""Memory of tensors: the peak of those alive at once, even if they hold none, and returning a GPU's."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the storages that operations make, until they are freed.

    Args:
        count_stored: count a storage that no operation made too, once one returns it: weights read from a file.

    Attributes:
        most: bytes at the fullest moment so far.
    """

    def __init__(self, *, count_stored: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count_stored, self.most, self._now = count_stored, 0, 0
        self._known: weakref.WeakKeyDictionary[UntypedStorage, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = () if self._count_stored else tree_leaves((args, kwargs))
        inputs = {leaf.untyped_storage()._cdata for leaf in old if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, this process's part
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs and storage not in self._known:
                self._known[storage] = None
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.most = max(self.most, self._now)
        return result

    def _free(self, size: int) -> None:
        self._now -= size


def free_gpu_memory() -> None:
    """Free tensors that only reference cycles hold, and return torch's cached memory to the GPU; nothing on a CPU.

    Called after each pass, after clips are encoded and around decoding: wherever the next thing in memory is another
    model. Without it the garbage of a pass (gigabytes of sharded weights) stays until Python happens to collect it.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
