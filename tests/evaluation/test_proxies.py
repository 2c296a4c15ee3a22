"""The weight-free figures on clips of known motion and damage: each moves as it must, and only where it must."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.clip_figures import Frames
from flcompress.clip_figures.drawn import clip_means, reduced
from flcompress.clip_figures.features import relations
from flcompress.clip_figures.motion import THRESHOLD, is_dynamic, motion, smoothness
from flcompress.clip_figures.pixels import PEAK, flicker, noise, psnr, ssim
from flcompress.evaluation.suites.clip_suite import ClipContext
from flcompress.evaluation.suites.proxies import Proxies
from flcompress.evaluation.suites.tables import Measurement
from tests.fixtures.synthetic_clips import VARIANTS, frozen, moving, texture

RATE = 8.0


def encode(frames: Frames) -> torch.Tensor:
    """An autoencoder of the tests: every fourth pixel."""
    return torch.from_numpy(frames[None, ::4, ::4, ::4].astype(np.float32)).permute(0, 4, 1, 2, 3) / 127.5 - 1.0


@cache
def measured(name: str) -> Measurement:
    clip = moving() if name == "plain" else VARIANTS[name]()
    context = ClipContext(frame_rate=RATE, encode=encode, image=moving()[0], teacher=moving())
    return Proxies().measure(clip, context)


UP, DOWN, SAME = "up", "down", "same"
# What must move, and what must not, by more than a twentieth; a figure that is not named may do either.
EXPECTED: dict[str, dict[str, str]] = {
    "frozen": {
        "flow": DOWN, "flicker": UP, "proxy_smoothness": SAME, "saturation": SAME, "contrast": SAME,
        "sharpness": SAME, "clipping": SAME, "first_frame_ssim": SAME, "first_frame_decay": DOWN,
    },
    "shuffled": {
        "flow": UP, "flicker": DOWN, "proxy_smoothness": DOWN, "saturation": SAME, "contrast": SAME,
        "sharpness": SAME, "noise": SAME,
    },
    "jittered": {"flow": UP, "flicker": DOWN, "proxy_smoothness": DOWN, "saturation": SAME, "contrast": SAME},
    "faded": {"contrast": DOWN, "sharpness": DOWN, "saturation": DOWN, "flow": SAME, "proxy_dynamic": SAME},
    "saturated": {"saturation": UP, "saturation_p95": UP, "contrast": SAME, "flow": SAME, "proxy_dynamic": SAME},
    "twice as fast": {"flow": UP, "flicker": DOWN, "saturation": SAME, "contrast": SAME, "sharpness": SAME},
    "blurred": {"sharpness": DOWN, "flow": SAME, "first_frame_ssim": DOWN},
    "noisy": {"noise": UP, "sharpness": UP, "first_frame_psnr": DOWN, "proxy_smoothness": DOWN},
}  # fmt: skip
LEAST = {"flicker": 0.002, "proxy_smoothness": 0.002}
"""Figures near 1 move by less than a twentieth where others of the clip double."""


@pytest.mark.parametrize("name", EXPECTED)
def test_every_figure_moves_as_it_must_and_only_where_it_must(name: str) -> None:
    plain, damaged = measured("plain").figures, measured(name).figures
    found = {}
    for key in EXPECTED[name]:
        least = LEAST.get(key, 0.05 * abs(plain[key]))
        change = damaged[key] - plain[key]
        found[key] = SAME if abs(change) <= least else UP if change > 0 else DOWN
    assert found == EXPECTED[name]


@pytest.mark.parametrize("pixels", [0.5, 1.0, 2.0, 4.0])
def test_flow_is_the_translation(pixels: float) -> None:
    result = motion(moving(pixels), RATE)
    assert result is not None
    assert result.flow * 96 / 256 == pytest.approx(pixels, rel=0.05)


def test_the_counting_rule_at_its_threshold() -> None:
    """At 480 pixels a pair moves above 11.25; of 41 sampled frames 10 pairs must."""
    assert THRESHOLD * 480 / 256.0 == 11.25
    assert not is_dynamic([11.2] * 40, 41, 480)
    assert is_dynamic([11.3] * 40, 41, 480)
    assert is_dynamic([11.3] * 10 + [0.0] * 30, 41, 480)
    assert not is_dynamic([11.3] * 9 + [0.0] * 31, 41, 480)


@pytest.mark.parametrize(("pixels", "dynamic"), [(2.0, False), (2.6, True)])
def test_a_clip_is_dynamic_by_its_flow(pixels: float, dynamic: bool) -> None:
    """2.25 pixels at 96; the estimate of the fastest pixels is right to a few in a hundred."""
    result = motion(moving(pixels, frames=9), RATE)
    assert result is not None
    assert result.dynamic is dynamic


def test_frames_beyond_eight_a_second_are_not_looked_at() -> None:
    slow, fast = motion(moving(2.0, frames=9), 8.0), motion(moving(1.0, frames=17), 16.0)
    assert slow is not None
    assert fast is not None
    assert fast.flow == pytest.approx(slow.flow, rel=0.05)


def test_figures_are_undefined_where_there_are_too_few_frames() -> None:
    short = motion(moving(frames=7), RATE)
    assert short is not None
    assert short.dynamic is None
    still = moving(frames=1)
    assert motion(still, RATE) is None
    assert smoothness(still) is smoothness(moving(frames=2)) is flicker(still) is None
    figures = Proxies().measure(still, ClipContext(frame_rate=RATE, encode=encode)).figures
    assert "flow" not in figures
    assert figures["saturation"] > 0.0


def test_flicker_is_vbenchs() -> None:
    clip = np.zeros((3, 4, 4, 3), np.uint8)
    clip[1] = 51
    assert flicker(clip) == pytest.approx((255 - 51) / 255)


def test_noise_is_its_deviation() -> None:
    draw = np.random.default_rng(0)
    assert noise(draw.normal(128.0, 10.0, (128, 128))) == pytest.approx(10.0, rel=0.05)


def test_equal_pictures_are_alike() -> None:
    picture = texture(64, 64)
    assert psnr(picture, picture) == PEAK
    assert ssim(picture, picture) == pytest.approx(1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.integers(1, 60))
def test_a_brighter_picture_has_the_psnr_of_its_error(seed: int, change: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 190, (16, 16, 3), dtype=np.uint8)
    assert psnr(picture, picture + np.uint8(change)) == pytest.approx(20.0 * np.log10(255.0 / change))


def test_temporal_structure_sees_the_order_of_frames_alone() -> None:
    clip = moving()
    assert np.abs(relations(frozen(clip)) - 1.0).max() < 1e-9
    brighter = np.asarray(clip + np.uint8(9), dtype=np.uint8)
    assert np.abs(relations(brighter) - relations(clip)).max() < 0.01
    assert np.abs(relations(VARIANTS["shuffled"]()) - relations(clip)).mean() > 0.02


def _measurements(count: int, pixels: float, seed: int = 0) -> list[Measurement]:
    context = ClipContext(frame_rate=RATE, encode=encode)
    return [
        Proxies().measure(moving(pixels, frames=9, height=32, width=32, seed=seed + n), context) for n in range(count)
    ]


def test_sets_and_prompts() -> None:
    suite, real, same = Proxies(), _measurements(8, 1.0), _measurements(8, 1.0, seed=100)
    still = _measurements(8, 0.0, seed=200)
    near, far = suite.of_set(same, real), suite.of_set(still, real)
    assert near["frechet_latents"] < far["frechet_latents"]
    assert suite.of_set(same[:1], real) == suite.of_set(same, []) == {}
    assert suite.of_prompt(real[:1]) == {}
    assert suite.of_prompt([real[0], real[0]])["diversity"] == 0.0
    assert suite.of_prompt(real)["diversity"] > 0.0
    assert suite.of_clip(still[0], real)["relation"] > suite.of_clip(same[0], real)["relation"]
    assert suite.of_clip(same[0], real)["proxy_imaging"] >= 0.0
    assert "proxy_imaging" not in suite.of_clip(same[0], real[:3])


def test_a_student_that_moves_little_or_saturates_is_reported() -> None:
    suite = Proxies()
    teacher, student = {"flow": 2.0, "saturation": 0.3}, {"flow": 1.5, "saturation": 0.4}
    moves, colours = suite.warnings({"teacher-50": teacher, "student": student}, {"saturation": True})
    assert moves.startswith("warning: the student moves 75% as much as teacher-50 (flow 1.5 against 2 pixels)")
    assert colours.startswith("warning: the student saturates more than teacher-50 (0.4 against 0.3")
    assert suite.warnings({"teacher-50": teacher, "student": {**teacher, "flow": 1.7}}, {"saturation": False}) == []
    assert suite.warnings({"teacher-50": teacher}, {}) == []


def test_what_a_training_draws_is_seen_at_a_small_size() -> None:
    large = [moving(2.0, frames=5, height=256, width=320, seed=seed) for seed in range(3)]
    whole, small = clip_means(large), clip_means([reduced(clip) for clip in large])
    assert reduced(large[0]).shape == (5, 128, 160, 3)
    assert whole["flow"] == pytest.approx(2.0, rel=0.05)
    assert small["flow"] == pytest.approx(2.0, rel=0.1)
    assert small["saturation"] == pytest.approx(whole["saturation"], rel=0.05)
    assert small["diversity"] == pytest.approx(whole["diversity"], rel=0.2)
    assert clip_means(large[:1]).keys() == {"flow", "saturation"}
    assert clip_means([clip[:1] for clip in large]).keys() == {"saturation", "diversity"}
    assert clip_means([large[0]] * 2)["diversity"] == 0.0
