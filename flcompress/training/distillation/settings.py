"""The recipe settings of a distribution matching distillation. Imports no torch, since checking a recipe reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flcompress.core.optimisation import Optimisation
from flcompress.core.settings import Range

NO_INTER, NO_INTRA = (1.0, 1.0), (0.0, 0.0)
"""Ranges of b1 and b2 at which guidance has no effect."""


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """The arguments of the `dmd` pass, which describes them."""

    optimisation: Optimisation
    student_steps: int
    inter_cfg: Range
    intra_cfg: Range
    real_score: Literal["original", "elastic"]
    fake_score: Literal["full", "lora"]
    generator: Literal["full", "lora"]
    lora_rank: int
    critic_updates: int
    critic_learning_rate: float
    score_range: Range
    real_lean: float
    gan_weight: float
    gan_r1: float

    @property
    def has_loras(self) -> bool:
        """Whether a role is a LoRA."""
        return "lora" in (self.fake_score, self.generator)

    @property
    def generator_shares(self) -> bool:
        """Whether the generator is a LoRA on the real score's weights, without the prune set."""
        return self.generator == "lora" and self.real_score == "elastic"

    @property
    def shares(self) -> bool:
        """Whether any role is a LoRA on the real score's weights."""
        return self.fake_score == "lora" or self.generator_shares
