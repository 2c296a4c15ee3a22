"""Tiny pipelines through encoding, every pass, generation, evaluation and timing on a real GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.training.role import TrainedRole
from tests.families.pipelines import TINY
from tests.families.whole_way import WholeWay

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WAITS = 2
"""Of an update: for its loss with all figures, and for the norm of the gradients."""
WAITING = ("ltx", "mochi", "qwen-image")
"""Families whose classes wait by themselves."""


@pytest.mark.parametrize("family", TINY)
def test_a_family_goes_all_the_way(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained role's second update, when all is made that is made once, waits for the card no more than twice."""
    waits = _count_waits(monkeypatch)
    way = WholeWay(family, tmp_path, steps=2)
    way.prepare()
    way.encode()
    run = way.apply()
    assert way.generate().stat().st_size > 0
    records = [entry.record for entry in run.entries()[1:]]
    assert all(record.peak_gpu_mb and record.peak_gpu_reserved_mb for record in records)
    assert all((record.peak_gpu_reserved_mb or 0) >= (record.peak_gpu_mb or 0) for record in records)
    assert waits
    if family not in WAITING:
        assert {name: found for name, found in waits.items() if len(found) > WAITS} == {}


def test_all_else_that_a_recipe_may_do(tmp_path: Path) -> None:
    way = WholeWay("wan", tmp_path)
    way.prepare()
    way.encode()
    way.apply()
    for call in way.others().values():
        call()


def _count_waits(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Return role -> where its last update waited for the card, filled as updates happen."""
    update: Callable[..., Any] = TrainedRole.update
    waits: dict[str, list[str]] = {}

    def watched(role: TrainedRole, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return update(role, *args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                synchronising = [one for one in caught if "synchroniz" in str(one.message)]
                waits[role.name] = [f"{Path(one.filename).name}:{one.lineno}" for one in synchronising]

    monkeypatch.setattr(TrainedRole, "update", watched)
    return waits
