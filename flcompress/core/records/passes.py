"""What passes write: their results, and the limits, breaches and redraws of a training."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, FiniteFloat, field_validator

from flcompress.core.records.base import Part, Record
from flcompress.core.records.run import MetricsLine

RESULT_FILE = "result.json"
"""In a pass's folder: its own summary, which the report shows."""

Row = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


class BlockScore(Part):
    """Importance of one block; a level is (lowest, highest noise level, mean, standard error)."""

    path: str
    mean: FiniteFloat
    standard_error: FiniteFloat
    per_level: list[Row] = Field(default_factory=list)


class ImportanceResult(Record):
    """`result.json` of importance.

    `sureness` is, for the 1, 2, ... least important blocks, the share of bootstrap resamplings in which they are the
    same; `membership`, likewise, the share in which a block is among them, where that is neither never nor always.
    """

    weighting: str
    draws: int
    levels: list[tuple[FiniteFloat, FiniteFloat]]
    blocks: list[BlockScore]
    sureness: list[FiniteFloat] = Field(default_factory=list)
    membership: list[dict[str, FiniteFloat]] = Field(default_factory=list)
    u_index: float | None
    seconds: FiniteFloat
    forwards_equivalent: FiniteFloat

    @field_validator("u_index")
    @classmethod
    def _defined(cls, u_index: float | None) -> float | None:
        """Return None for the NaN that earlier versions wrote of a model without a middle."""
        return None if u_index is not None and math.isnan(u_index) else u_index


class TemporalAttentionResult(Record):
    """`result.json` of temporal-attention; `uniform` is that of attention that is alike for all tokens."""

    draws: int
    uniform: FiniteFloat
    blocks: list[BlockScore]
    seconds: FiniteFloat


class CandidateRow(Part):
    """A set of blocks: the loss that skipping it adds, and its held-out loss after a short recovery."""

    name: str
    paths: list[str]
    mean: FiniteFloat
    standard_error: FiniteFloat
    recovered: FiniteFloat | None = None


class SelectResult(Record):
    """`result.json` of select; `candidates` are the least costly first, `chosen` is the name of one.

    `rank_correlation` is Spearman's, of the losses before and after recovery; `overlap` is the share of blocks that the
    chosen set and the single-block ranking's have in common (Jaccard index).
    """

    share: FiniteFloat
    draws: int
    candidates: list[CandidateRow]
    chosen: str
    rank_correlation: FiniteFloat | None = None
    overlap: FiniteFloat | None = None
    sets_scored: int


class PruneResult(Record):
    """`result.json` of prune; `kept` maps each remaining block to its path before the cut."""

    removed: list[str]
    kept: dict[str, str]
    parameters_before: int
    parameters_after: int
    share: FiniteFloat
    certificate: dict[str, Any]
    certified_on: str | dict[str, Any] = ""
    reasons: dict[str, str] = Field(default_factory=dict)


class StochasticDepthResult(Record):
    """`result.json` of stochastic-depth; `monitor` repeats the held-out evaluations of `metrics.jsonl`."""

    prune_set: list[str]
    removed_share: FiniteFloat
    by: str
    target: str
    monitor: list[MetricsLine] = Field(default_factory=list)


class StepsResult(Record):
    """`result.json` of a pass that only trains."""

    steps: int
    heldout_mean_square_error: FiniteFloat | None = None


class StudentResult(Record):
    """`result.json` of dmd and consistency: the student's schedule."""

    sigmas: list[FiniteFloat]
    timesteps: list[FiniteFloat]
    steps: int
    seconds: FiniteFloat


class LimitPart(Part):
    """Healthy range of one figure, the setting that holds it, and what to do beyond it."""

    setting: str
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    mend: str = ""


class HealthFile(Record):
    """`health.json`: the limits of a training, and the settings of `training.health` that gave them."""

    held_out: str
    limits: dict[str, LimitPart]
    every: int | None = None
    on_breach: str | None = None
    samples: int | None = None
    max_worsening: FiniteFloat | None = None
    max_drift: FiniteFloat | None = None
    deviation: tuple[FiniteFloat, FiniteFloat] | None = None
    motion: tuple[FiniteFloat, FiniteFloat] | None = None
    max_saturation: FiniteFloat | None = None
    max_critic_lag: FiniteFloat | None = None
    min_normaliser: FiniteFloat | None = None
    max_logit_gap: FiniteFloat | None = None
    max_grad_norm: FiniteFloat | None = None


class BreachLine(Record):
    """One line of `breaches.jsonl`; a value that is not finite is null."""

    step: int
    figure: str
    value: FiniteFloat | None = None
    redrawn: list[FiniteFloat | None] = Field(default_factory=list)
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    setting: str
    mend: str
    action: str
    best_step: int


DRAWN_FILE = "drawn.jsonl"


class DrawnLine(Record):
    """A line of `drawn.jsonl`: how the samples look that a step's strip shows; without a step, the teacher's.

    Attributes:
        flow: mean optical flow from frame to frame, in pixels at a shorter side of 256; None of pictures.
        saturation: mean of HSV's S.
        diversity: mean distance between them in random features; None of one alone.
    """

    step: int | None
    flow: FiniteFloat | None = None
    saturation: FiniteFloat
    diversity: FiniteFloat | None = None


class RedrawsLine(Record):
    """One line of `redraws.jsonl`: the figures of a held-out evaluation on other draws."""

    step: int
    draws: list[dict[str, float]]
    reference: list[dict[str, float]] = Field(default_factory=list)
