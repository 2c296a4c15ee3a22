"""The arguments that all passes that train have in common: how many steps, and how the optimiser takes them."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import annotated_types
from pydantic import BaseModel, Field, model_validator

Schedule = Annotated[
    Literal["constant", "cosine", "linear"],
    Field(description="the learning rate after the warm-up: it stays, or falls until the last step"),
]
Warmup = Annotated[
    int, Field(ge=0, description="steps over which the learning rate rises linearly; by default no more than `steps`")
]
Beta = Annotated[float, annotated_types.Ge(0), annotated_types.Lt(1)]
Betas = Annotated[
    tuple[Beta, Beta],
    Field(description="decays of AdamW's first and second moment; a first of 0 keeps no momentum and half the memory"),
]


class Optimisation(BaseModel):
    """A pass that trains inherits from this, before `Pass`, and may have defaults of its own.

    `added` names arguments that are no part of a cache key while they have their default: results from before an
    argument existed stay valid.
    """

    added: ClassVar[tuple[str, ...]] = (
        "schedule",
        "warmup",
        "final_ratio",
        "weight_decay",
        "betas",
        "clip_grad_norm",
        "ema_start",
    )

    steps: int = Field(gt=0, description="optimiser steps")
    batch: int = Field(16, gt=0, description="clips per step")
    learning_rate: float = Field(1e-3, gt=0, description="learning rate after the warm-up")
    schedule: Schedule = "constant"
    warmup: Warmup = 0
    final_ratio: float = Field(
        0.02, ge=0, le=1, description="share of the learning rate at which a cosine or linear schedule ends"
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="AdamW's weight decay, of all trained parameters",
    )
    betas: Betas = (0.9, 0.999)
    clip_grad_norm: float = Field(1.0, gt=0, description="global norm that larger gradients are scaled down to")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the weights' moving average, which becomes the result; 0 keeps none"
    )
    ema_start: int = Field(0, ge=0, description="step after which the moving average begins, from the weights of then")

    @model_validator(mode="after")
    def _fits_in_the_steps(self) -> Optimisation:
        # A default may be longer than a short training; a written warm-up that never ends is a mistake.
        if "warmup" in self.model_fields_set and self.warmup > self.steps:
            raise ValueError(
                f"warmup: {self.warmup} given, expected at most the {self.steps} steps; lower it or raise steps"
            )
        if self.ema_start >= self.steps:
            raise ValueError(
                f"ema_start: {self.ema_start} given, expected less than the {self.steps} steps, or no average begins"
            )
        if self.ema_start and not self.ema_decay:
            raise ValueError(
                f"ema_start: {self.ema_start} given with ema_decay: 0, which keeps no average; set ema_decay"
            )
        return self

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate in a step, the first being 0: a function of nothing else.

        Linear warm-up over w of n steps, then from 1 down to the final ratio r; with t = (step - w) / (n - w):

            cosine: r + (1 - r) (1 + cos(pi t)) / 2        linear: r + (1 - r) (1 - t)
        """
        warmup, final = min(self.warmup, self.steps), self.final_ratio
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        if self.schedule == "linear":
            return final + (1.0 - final) * (1.0 - done)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))

    @property
    def averages(self) -> bool:
        """Whether a moving average of the weights is the result."""
        return self.ema_decay > 0.0

    @property
    def moments(self) -> int:
        """Numbers that the optimiser keeps of every trained parameter."""
        return 1 if self.betas[0] == 0.0 else 2
