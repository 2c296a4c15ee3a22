"""From measurements to tables: means, intervals over prompts or seeds, paired differences, the real clips' own row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from flcompress.core.records import ClipLine, ScoreLine
from flcompress.draws import generator
from flcompress.evaluation.clips.studio import Take
from flcompress.stats import Interval, bootstrap, interval, paired

Vector = np.ndarray[Any, np.dtype[np.float64]]

Values = dict[str, dict[str, float]]
"""Figure -> (prompt or seed) -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A column of a suite's table.

    Attributes:
        key: name in `results.json`.
        label: name for readers.
        better: -1 where lower is better, 1 where higher is, 0 where neither is better in itself.
        headline: whether the terminal shows it, and the report compares the student with the others by it.
    """

    key: str
    label: str
    better: int
    headline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a suite measured on one clip file.

    Attributes:
        figures: figure -> value; one that is undefined on this clip is not there.
        features: name -> vector, for figures of sets.
    """

    figures: Mapping[str, float]
    features: Mapping[str, Vector] = field(default_factory=dict)


class Judge(Protocol):
    """The part of a suite that turns measurements into figures; see `ClipSuite`."""

    @property
    def figures(self) -> tuple[Figure, ...]:
        """The columns of its table."""

    def of_clip(self, clip: Measurement, real: Sequence[Measurement]) -> Mapping[str, float]:
        """Return the figures of one clip."""

    def of_prompt(self, clips: Sequence[Measurement]) -> Mapping[str, float]:
        """Return the figures of all clips of one prompt together."""

    def of_set(self, clips: Sequence[Measurement], real: Sequence[Measurement]) -> Mapping[str, float]:
        """Return the figures of all clips of one seed together."""

    def warnings(self, figures: Mapping[str, Mapping[str, float]], surely_higher: Mapping[str, bool]) -> list[str]:
        """Return what a person should read first."""


@dataclass(frozen=True, kw_only=True)
class Sets:
    """All measurements of an evaluation.

    Attributes:
        takes: the clips that every contender made, in order.
        clips: contender -> its measurements, in the order of `takes`; the teacher comes first.
        real: measurements of real clips; may be empty.
        lines: contender -> what the manifest says of its clips, in the order of `takes`.
    """

    takes: Sequence[Take]
    clips: Mapping[str, Sequence[Measurement]]
    real: Sequence[Measurement]
    lines: Mapping[str, Sequence[ClipLine]]


def tables(suite: Judge, sets: Sets, rows: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], list[ScoreLine]]:
    """Return the figures of `results.json`, and the figures of every clip.

    Figures of clips and prompts have bootstrap intervals over prompts; those of sets Student's over seeds, since a set
    that is drawn with replacement holds clips twice, and is further from reality for it.

    Args:
        suite: says what the figures are.
        sets: the measurements.
        rows: contender -> the facts of its row.
    """
    by_prompt, by_seed, scores = {}, {}, []
    for name, clips in sets.clips.items():
        by_prompt[name], lines = _of_prompts(suite, sets, name, clips)
        by_seed[name] = _of_sets(suite, sets, clips)
        scores += lines
    keys = [figure.key for figure in suite.figures]
    contenders = []
    for name, row in rows.items():
        figures = {key: _measured(by_prompt[name].get(key), by_seed[name].get(key)) for key in keys}
        contenders.append({**row, **{key: value for key, value in figures.items() if value is not None}})
    differences = [
        {"a": a, "b": b, "metric": key, **asdict(difference)}
        for b, a in itertools.combinations(rows, 2)
        for key in keys
        if (difference := _difference(key, a, b, by_prompt, by_seed)) is not None
    ]
    means = {row["name"]: {key: row[key]["mean"] for key in keys if key in row} for row in contenders}
    first = next(iter(rows))
    higher = {each["metric"]: each["low"] > 0.0 for each in differences if (each["a"], each["b"]) == ("student", first)}
    return {
        "floor": _floor(suite, sets),
        "contenders": contenders,
        "paired": differences,
        "figures": [asdict(figure) for figure in suite.figures],
        "warnings": suite.warnings(means, higher),
    }, scores


def _of_prompts(suite: Judge, sets: Sets, name: str, clips: Sequence[Measurement]) -> tuple[Values, list[ScoreLine]]:
    groups: dict[str, list[int]] = {}
    for index, take in enumerate(sets.takes):
        groups.setdefault(take.item.key, []).append(index)
    figures = [dict(suite.of_clip(clip, sets.real)) for clip in clips]
    values: Values = {}
    for prompt, indices in groups.items():
        gathered: dict[str, list[float]] = {}
        for index in indices:
            for key, value in figures[index].items():
                gathered.setdefault(key, []).append(value)
        for key, numbers in gathered.items():
            values.setdefault(key, {})[prompt] = sum(numbers) / len(numbers)
        for key, value in suite.of_prompt([clips[index] for index in indices]).items():
            values.setdefault(key, {})[prompt] = value
    lines = [
        ScoreLine(contender=name, file=take.file, prompt=take.item.prompt, seed=take.seed, figures=own)
        for take, own in zip(sets.takes, figures, strict=True)
    ]
    return values, lines


def _of_sets(suite: Judge, sets: Sets, clips: Sequence[Measurement]) -> Values:
    values: Values = {}
    for seed in dict.fromkeys(take.seed for take in sets.takes):
        own = [clip for clip, take in zip(clips, sets.takes, strict=True) if take.seed == seed]
        for key, value in suite.of_set(own, sets.real).items():
            values.setdefault(key, {})[str(seed)] = value
    return values


def _measured(prompts: Mapping[str, float] | None, seeds: Mapping[str, float] | None) -> dict[str, Any] | None:
    if prompts:
        return {**asdict(bootstrap(list(prompts.values()))), "values": list(prompts.values())}
    if seeds:
        return {**asdict(interval(list(seeds.values()))), "values": list(seeds.values())}
    return None


def _difference(
    key: str, a: str, b: str, by_prompt: Mapping[str, Values], by_seed: Mapping[str, Values]
) -> Interval | None:
    """Return the interval of a - b over what both have; None if that is nothing."""
    for values, over_seeds in ((by_prompt, False), (by_seed, True)):
        left, right = values[a].get(key, {}), values[b].get(key, {})
        shared = [each for each in left if each in right]
        if shared:
            ours, theirs = [left[each] for each in shared], [right[each] for each in shared]
            if over_seeds:
                return paired(ours, theirs)
            return bootstrap([x - y for x, y in zip(ours, theirs, strict=True)])
    return None


def _floor(suite: Judge, sets: Sets) -> dict[str, Any]:
    """Return the real clips' own figures; those of sets are of as many of them against the rest, once for each seed."""
    if not sets.real:
        return {}
    values: dict[str, list[float]] = {}
    for clip in sets.real:
        for key, value in suite.of_clip(clip, sets.real).items():
            values.setdefault(key, []).append(value)
    floor = {key: asdict(bootstrap(numbers)) for key, numbers in values.items()}
    seeds = list(dict.fromkeys(take.seed for take in sets.takes))
    size = min(len(sets.takes) // len(seeds), len(sets.real) // 2)
    drawn: dict[str, list[float]] = {}
    for seed in seeds:
        order = torch.randperm(len(sets.real), generator=generator("evaluation", "floor", seed)).tolist()
        chosen, rest = ([sets.real[index] for index in part] for part in (order[:size], order[size:]))
        for key, value in suite.of_set(chosen, rest).items():
            drawn.setdefault(key, []).append(value)
    return floor | {key: {**asdict(interval(numbers)), "values": numbers} for key, numbers in drawn.items()}
