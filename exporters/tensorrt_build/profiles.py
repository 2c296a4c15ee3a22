"""The settings of a TensorRT engine in a recipe: the GPUs that it is for, and the sizes that it takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from flcompress.errors import UnavailableError
from flcompress.exporters.shared import ExportPrecision
from flcompress.runtime.tensorrt_api import CURRENT, Card

Target = Literal["sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121", "current"]
"""GPU generations: A100, RTX 30, RTX 40 and L40, H100 and H200, B200, B300, RTX 50, DGX Spark; and the card here."""

BF16_FROM = 80
"""Compute capability, times ten, from which a GPU computes in bf16."""


def _each_once(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    if len(set(targets)) != len(targets):
        raise ValueError(f"a target is given twice: {', '.join(targets)}")
    if CURRENT in targets and len(targets) > 1:
        raise ValueError("'current' must stand alone; name the GPU generations instead")
    return targets


Targets = Annotated[tuple[Target, ...], Field(min_length=1), AfterValidator(_each_once)]
"""GPU generations, each once, or "current" alone."""


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


def require_precision(
    precision: ExportPrecision,
    targets: tuple[Target, ...],
    card: Card | None,
    keys: tuple[str, str] = ("tensorrt.targets", "onnx.precision"),
) -> None:
    """Raise UnavailableError where the card of this machine, of target "current", lacks a precision.

    Args:
        precision: asked for.
        targets: GPU generations, or "current" alone.
        card: the card of this machine.
        keys: of targets and precision in a recipe, for the message.
    """
    if precision == "bf16" and targets == (CURRENT,) and card is not None and int(card.target[2:]) < BF16_FROM:
        raise UnavailableError(
            f"{keys[0]}: current is {card}, which does not compute in bf16 (GPUs from sm80 on do); set {keys[1]}: fp16"
        )
