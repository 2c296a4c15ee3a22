from __future__ import annotations

import ast
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from flcompress.draws import Draws


def drawn(draws: Draws) -> dict[str, torch.Tensor]:
    """What one update draws, in an order that mixes what is shared with what is not."""
    level = draws.uniform()
    noise = draws.normal(2, 3)
    last = torch.randint(100, (1,), generator=draws.shared)
    order = torch.randperm(draws.batch, generator=draws.shared)[draws.mine]
    return {"level": level, "noise": noise, "again": draws.normal(2), "order": order, "last": last.expand(len(draws))}


@given(data=st.data(), own=st.integers(1, 9), processes=st.integers(1, 3), size=st.integers(1, 10))
def test_micro_batches_draw_what_the_batch_draws(data: st.DataObject, own: int, processes: int, size: int) -> None:
    rank = data.draw(st.integers(0, processes - 1))
    whole, parted = (Draws(7, "test", batch=own * processes, rank=rank, processes=processes) for _ in range(2))
    for _ in range(3):  # updates of one step: the next one goes on where the last one ended
        expected = drawn(whole)
        parts: list[dict[str, torch.Tensor]] = []
        places: list[int] = []
        share = 0.0
        for part in parted.micro_batches(size):
            assert len(part) <= size
            parts.append(drawn(part))
            places.extend(range(part.mine.start, part.mine.stop))
            share += part.share
        assert places == list(range(whole.mine.start, whole.mine.stop))
        assert abs(share - 1.0) < 1e-12
        for name, value in expected.items():
            assert torch.equal(torch.cat([one[name] for one in parts]), value)
    assert torch.equal(torch.rand(4, generator=parted.shared), torch.rand(4, generator=whole.shared))


def test_a_batch_that_fits_is_its_own_micro_batch() -> None:
    draws = Draws("test", batch=4)
    assert list(draws.micro_batches(4)) == [draws]
    assert list(draws.micro_batches(5)) == [draws]


def test_forking_the_random_state_names_its_devices() -> None:
    """Without `devices` torch starts a CUDA context on every GPU of the machine, in every process."""
    root = Path(__file__).resolve().parent.parent
    calls = [
        (path, node)
        for folder in ("flcompress", "passes", "exporters", "tests")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fork_rng"
    ]
    assert len(calls) > 8
    assert [str(path) for path, node in calls if "devices" not in [one.arg for one in node.keywords]] == []
