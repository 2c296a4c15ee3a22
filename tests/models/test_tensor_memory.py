"""What nothing refers to any more is freed before the next model comes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from flcompress.models.tensor_memory import free_gpu_memory


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.mark.parametrize("gpu", [False, True])
def test_cycles_are_freed_where_a_gpu_holds_them(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    gc.disable()
    left = weakref.ref(Cycle())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(left() is None))
    try:
        free_gpu_memory()
    finally:
        gc.enable()
    assert emptied == ([True] if gpu else [])
