"""From scores of clips to VBench-I2V's figures: means of its dimensions, averages, intervals over prompts.

Means and normalisation are VBench's own (`vbench/*.py` and `scripts/constant.py`, commit 45e79ec). A dimension is the
mean over clips; the two consistencies are means over frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flcompress.errors import FlcompressError
from flcompress.stats import Interval

SUBJECT = (
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "subject_consistency",
    "i2v_subject",
)
"""Dimensions of a picture with a subject; those of one without are `BACKGROUND`."""
BACKGROUND = ("aesthetic_quality", "imaging_quality", "background_consistency", "i2v_background")
DIMENSIONS = (*SUBJECT, "background_consistency", "i2v_background")

OVER_FRAMES = frozenset({"subject_consistency", "background_consistency"})
"""Dimensions that are means over frames, each compared with the one before, and not over clips."""

AVERAGES = {
    "average4": ("motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality"),
    "average6": (
        "motion_smoothness",
        "dynamic_degree",
        "aesthetic_quality",
        "imaging_quality",
        "i2v_subject",
        "i2v_background",
    ),
}
"""Plain means of raw dimensions; see docs/evaluation.md for what papers print."""

QUALITY = (*AVERAGES["average4"], "subject_consistency", "background_consistency")
FROM_IMAGE = ("i2v_subject", "i2v_background", "camera_motion")
RANGES = {
    "i2v_subject": (0.1462, 1.0),
    "i2v_background": (0.2615, 1.0),
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "motion_smoothness": (0.706, 0.9975),
}
"""Dimension -> the values that the leaderboard takes for 0 and 1; (0, 1) for every other."""
WEIGHTS = {"dynamic_degree": 0.5, "camera_motion": 0.1}
"""Dimension -> its weight in the leaderboard's scores; 1 for every other."""

DRAWS = 2000

Vector = np.ndarray[Any, np.dtype[np.float64]]


def averages(dimensions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the averages of dimensions in [0, 1], numbers or arrays, each only if it has all of its dimensions.

    `total` is the leaderboard's, the mean of its quality and I2V scores. Without camera motion, whose 763 prompts are
    not sampled, it is the same formula over what there is.
    """
    found = {
        name: sum(dimensions[each] for each in wanted) / len(wanted)
        for name, wanted in AVERAGES.items()
        if all(each in dimensions for each in wanted)
    }
    if all(each in dimensions for each in (*QUALITY, *FROM_IMAGE[:2])):
        parts = [
            _weighted(dimensions, [each for each in names if each in dimensions]) for names in (QUALITY, FROM_IMAGE)
        ]
        found["total"] = (parts[0] + parts[1]) / 2.0
    return found


def _weighted(dimensions: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the weighted mean of normalised dimensions."""
    whole = sum(WEIGHTS.get(name, 1.0) for name in names)

    def part(name: str) -> Any:
        low, high = RANGES.get(name, (0.0, 1.0))
        return (dimensions[name] - low) * (WEIGHTS.get(name, 1.0) / (high - low) / whole)

    return sum(map(part, names))


@dataclass(frozen=True, kw_only=True)
class ClipScores:
    """The scores of one clip.

    Attributes:
        prompt: what it was made from.
        file: its name, for messages.
        dimensions: what is expected of it.
        scores: dimension -> score.
        frames: how many it has.
    """

    prompt: str
    file: str
    dimensions: Sequence[str]
    scores: Mapping[str, float]
    frames: int


class Tally:
    """Sums over a contender's clips, prompt by prompt.

    Args:
        clips: all of them.

    Raises:
        FlcompressError: a clip lacks a dimension.
    """

    def __init__(self, clips: Sequence[ClipScores]) -> None:
        self.prompts = list(dict.fromkeys(clip.prompt for clip in clips))
        index = {prompt: number for number, prompt in enumerate(self.prompts)}
        self._sums = {name: np.zeros(len(self.prompts)) for name in DIMENSIONS}
        self._weights = {name: np.zeros(len(self.prompts)) for name in DIMENSIONS}
        self.kinds: list[tuple[str, ...]] = [()] * len(self.prompts)
        for clip in clips:
            self.kinds[index[clip.prompt]] = tuple(clip.dimensions)
            for name in clip.dimensions:
                if name not in clip.scores:
                    raise FlcompressError(f"{clip.file}: has no {name}; a missing clip would change the mean")
                weight = clip.frames - 1.0 if name in OVER_FRAMES else 1.0
                self._sums[name][index[clip.prompt]] += weight * clip.scores[name]
                self._weights[name][index[clip.prompt]] += weight

    def scores(self, counts: Vector) -> dict[str, Vector]:
        """Return dimensions and averages, [n] each, where prompt p counts `counts[n, p]` times."""
        wholes = {name: counts @ weights for name, weights in self._weights.items() if weights.any()}
        dimensions = {name: (counts @ self._sums[name]) / whole for name, whole in wholes.items()}
        return dimensions | averages(dimensions)

    def values(self, name: str) -> list[float]:
        """Return a dimension's means by prompt; none for an average, which is over different prompts."""
        if name not in self._sums:
            return []
        sums, weights = self._sums[name], self._weights[name]
        return [float(value) for value in sums[weights > 0.0] / weights[weights > 0.0]]


def draw_counts(kinds: Sequence[tuple[str, ...]]) -> Vector:
    """Return how often every prompt is drawn, [1 + DRAWS, prompts]: once each in the first row, then with replacement.

    Prompts of a kind are drawn among themselves, so that every dimension keeps its number of prompts. Always the same.
    """
    random = np.random.default_rng(0)
    counts = np.zeros((1 + DRAWS, len(kinds)))
    counts[0] = 1.0
    for kind in dict.fromkeys(kinds):
        members = np.flatnonzero([each == kind for each in kinds])
        counts[1:, members] = random.multinomial(len(members), np.full(len(members), 1.0 / len(members)), size=DRAWS)
    return counts


def score_tables(
    tallies: Mapping[str, Tally], rows: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows of contenders with their figures, and paired differences, with intervals by bootstrap over prompts.

    Every contender has the same prompts, drawn alike, so that a difference is between the same pictures and noises.
    """
    counts = draw_counts(next(iter(tallies.values())).kinds)
    drawn = {name: tally.scores(counts) for name, tally in tallies.items()}
    contenders = [
        {
            **row,
            **{
                key: {**asdict(_interval(values)), "values": tallies[name].values(key)}
                for key, values in drawn[name].items()
            },
        }
        for name, row in rows.items()
    ]
    paired = [
        {"a": a, "b": b, "metric": key, **asdict(_interval(drawn[a][key] - drawn[b][key]))}
        for b, a in itertools.combinations(rows, 2)
        for key in drawn[a]
    ]
    return contenders, paired


def _interval(values: Vector) -> Interval:
    """Return the first value with the percentile interval of the others."""
    mean = float(values[0])
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(mean, float(min(low, mean)), float(max(high, mean)))
