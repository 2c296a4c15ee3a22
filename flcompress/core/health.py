"""What a recipe says about watching a training: how often, within which limits, and what happens beyond them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

OnBreach = Literal["warn", "stop", "rollback"]
Limits = Mapping[str, tuple[float | None, float | None]]
"""Figure -> (lowest, highest) value that is healthy; None where there is no limit on that side."""


def _ascending(given: tuple[float, float]) -> tuple[float, float]:
    if given[0] > given[1]:
        raise ValueError(f"[{given[0]:g}, {given[1]:g}] given, expected [lowest, highest]")
    return given


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]


def highest(best: float, worsening: float, floor: float = 0.0) -> float:
    """The largest held-out figure that is not surely worse than the best one by more than a share.

    Args:
        best: the lowest figure so far.
        worsening: the share.
        floor: of a squared distance to a reference, which is made of few samples: the expected one of the reference
            itself, made again with other noises. That is twice the mean square of the reference's own error e. By the
            triangle inequality the distances to what the reference stands for are within |e| of the measured ones, now
            and at the best look.
    """
    if floor <= 0.0:
        return best * (1.0 + worsening)
    error = math.sqrt(floor / 2.0)
    return (math.sqrt(1.0 + worsening) * (math.sqrt(best) + error) + error) ** 2


class Health(BaseModel):
    """How trainings are watched. Every figure, its formula and what to do about it: docs/health.md.

    A limit of `null` is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(50, gt=0, description="steps between two looks at the held-out figures and the samples")
    on_breach: OnBreach = Field(
        "stop",
        description="warn says it and goes on; stop ends the run; rollback ends the pass with the weights of the look "
        "that had the best held-out figure",
    )
    samples: int = Field(8, ge=0, description="fixed prompts that stage III samples at every look; 0 for none")
    max_worsening: float | None = Field(
        2.0,
        gt=0,
        description="by what share the held-out figure may be worse than at the best look, beyond its own spread",
    )
    max_drift: float | None = Field(
        1.0, gt=0, description="by what share the full path's held-out ELBO may be worse than the original's (stage II)"
    )
    deviation: Range | None = Field((0.5, 2.0), description="latent deviation of the samples, over the teacher's")
    motion: Range | None = Field((0.2, 5.0), description="frame-to-frame change of the samples, over the teacher's")
    max_saturation: float | None = Field(
        0.1, gt=0, description="share of the samples' values beyond three of the teacher's deviations"
    )
    max_critic_lag: float | None = Field(
        1.0, gt=0, description="by what share the fake score's loss may exceed the one that it should have"
    )
    min_normaliser: float | None = Field(
        1e-4, gt=0, description="smallest mean |x_g - x_real| of a sample, by which its gradient is divided"
    )
    max_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm, before clipping")
