"""The clips at a dataset's end that each pass leaves to its held-out figures."""

from __future__ import annotations

from typing import Any

import pytest

from flcompress.core.registry import find_pass
from flcompress.core.settings import Training


@pytest.mark.parametrize(
    ("name", "arguments", "held_out"),
    [
        ("pretrain", {"steps": 1}, {2: 0, 100: 25, 4000: 256}),
        ("stochastic-depth", {"remove": 0.3, "steps": 1}, {2: 1, 100: 25, 4000: 128}),
        ("feature-distill", {"steps": 1}, {2: 1, 100: 25, 4000: 128}),
        ("dmd", {"steps": 1}, {2: 1, 20: 5, 4000: 8}),
        ("consistency", {"steps": 1}, {2: 1, 20: 5, 4000: 8}),
        ("importance", {}, {100: 100}),
        ("select", {"remove": 0.3}, {100: 100}),
        ("temporal-attention", {}, {100: 100}),
    ],
)
def test_how_many_clips_a_pass_holds_out(name: str, arguments: dict[str, Any], held_out: dict[int, int]) -> None:
    step = find_pass(name)(**arguments)
    assert {clips: step.held_out(clips, Training()) for clips in held_out} == held_out
