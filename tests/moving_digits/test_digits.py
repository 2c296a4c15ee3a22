from __future__ import annotations

import torch

from flcompress.draws import generator
from flcompress.moving_digits import digits


def test_captions_are_split_evenly_and_do_not_overlap() -> None:
    train, heldout = digits.captions("train"), digits.captions("heldout")
    assert (len(train), len(heldout)) == (128, 32)
    assert not set(train) & set(heldout)
    assert {caption.digit for caption in heldout} == set(range(10))
    assert {caption.direction for caption in heldout} == set(range(8))
    assert {caption.speed for caption in heldout} == {0, 1}


def test_a_caption_reads_as_a_sentence() -> None:
    assert digits.Caption(3, 5, 1).text == "a three drifting up and left, fast"


def test_clips_have_the_stated_shape_and_range_and_a_seed_repeats_them() -> None:
    clips, wanted = digits.sample(6, "train", generator(0, "test"))
    again, _ = digits.sample(6, "train", generator(0, "test"))
    assert clips.shape == (6, 3, 9, 32, 32)
    assert len(wanted) == 6
    assert float(clips.min()) >= -1.0
    assert float(clips.max()) <= 1.0
    assert torch.equal(clips, again)


def test_the_digit_moves_where_the_caption_says_and_stays_in_the_picture() -> None:
    wanted = tuple(c for c in digits.captions("train") if c.speed == 1)[:64]
    clips = digits.render(wanted, "train", generator(0, "motion"))
    ink = (clips[:, 0] + 1.0) / 2.0
    mass = ink.sum(dim=(2, 3))
    assert float((mass / mass.mean(dim=1, keepdim=True) - 1.0).abs().max()) < 0.1  # nothing is cut off at an edge
    x = (ink.sum(dim=2) * torch.arange(32)).sum(dim=2) / mass
    y = (ink.sum(dim=3) * torch.arange(32)).sum(dim=2) / mass
    moved = torch.atan2(y[:, -1] - y[:, 0], x[:, -1] - x[:, 0]) / (torch.pi / 4)
    directions = torch.tensor([c.direction for c in wanted])
    assert torch.equal(moved.round().long() % 8, directions)
