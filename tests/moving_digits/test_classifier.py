from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flcompress.draws import generator
from flcompress.errors import ModelError
from flcompress.moving_digits import classifier_training as training
from flcompress.moving_digits.classifier import FOLDER, classifier_record, judge, load_classifier
from flcompress.moving_digits.damage import DAMAGES, Damage, damage

pytestmark = pytest.mark.e2e


def test_the_stored_accuracy_is_the_stored_weights() -> None:
    record = classifier_record()
    accuracy = training.accuracy(load_classifier(), 512, record["training"]["seed"] + 1)
    assert record["digit_accuracy"] >= 0.95
    assert record["direction_accuracy"] >= 0.99
    assert accuracy["digit_accuracy"] == pytest.approx(record["digit_accuracy"], abs=0.03)
    assert accuracy["direction_accuracy"] >= 0.99
    assert accuracy["quality_correlation"] > 0.85


def test_features_have_unit_scale_on_training_clips() -> None:
    clips, _ = training.real_clips(512, "train", generator(5))
    features = judge(load_classifier(), clips).features
    assert float(features.mean().abs()) < 0.1
    assert float(features.std(dim=0).mean()) == pytest.approx(1.0, abs=0.1)


def test_judging_does_not_depend_on_the_batch() -> None:
    """In fp64, where the kernels that another batch takes round a billionth of what a clip's neighbours would do."""
    clips, _ = training.real_clips(7, "heldout", generator(0))
    classifier, clips = load_classifier().double(), clips.double()
    torch.testing.assert_close(judge(classifier, clips, 3).features, judge(classifier, clips).features)


@pytest.mark.parametrize("apply", DAMAGES, ids=lambda d: d.__name__)
def test_more_damage_is_judged_worse(apply: Damage) -> None:
    clips, _ = training.real_clips(48, "heldout", generator(1))
    classifier = load_classifier()
    said = [
        float(judge(classifier, apply(clips, torch.full((48,), s), generator(2)).clamp(-1, 1)).quality.mean())
        for s in (0.0, 0.4, 0.9)
    ]
    assert said == sorted(said, reverse=True)
    assert said[0] - said[2] > 0.3


@pytest.mark.parametrize("apply", DAMAGES, ids=lambda d: d.__name__)
def test_no_strength_is_no_damage(apply: Damage) -> None:
    clips, _ = training.real_clips(4, "heldout", generator(1))
    torch.testing.assert_close(apply(clips, torch.zeros(4), generator(2)), clips, atol=1e-4, rtol=0)


@given(st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_damage_keeps_shape_and_range_and_says_how_much(seed: int) -> None:
    clips, _ = training.real_clips(16, "heldout", generator(seed))
    damaged, quality = damage(clips, generator(seed, "damage"))
    assert damaged.shape == clips.shape
    assert float(damaged.abs().max()) <= 1.0
    assert bool(((quality >= 0.0) & (quality <= 1.0)).all())
    clean = quality == 1.0
    torch.testing.assert_close(damaged[clean], clips[clean])


def test_training_again_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STATISTICS_CLIPS", 64)
    monkeypatch.setattr(training, "BATCH", 16)
    steps: list[int] = []
    for name in ("a", "b"):
        record = training.train_classifier(tmp_path / name, 2, 3, lambda done, total, values: steps.append(done), 32)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert steps == [1, 2, 1, 2]
    assert classifier_record(tmp_path / "b") == record
    load_classifier(tmp_path / "b")


def test_a_missing_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model\.safetensors: missing; .* python -m flcompress\.moving_digits\.classifier_training"
    ):
        load_classifier(tmp_path)


def test_weights_of_another_classifier_are_named(tmp_path: Path) -> None:
    weights = load_file(FOLDER / "model.safetensors")
    weights["digit.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensor digit\.weight is not as expected"):
        load_classifier(tmp_path)
