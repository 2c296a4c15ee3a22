"""Activations of one model at one size are counted once for all tests of plans: they differ in machine and settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from flcompress.core.settings import Precision
from flcompress.ir.graph import BlockGraph
from flcompress.models.families.family import LatentShape
from flcompress.planning import plan
from flcompress.planning.activations import SavedActivations, saved_activations

COUNTED: dict[tuple[Path, int, LatentShape, Precision, bool], SavedActivations] = {}


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(
        transformer: Path, graph: BlockGraph, tokens: int, shape: LatentShape, precision: Precision, *, gpu: bool
    ) -> SavedActivations:
        key = (transformer, tokens, shape, precision, gpu)
        if key not in COUNTED:
            COUNTED[key] = saved_activations(transformer, graph, tokens, shape, precision, gpu=gpu)
        return COUNTED[key]

    monkeypatch.setattr(plan, "saved_activations", counted)
