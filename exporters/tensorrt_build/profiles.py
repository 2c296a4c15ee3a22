"""The settings of a TensorRT engine in a recipe: the GPUs that it is for, and the sizes that it takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Target = Literal["sm80", "sm86", "sm89", "sm120", "current"]
"""TensorRT has no fp32 matrix product for Turing (sm75)."""


def _ascending(values: tuple[int, int, int]) -> tuple[int, int, int]:
    if list(values) != sorted(values):
        raise ValueError(f"[{', '.join(map(str, values))}] given, expected [smallest, tuned for, largest]")
    return values


Count = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[Count, Count, Count], AfterValidator(_ascending)]
"""[smallest, tuned for, largest]."""


class Profile(BaseModel):
    """Sizes that an engine takes; each is [smallest, tuned for, largest]; null is the recipe's own size alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: Range = Field(default=(1, 1, 1), description="samples")
    frames: Range | None = Field(default=None, description="frames of the clip")
    height: Range | None = Field(default=None, description="pixels")
    width: Range | None = Field(default=None, description="pixels")
