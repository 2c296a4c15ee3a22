"""How sure an order of blocks is, and when a measurement may end early."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flcompress.distributed.world import World
from flcompress.passes.importance import Importance
from flcompress.training.methods.block_importance import Scored
from tests.fixtures.gaussian import COVARIANCE, Clips, Exact, Normal, graph_of, teacher_contract

SHIFTS = [[0.3, -0.2], [0.1, 0.1], [2.0, 1.0], [1.5, 1.5]]
GRAPH = graph_of(Exact("flow", COVARIANCE, SHIFTS))


def scored(*strata: torch.Tensor, widths: tuple[float, ...] = (1.0, 1.0)) -> Scored:
    return Scored(graph=GRAPH, levels=((0.0, 0.5), (0.5, 1.0)), widths=widths, strata=strata)


def test_blocks_that_never_change_places_are_certain() -> None:
    draws = torch.tensor([[3.0, 1.0, 2.0, 4.0]], dtype=torch.float64) + torch.rand(20, 4, dtype=torch.float64) / 10
    sure = scored(draws, draws + 1)
    assert [sure.sureness(count) for count in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert sure.membership(2) == {"blocks.0": 0.0, "blocks.1": 1.0, "blocks.2": 1.0, "blocks.3": 0.0}


def test_two_blocks_that_differ_by_luck_alone_are_not() -> None:
    """Blocks 1 and 2 have the same law, so either is ahead in a good part of the resamplings; 0 and 3 are not near."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(40, 4, generator=draw, dtype=torch.float64)
    draws = noise * torch.tensor([0.1, 1.0, 1.0, 0.1]) + torch.tensor([-5.0, 0.0, 0.0, 5.0])
    unsure = scored(draws[:20], draws[20:])
    assert unsure.sureness(1) == 1.0
    assert 0.5 < unsure.sureness(2) < 0.95
    assert unsure.sureness(3) == 1.0
    among = unsure.membership(2)
    assert (among["blocks.0"], among["blocks.3"]) == (1.0, 0.0)
    assert among["blocks.1"] + among["blocks.2"] == pytest.approx(1.0)
    assert max(among["blocks.1"], among["blocks.2"]) == pytest.approx(unsure.sureness(2))


def test_a_stratum_counts_by_its_width() -> None:
    low, high = torch.tensor([[1.0, 0.0, 5.0, 6.0]] * 4), torch.tensor([[0.0, 1.0, 5.0, 6.0]] * 4)
    wide_first = scored(low.double(), high.double(), widths=(0.9, 0.1))
    estimates = wide_first.estimates()
    assert [estimates[f"blocks.{block}"].mean for block in range(4)] == pytest.approx([0.9, 0.1, 5.0, 6.0])
    assert wide_first.membership(1)["blocks.1"] == 1.0
    assert scored(low.double(), high.double(), widths=(0.1, 0.9)).membership(1)["blocks.0"] == 1.0


def measure(**arguments: Any) -> Scored:
    step = Importance(draws=2048, noise_levels=4, batch=16, **arguments)
    model = Exact("flow", COVARIANCE, SHIFTS)
    mean = torch.tensor(SHIFTS, dtype=torch.float64).sum(dim=0)
    clips: Any = Clips(Normal(mean, COVARIANCE), torch.zeros(1, 1, 2))
    contract = teacher_contract("flow")
    return step.scores.score(model, GRAPH, contract, clips, 3, lambda *_: None, World())


def test_a_measurement_ends_when_the_set_is_certain_and_draws_are_then_those_of_the_whole() -> None:
    early, whole = measure(resolve=0.3), measure()
    assert early.draws < whole.draws == 2048
    assert early.sureness(early.least(0.3)) >= 0.95
    least = {path for path, share in early.membership(2).items() if share > 0.5}
    assert least == {"blocks.0", "blocks.1"}
    for part, every in zip(early.strata, whole.strata, strict=True):
        torch.testing.assert_close(part, every[: len(part)], rtol=1e-9, atol=1e-12)
