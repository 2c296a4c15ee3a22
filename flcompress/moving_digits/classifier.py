"""The fixed judge of the moving-digits benchmark: a small video network that classifies clips and rates their quality.

One trunk, four heads: digit, direction, speed, and imaging quality. The Frechet distance compares the trunk's last
vectors. It was trained once, on real clips only (`classifier_training`), is stored next to this file, and is
independent of any generator.

Imaging quality stands for VBench's (Huang et al. 2024), which asks MUSIQ, a no-reference quality predictor trained on
rated pictures. No ratings exist here, so the head was trained to regress how much synthetic damage (`damage`) a clip
has: 1 is a clean clip, 0 one damaged beyond use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from flcompress.errors import ModelError
from flcompress.moving_digits import digits

FOLDER = Path(__file__).parent / "classifier"
"""Folder of the stored classifier."""

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
WIDTHS = (16, 32, 48, 64)
KERNELS = (5, 3, 3, 3)
STRIDES = ((1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 2, 2))
FEATURES = 48


@dataclass(frozen=True, slots=True)
class Judgement:
    """The classifier's output for n clips.

    Attributes:
        features: [n, 48], each of variance one over real training clips.
        digit: class scores [n, 10].
        direction: class scores [n, 8].
        speed: class scores [n, 2].
        quality: [n] in [0, 1]; 1 is a clean clip.
    """

    features: torch.Tensor
    digit: torch.Tensor
    direction: torch.Tensor
    speed: torch.Tensor
    quality: torch.Tensor


class Classifier(nn.Module):
    """Four space-time convolutions, pooled by mean and maximum, one linear layer to the features, linear heads."""

    feature_mean: torch.Tensor
    feature_scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width_in = 3
        for width, kernel, stride in zip(WIDTHS, KERNELS, STRIDES, strict=True):
            layers += [
                nn.Conv3d(width_in, width, (3, kernel, kernel), stride, (1, kernel // 2, kernel // 2), bias=False),
                nn.BatchNorm3d(width),
                nn.ReLU(),
            ]
            width_in = width
        self.trunk = nn.Sequential(*layers)
        self.project = nn.Linear(2 * width_in, FEATURES)
        self.digit = nn.Linear(FEATURES, len(digits.DIGITS))
        self.direction = nn.Linear(FEATURES, len(digits.DIRECTIONS))
        self.speed = nn.Linear(FEATURES, len(digits.SPEEDS))
        self.quality = nn.Linear(FEATURES, 1)
        self.register_buffer("feature_mean", torch.zeros(FEATURES))
        self.register_buffer("feature_scale", torch.ones(FEATURES))

    def forward(self, clips: torch.Tensor) -> Judgement:
        """Judge clips [n, 3, 9, 32, 32] in [-1, 1]."""
        activations = self.trunk(clips)
        raw = self.project(torch.cat([activations.mean(dim=(2, 3, 4)), activations.amax(dim=(2, 3, 4))], dim=1))
        active = torch.relu(raw)
        return Judgement(
            features=(raw - self.feature_mean) / self.feature_scale,
            digit=self.digit(active),
            direction=self.direction(active),
            speed=self.speed(active),
            quality=torch.sigmoid(self.quality(active))[:, 0],
        )


@torch.no_grad()
def judge(classifier: Classifier, clips: torch.Tensor, batch: int = 128) -> Judgement:
    """Judge any number of clips, `batch` at a time."""
    parts = [classifier(part) for part in torch.split(clips, batch)]
    return Judgement(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Judgement)})


def labels(wanted: Sequence[digits.Caption]) -> torch.Tensor:
    """Return digit, direction and speed of captions: [n, 3]."""
    return torch.tensor([[c.digit, c.direction, c.speed] for c in wanted])


def load_classifier(folder: Path = FOLDER) -> Classifier:
    """Load the stored classifier, in evaluation mode and without gradients.

    Raises:
        ModelError: the folder lacks a file, or its weights are not this classifier's.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise ModelError(
            f"{path}: missing; expected the stored classifier; restore it or train one with "
            "python -m flcompress.moving_digits.classifier_training --out FOLDER"
        )
    classifier = Classifier()
    stored, expected = load_file(path), classifier.state_dict()
    differing = sorted(
        key for key in stored.keys() | expected.keys()
        if key not in stored or key not in expected or stored[key].shape != expected[key].shape
    )  # fmt: skip
    if differing:
        raise ModelError(f"{path}: tensor {differing[0]} is not as expected; these weights are of another classifier")
    classifier.load_state_dict(stored)
    return classifier.eval().requires_grad_(False)


@cache
def classifier_record(folder: Path = FOLDER) -> dict[str, Any]:
    """Return the record stored next to the weights: their training, and their accuracy on real held-out clips."""
    record: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return record
