"""The joint score of a set of blocks against its closed formula, and the search that it guides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flcompress.distributed.world import World
from flcompress.errors import PreconditionError
from flcompress.ir.selection import choose
from flcompress.passes.importance import Importance
from flcompress.training.methods.joint_selection import JointLoss, Paths, Search, rank_correlation
from tests.fixtures.gaussian import COVARIANCE, SIZE, Clips, Exact, Normal, coefficients, graph_of, teacher_contract

OFF = torch.tensor([0.6, -0.3], dtype=torch.float64)
"""How far the whole model's mean is from the data's."""
REDUNDANT = [1.2, -0.6]
"""A shift of 2 OFF: without one such block the mean is as far off on the other side, without two three times as far."""
SHIFTS = [REDUNDANT, [0.3, 0.4], REDUNDANT, [-0.4, 0.3], [0.5, 0.5]]


def clips() -> Any:
    mean = torch.tensor(SHIFTS, dtype=torch.float64).sum(dim=0) - OFF
    return Clips(Normal(mean, COVARIANCE), torch.zeros(1, 1, SIZE))


def joint(batch: int = 16) -> JointLoss:
    model = Exact("flow", COVARIANCE, SHIFTS)
    return JointLoss(model, graph_of(model), teacher_contract("flow"), clips(), seed=0, batch=batch, world=World())


def names(*blocks: int) -> Paths:
    return tuple(f"blocks.{block}" for block in blocks)


@pytest.mark.parametrize("blocks", [(0,), (2,), (0, 2), (1, 3), (0, 1, 4)])
def test_the_joint_score_of_blocks_that_move_the_mean(blocks: tuple[int, ...]) -> None:
    """J(S) = E[w (|J (off - d_S)|^2 - |J off|^2)] per element, s uniform; d_S is the sum of the set's shifts."""
    values = joint()([names(*blocks)], 0, 4096)[0]
    d = torch.tensor([SHIFTS[block] for block in blocks], dtype=torch.float64).sum(dim=0)
    level = 0.02 * 49 ** ((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    density = level * torch.log(torch.tensor(49.0, dtype=torch.float64)) / 0.96
    a, b = coefficients("flow", 1000.0 * level)
    noised = a[:, None, None] ** 2 * COVARIANCE + b[:, None, None] ** 2 * torch.eye(SIZE, dtype=torch.float64)
    J = torch.eye(SIZE, dtype=torch.float64) - a[:, None, None] ** 2 * COVARIANCE @ torch.linalg.inv(noised)
    without, whole = ((J @ shift).square().mean(1) for shift in (OFF - d, OFF))
    expected = float((density * (1.0 - level) / level**3 * (without - whole)).mean())
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - expected) < 4.0 * error
    assert error < 0.1 * abs(expected) + 0.06


def test_planted_redundancy_is_seen_by_the_joint_score_and_missed_by_single_blocks() -> None:
    """Blocks 0 and 2 are each harmless to lose and fatal together."""
    model = Exact("flow", COVARIANCE, SHIFTS)
    graph, contract = graph_of(model), teacher_contract("flow")
    importance = Importance(draws=4096, noise_levels=4, strata="log", batch=1024).scores
    estimates = importance.score(model, graph, contract, clips(), 0, lambda *_: None, World()).estimates()
    ranked = choose(graph.with_importance(estimates), 0.25, "importance")
    assert ranked == names(0, 2)
    search = Search(scores=joint(), graph=graph, share=0.25, draws=512)
    best, *others = search.candidates({"importance": ranked})
    assert best.paths != names(0, 2)
    assert len({"blocks.0", "blocks.2"} & set(best.paths)) == 1
    (single,) = [candidate for candidate in others if candidate.name == "importance"]
    assert single.mean > best.mean + 5.0 * (single.standard_error + best.standard_error)


def test_draws_do_not_depend_on_how_they_are_grouped_into_calls() -> None:
    sets = [names(1), names(0, 3)]
    whole = joint()(sets, 0, 64)
    parts = torch.cat([joint()(sets, 0, 16), joint()(sets, 16, 48)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    (alone,) = joint()(sets[1:], 0, 64)
    torch.testing.assert_close(alone, whole[1], rtol=1e-6, atol=1e-9)


def quadratic(singles: Sequence[float], pairs: torch.Tensor, noise: float = 0.0) -> Any:
    """Costs of sets with interactions; the noise is a draw's own, shared by all sets."""

    def scores(sets: Sequence[Paths], first: int, count: int) -> torch.Tensor:
        shared = torch.randn(first + count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[first:]
        rows = []
        for paths in sets:
            member = torch.zeros(len(singles), dtype=torch.float64)
            member[[int(path.rpartition(".")[2]) for path in paths]] = 1.0
            cost = float(member @ torch.tensor(singles, dtype=torch.float64) + member @ pairs @ member / 2)
            rows.append(cost + noise * shared)
        return torch.stack(rows)

    return scores


@given(st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6), st.floats(0.05, 0.9))
def test_without_interactions_the_search_is_the_ranking(singles: list[float], share: float) -> None:
    graph = graph_of(Exact("flow", COVARIANCE, [[0.0, 0.0]] * 6))
    search = Search(scores=quadratic(singles, torch.zeros(6, 6).double(), 1.0), graph=graph, share=share, draws=32)
    if share > 5 * SIZE / graph.parameters:
        with pytest.raises(PreconditionError, match="one must stay"):
            search.greedy()
        return
    greedy = search.greedy()
    needed = next(n for n in range(1, 6) if n * SIZE >= share * graph.parameters)
    assert len(greedy) == needed
    cost = sum(singles[int(path.rpartition(".")[2])] for path in greedy)
    assert cost == pytest.approx(sum(sorted(singles)[:needed]))
    assert search.swap(greedy) == greedy


def test_a_swap_leaves_what_greed_cannot() -> None:
    """Block 0 alone is the cheapest, but every pair with it is dear; the best pair is 1 and 2."""
    pairs = torch.zeros(4, 4, dtype=torch.float64)
    pairs[0, 1:] = pairs[1:, 0] = 5.0
    graph = graph_of(Exact("flow", COVARIANCE, [[0.0, 0.0]] * 4))
    search = Search(scores=quadratic([0.1, 0.2, 0.3, 0.9], pairs), graph=graph, share=0.25, draws=16)
    greedy = search.greedy()
    assert "blocks.0" in greedy
    assert search.swap(greedy) == names(1, 2)
    assert search.candidates({})[0].paths == names(1, 2)


def test_blocks_that_cannot_go_and_runs_across_them_are_left_alone() -> None:
    graph = graph_of(Exact("flow", COVARIANCE, [[0.0, 0.0]] * 5))
    graph = graph.with_blocks([replace(graph.block("blocks.1"), removable=False)])
    search = Search(scores=quadratic([0.5, 0.0, 0.4, 0.3, 0.6], torch.zeros(5, 5).double()), graph=graph,
                    share=0.25, draws=16)  # fmt: skip
    assert search.greedy() == names(2, 3)
    assert search.contiguous() == names(2, 3)


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
