"""Model families: what tracing cannot find out. One class a family; `family_of` finds it by a class name."""

from __future__ import annotations

from flcompress.errors import ModelError
from flcompress.models.families.cogvideox import CogVideoX
from flcompress.models.families.family import Family
from flcompress.models.families.hunyuan_video import HunyuanVideo
from flcompress.models.families.images import Flux, QwenImage, StableDiffusion3
from flcompress.models.families.masked_video import LTX, Mochi
from flcompress.models.families.wan import Wan

FAMILIES: tuple[Family, ...] = (
    Wan(),
    HunyuanVideo(),
    CogVideoX(),
    LTX(),
    Mochi(),
    Flux(),
    StableDiffusion3(),
    QwenImage(),
)


def family_of(class_name: str) -> Family:
    """The family of a stock pipeline or transformer class.

    Raises:
        ModelError: no family has it; names those that are known.
    """
    for family in FAMILIES:
        if class_name in (*family.pipelines, *family.transformers):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise ModelError(f"{class_name}: no model family knows this class; expected a pipeline such as {known}")
