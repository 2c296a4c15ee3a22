"""The judge of single frames, and features that no training ever saw."""

from __future__ import annotations

import torch

from flcompress.draws import generator
from flcompress.moving_digits import damage, digits
from flcompress.moving_digits.classifier import labels, load_classifier
from flcompress.moving_digits.figures import centroids, identity
from flcompress.moving_digits.fixed_features import FEATURES, fixed_features
from flcompress.moving_digits.frames import drifting, frame_digits
from flcompress.stats import frechet_distance

CAPTIONS = digits.captions("heldout")
CLIPS = digits.render(CAPTIONS, "heldout", generator("frames"))


def test_a_frame_drifts_by_one_pixel_across_the_middle() -> None:
    made = drifting(CLIPS[:4])
    assert made.shape == (36, 3, 9, 32, 32)
    whole = CLIPS[:4].transpose(1, 2).reshape(36, 3, 32, 32)
    middle = made[:, :, 4]
    # The picture is moved by whole pixels: all its ink is there, and nothing else.
    assert torch.equal(middle.flatten(1).sort(dim=1).values, whole.flatten(1).sort(dim=1).values)
    path = centroids(made)
    assert float((path[:, 4] - 16.0).abs().max()) <= 0.51
    steps = path.diff(dim=1)
    assert float((steps - torch.tensor([0.0, 1.0])).abs().max()) < 1e-6


def test_what_comes_in_from_outside_is_ground() -> None:
    clip = torch.full((1, 3, 9, 32, 32), -1.0)
    clip[..., 0:6, 0:6] = 1.0
    made = drifting(clip)
    assert float((made + 1.0).sum()) == 9 * 9 * 3 * 36 * 2.0
    assert bool(((made == -1.0) | (made == 1.0)).all())


def test_real_clips_keep_their_digit() -> None:
    clips, wanted = digits.sample(96, "heldout", generator("frames", "many"))
    shown = frame_digits(load_classifier(), clips)
    assert shown.shape == (96, 9)
    assert float((shown == labels(wanted)[:, :1]).double().mean()) > 0.93
    assert float(identity(shown).mean()) > 0.96


def test_a_digit_that_turns_into_another_is_seen() -> None:
    """Clips whose last four frames show another digit: five of nine agree."""
    other = digits.render(CAPTIONS[::-1], "heldout", generator("frames"))
    turned = torch.cat([CLIPS[:, :, :5], other[:, :, 5:]], dim=2)
    assert abs(float(identity(frame_digits(load_classifier(), turned)).mean()) - 5 / 9) < 0.04


def test_an_empty_clip_is_judged_too() -> None:
    empty = torch.full((1, 3, 9, 32, 32), -1.0)
    assert identity(frame_digits(load_classifier(), empty)).tolist() == [1.0]


def test_fixed_features_are_the_same_in_any_batch() -> None:
    whole = fixed_features(CLIPS)
    assert whole.shape == (len(CLIPS), FEATURES)
    assert torch.allclose(fixed_features(CLIPS, batch=5), whole, atol=1e-6)


def test_fixed_features_see_every_damage() -> None:
    """The distance to other real clips grows with the strength of each kind of damage."""
    real = fixed_features(digits.render(CAPTIONS * 8, "heldout", generator("frames", "reference")))
    scale = real.std(dim=0)
    for apply in damage.DAMAGES:
        distances = [
            frechet_distance(
                fixed_features(apply(CLIPS, torch.full((len(CLIPS),), strength), generator(0))) / scale, real / scale
            )
            for strength in (0.0, 0.3, 0.6)
        ]
        assert distances[0] < distances[1] < distances[2], apply
