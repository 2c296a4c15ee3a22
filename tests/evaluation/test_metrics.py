from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.draws import generator
from flcompress.errors import RequestError
from flcompress.evaluation import metrics
from flcompress.moving_digits import digits

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


def square(path: list[tuple[float, float]]) -> torch.Tensor:
    """One clip of a soft spot at the given places (y, x)."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    frames = [torch.exp(-((y - a).square() + (x - b).square()) / 8.0) for a, b in path]
    return (2.0 * torch.stack(frames) - 1.0).expand(1, 3, -1, -1, -1)


@given(seeds, dimensions)
@settings(max_examples=25, deadline=None)
def test_frechet_of_a_set_with_itself_is_zero_and_order_is_nothing(seed: int, d: int) -> None:
    a = features(seed, 40, d)
    shuffled = a[torch.randperm(40, generator=generator(seed))]
    assert metrics.frechet_distance(a, shuffled) == pytest.approx(0.0, abs=rounded(a, a))


@given(seeds, dimensions)
@settings(max_examples=25, deadline=None)
def test_frechet_is_symmetric_and_not_negative(seed: int, d: int) -> None:
    a, b = features(seed, 40, d), features(seed + 1, 30, d)
    there = metrics.frechet_distance(a, b)
    assert there >= 0.0
    assert there == pytest.approx(metrics.frechet_distance(b, a), rel=0.0, abs=rounded(a, b))


@given(seeds, dimensions)
@settings(max_examples=25, deadline=None)
def test_frechet_of_a_moved_set_is_the_move_squared(seed: int, d: int) -> None:
    a, move = features(seed, 40, d).double(), torch.randn(d, generator=generator(seed)).double()
    expected = float(move.square().sum())
    assert metrics.frechet_distance(a, a + move) == pytest.approx(expected, rel=1e-12, abs=rounded(a, a))


@given(seeds, dimensions, st.floats(0.1, 5.0))
@settings(max_examples=25, deadline=None)
def test_frechet_of_a_scaled_set(seed: int, d: int, scale: float) -> None:
    """Covariances S and k^2 S commute: the distance is (k - 1)^2 tr S."""
    a = features(seed, 40, d).double()
    a = a - a.mean(dim=0)
    expected = (scale - 1.0) ** 2 * float(a.square().sum()) / 39
    assert metrics.frechet_distance(a, scale * a) == pytest.approx(expected, rel=1e-12, abs=rounded(a, scale * a))


def test_frechet_bears_fewer_samples_than_dimensions() -> None:
    a, b = features(0, 5, 12), features(1, 4, 12)
    assert math.isfinite(metrics.frechet_distance(a, b))


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_frechet_rises_with_noise(seed: int) -> None:
    a, other = features(seed, 400, 6), torch.randn(400, 6, generator=generator(seed, "noise"))
    distances = [metrics.frechet_distance(a, a + level * other) for level in (0.0, 1.0, 3.0, 9.0)]
    assert distances == sorted(distances)


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5,))])
def test_frechet_names_a_set_it_cannot_use(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(RequestError, match="expected \\[n >= 2, D\\]"):
        metrics.frechet_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_uniform_motion_is_smooth_and_dynamic() -> None:
    clip = square([(10.0 + f, 8.0 + 1.5 * f) for f in range(9)])
    assert float(metrics.motion_smoothness(clip)) > 0.99
    assert bool(metrics.moves(clip))


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_jitter_lowers_smoothness(seed: int) -> None:
    jitter = torch.randn(9, 2, generator=generator(seed))
    scores = [
        float(metrics.motion_smoothness(square([(12.0 + s * float(j[0]) + f, 16.0 + s * float(j[1])) for f, j in
                                                enumerate(jitter)])))
        for s in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[2] > 0.1
    assert all(0.0 <= score <= 1.0 for score in scores)


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_empty_and_flat_clips_do_not_move_and_give_numbers(level: float) -> None:
    clips = torch.full((2, 3, 9, 32, 32), level)
    assert not metrics.moves(clips).any()
    assert metrics.motion_smoothness(clips).tolist() == pytest.approx([1.0, 1.0])


def test_a_vanishing_digit_does_not_count_as_moving() -> None:
    clip = square([(8.0, 8.0)] * 9).clone()
    for gone in ([0, 1, 2], [7, 8], [4]):
        broken = clip.clone()
        broken[:, :, gone] = -1.0
        assert not metrics.moves(broken).any()
        assert float(metrics.motion_smoothness(broken)) == pytest.approx(1.0)


def test_real_clips_are_smooth_and_move() -> None:
    clips, _ = digits.sample(64, "heldout", generator(0))
    assert float(metrics.motion_smoothness(clips).mean()) > 0.93
    assert metrics.moves(clips).all()


def judged(n: int, **given: torch.Tensor) -> dict[str, torch.Tensor]:
    ones = torch.ones(n)
    names = ("digit", "direction", "speed", "smoothness", "quality", "moves")
    return {"features": features(0, n, 4), **dict.fromkeys(names, ones), **given}


def test_prompt_accuracy_wants_digit_and_direction() -> None:
    digit, direction = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    made = metrics.figures(judged(4, digit=digit, direction=direction), features(1, 9, 4))
    assert (made["prompt_accuracy"], made["digit_accuracy"], made["direction_accuracy"]) == (0.25, 0.5, 0.5)
    assert made["average"] == pytest.approx((0.5 + 0.5 + 3.0) / 5)


def test_interval_is_students() -> None:
    made = metrics.interval([1.0, 2.0, 3.0])
    assert made["mean"] == 2.0
    assert made["high"] - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2.0 - made["low"] == pytest.approx(made["high"] - 2.0)


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(RequestError, match="seeds: 1 given, expected at least 2"):
        metrics.interval([1.0])


def test_paired_differences_ignore_what_seeds_share() -> None:
    made = metrics.paired([1.0, 5.0, 9.0], [0.5, 4.5, 8.5])
    assert made == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
