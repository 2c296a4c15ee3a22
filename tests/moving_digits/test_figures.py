from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.draws import generator
from flcompress.moving_digits import digits, figures
from tests.test_stats import features

seeds = st.integers(0, 2**31)


def square(path: list[tuple[float, float]]) -> torch.Tensor:
    """One clip of a soft spot at the positions (y, x)."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    frames = [torch.exp(-((y - a).square() + (x - b).square()) / 8.0) for a, b in path]
    return (2.0 * torch.stack(frames) - 1.0).expand(1, 3, -1, -1, -1)


def test_uniform_motion_is_smooth_and_dynamic() -> None:
    clip = square([(10.0 + f, 8.0 + 1.5 * f) for f in range(9)])
    assert float(figures.motion_smoothness(clip)) > 0.99
    assert bool(figures.moves(clip))


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_jitter_lowers_smoothness(seed: int) -> None:
    jitter = torch.randn(9, 2, generator=generator(seed))
    scores = [
        float(figures.motion_smoothness(square([(12.0 + s * float(j[0]) + f, 16.0 + s * float(j[1])) for f, j in
                                                enumerate(jitter)])))
        for s in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[2] > 0.1
    assert all(0.0 <= score <= 1.0 for score in scores)


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_empty_and_flat_clips_do_not_move_and_give_numbers(level: float) -> None:
    clips = torch.full((2, 3, 9, 32, 32), level)
    assert not figures.moves(clips).any()
    assert figures.motion_smoothness(clips).tolist() == pytest.approx([1.0, 1.0])


def test_a_vanishing_digit_does_not_count_as_moving() -> None:
    clip = square([(8.0, 8.0)] * 9).clone()
    for gone in ([0, 1, 2], [7, 8], [4]):
        broken = clip.clone()
        broken[:, :, gone] = -1.0
        assert not figures.moves(broken).any()
        assert float(figures.motion_smoothness(broken)) == pytest.approx(1.0)


def test_real_clips_are_smooth_and_move() -> None:
    clips, _ = digits.sample(64, "heldout", generator(0))
    assert float(figures.motion_smoothness(clips).mean()) > 0.93
    assert figures.moves(clips).all()


def judged(n: int, **given: torch.Tensor) -> dict[str, torch.Tensor]:
    ones = torch.ones(n)
    names = ("digit", "direction", "speed", "smoothness", "quality", "moves", "identity")
    return {"features": features(0, n, 4), "fixed_features": features(2, n, 3), **dict.fromkeys(names, ones), **given}


REFERENCE = {"features": features(1, 9, 4), "fixed_features": features(3, 9, 3)}


def test_prompt_accuracy_wants_digit_and_direction() -> None:
    digit, direction = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    made = figures.benchmark_figures(judged(4, digit=digit, direction=direction), REFERENCE)
    assert (made["prompt_accuracy"], made["digit_accuracy"], made["direction_accuracy"]) == (0.25, 0.5, 0.5)
    assert made["average"] == pytest.approx((0.5 + 0.5 + 3.0) / 5)


def test_identity_is_the_share_of_the_most_frequent_digit() -> None:
    shown = torch.tensor([[3] * 9, [3] * 5 + [2] * 4, [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    assert figures.identity(shown).tolist() == pytest.approx([1.0, 5 / 9, 1 / 9])


@given(st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_the_scale_of_the_fixed_features_does_not_matter(scale: float) -> None:
    """They have none of their own: the distance is in deviations of the real clips."""
    plain = figures.benchmark_figures(judged(9), REFERENCE)
    scaled = {"fixed_features": scale * features(2, 9, 3).double()}
    reference = {**REFERENCE, "fixed_features": scale * REFERENCE["fixed_features"].double()}
    other = figures.benchmark_figures({**judged(9), **scaled}, reference)
    assert other["frechet_fixed"] == pytest.approx(plain["frechet_fixed"], rel=1e-4, abs=1e-6)
    assert other["frechet"] == plain["frechet"]
