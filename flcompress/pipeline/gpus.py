"""GPUs that a plan can be made for: memory, and speed as their makers state it."""

from __future__ import annotations

from dataclasses import dataclass

from flcompress.pipeline.passes import Precision

UTILISATION = 0.4
"""Share of the stated speed that training of large transformers usually reaches; an assumption, and printed as one."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as a plan prints it.
        memory: bytes.
        half, single: dense FLOP/s in bf16, and in TF32 for fp32 training.
    """

    name: str
    memory: float
    half: float
    single: float

    def speed(self, precision: Precision) -> float:
        """FLOP/s to plan with."""
        return UTILISATION * (self.half if precision == "bf16" else self.single)


GPUS = {
    "a100": Gpu("A100 80 GB", 80e9, 312e12, 156e12),
    "h100": Gpu("H100 80 GB", 80e9, 989e12, 494e12),
    "h200": Gpu("H200 141 GB", 141e9, 989e12, 494e12),
    "l40s": Gpu("L40S 48 GB", 48e9, 362e12, 183e12),
    "rtx4090": Gpu("RTX 4090 24 GB", 24e9, 165e12, 83e12),
}
