from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.draws import generator
from flcompress.errors import RequestError
from flcompress.stats import Interval, frechet_distance, interval, paired

seeds = st.integers(0, 2**31)
dimensions = st.integers(1, 12)


def features(seed: int, n: int, d: int) -> torch.Tensor:
    draw = generator(seed)
    return torch.randn(n, d, generator=draw) @ torch.randn(d, d, generator=draw) + torch.randn(d, generator=draw)


def rounded(*sets: torch.Tensor) -> float:
    """What rounding can do to a distance: fp64 eigenvalues are off by eps times the trace S at most for each of their
    D dimensions, their roots by the root of that where an eigenvalue is zero, and D of them are added: D eps^1/2 S."""
    spread = sum(float(one.double().var(dim=0).sum()) for one in sets)
    return float(sets[0].shape[1] * math.sqrt(torch.finfo(torch.float64).eps) * spread)


@given(seeds, dimensions)
@settings(max_examples=25, deadline=None)
def test_frechet_of_a_set_with_itself_is_zero_and_order_is_nothing(seed: int, d: int) -> None:
    a = features(seed, 40, d)
    shuffled = a[torch.randperm(40, generator=generator(seed))]
    assert frechet_distance(a, shuffled) == pytest.approx(0.0, abs=rounded(a, a))


@given(seeds, dimensions)
@settings(max_examples=25, deadline=None)
def test_frechet_is_symmetric_and_not_negative(seed: int, d: int) -> None:
    a, b = features(seed, 40, d), features(seed + 1, 30, d)
    there = frechet_distance(a, b)
    assert there >= 0.0
    assert there == pytest.approx(frechet_distance(b, a), rel=0.0, abs=rounded(a, b))


@given(seeds, dimensions)
@settings(max_examples=25, deadline=None)
def test_frechet_of_a_moved_set_is_the_move_squared(seed: int, d: int) -> None:
    a, move = features(seed, 40, d).double(), torch.randn(d, generator=generator(seed)).double()
    expected = float(move.square().sum())
    assert frechet_distance(a, a + move) == pytest.approx(expected, rel=1e-12, abs=rounded(a, a))


@given(seeds, dimensions, st.floats(0.1, 5.0))
@settings(max_examples=25, deadline=None)
def test_frechet_of_a_scaled_set(seed: int, d: int, scale: float) -> None:
    """Covariances S and k^2 S commute: the distance is (k - 1)^2 tr S."""
    a = features(seed, 40, d).double()
    a = a - a.mean(dim=0)
    expected = (scale - 1.0) ** 2 * float(a.square().sum()) / 39
    assert frechet_distance(a, scale * a) == pytest.approx(expected, rel=1e-12, abs=rounded(a, scale * a))


def test_frechet_bears_fewer_samples_than_dimensions() -> None:
    a, b = features(0, 5, 12), features(1, 4, 12)
    assert math.isfinite(frechet_distance(a, b))


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_frechet_rises_with_noise(seed: int) -> None:
    a, other = features(seed, 400, 6), torch.randn(400, 6, generator=generator(seed, "noise"))
    distances = [frechet_distance(a, a + level * other) for level in (0.0, 1.0, 3.0, 9.0)]
    assert distances == sorted(distances)


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5,))])
def test_frechet_names_a_set_it_cannot_use(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(RequestError, match="expected \\[n >= 2, D\\]"):
        frechet_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_interval_is_students() -> None:
    made = interval([1.0, 2.0, 3.0])
    assert made.mean == 2.0
    assert made.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2.0 - made.low == pytest.approx(made.high - 2.0)


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(RequestError, match="seeds: 1 given, expected at least 2"):
        interval([1.0])


def test_paired_differences_ignore_what_seeds_share() -> None:
    made = paired([1.0, 5.0, 9.0], [0.5, 4.5, 8.5])
    assert made == Interval(0.5, 0.5, 0.5)
