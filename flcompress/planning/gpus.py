"""Machines that a plan can be made for: GPUs with their memory, and speed as their makers state it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flcompress.core.settings import Precision
from flcompress.errors import RequestError
from flcompress.frontend.recipe import Recipe

UTILISATION = 0.4
"""Share of the stated speed that training of large transformers usually reaches; an assumption, and printed as one."""

RESERVE = 0.1
"""Share of a GPU's memory that a plan leaves for what it does not count: CUDA, NCCL, and gaps between tensors."""

_UNITS = {"G": 1e9, "GB": 1e9, "GiB": 2.0**30, "M": 1e6, "MB": 1e6, "MiB": 2.0**20}
_SIZE = re.compile(rf"(?P<number>\d+(\.\d+)?)(?P<unit>{'|'.join(_UNITS)})")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as a plan prints it.
        memory: bytes.
        half, single: dense FLOP/s in bf16 and in fp32. Without TF32, which PyTorch leaves off.
    """

    name: str
    memory: float
    half: float
    single: float


GPUS = {
    "a100": Gpu("A100 80 GB", 80e9, 312e12, 19.5e12),
    "h100": Gpu("H100 80 GB", 80e9, 989e12, 67e12),
    "h200": Gpu("H200 141 GB", 141e9, 989e12, 67e12),
    "l40s": Gpu("L40S 48 GB", 48e9, 362e12, 91.6e12),
    "rtx4090": Gpu("RTX 4090 24 GB", 24e9, 165e12, 82.6e12),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a plan is made for.

    Attributes:
        name: of a GPU, or "process" of this machine.
        count: GPUs, or processes.
        memory: bytes of one; None where nobody asks whether the work fits.
        half, single: FLOP/s to reckon with, in bf16 and fp32.
        gpu: whether it has GPUs.
    """

    name: str
    count: int
    memory: float | None
    half: float
    single: float
    gpu: bool

    def speed(self, precision: Precision) -> float:
        """FLOP/s of one GPU or process."""
        return self.half if precision == "bf16" else self.single

    def holds(self, size: float) -> bool:
        """Whether one GPU has so many bytes, with something left for what is not counted."""
        return self.memory is None or size <= (1.0 - RESERVE) * self.memory


def this_machine(recipe: Recipe, flops_per_second: float) -> Machine:
    """Where the plan is made, at a measured speed."""
    return Machine(
        name="process",
        count=recipe.training.processes or 1,
        memory=None,
        half=flops_per_second,
        single=flops_per_second,
        gpu=False,
    )


def gpu_machine(recipe: Recipe, gpu: str, count: int | None = None, memory: str | None = None) -> Machine:
    """So many GPUs of a kind.

    Args:
        recipe: says how many processes where `count` is None.
        gpu: a key of `GPUS`.
        count: GPUs.
        memory: of one, such as "80G" or "48GiB"; that of the kind where None.

    Raises:
        RequestError: no such size, no GPU, or another count than the recipe's.
    """
    wanted, kind = recipe.training.processes, GPUS[gpu]
    if count is not None and count < 1:
        raise RequestError(f"--gpus: {count} given, expected 1 or more")
    if count is not None and wanted is not None and count != wanted:
        raise RequestError(
            f"--gpus: {count} given, but training.processes of the recipe is {wanted}; leave one of them out, "
            f"or --set training.processes={count}"
        )
    size = kind.memory if memory is None else _bytes(memory)
    name = kind.name if memory is None else f"{kind.name.split()[0]} with {memory}"
    return Machine(
        name=name,
        count=count or wanted or 1,
        memory=size,
        half=UTILISATION * kind.half,
        single=UTILISATION * kind.single,
        gpu=True,
    )


def _bytes(text: str) -> float:
    match = _SIZE.fullmatch(text)
    size = float(match["number"]) * _UNITS[match["unit"]] if match else 0.0
    if not size:
        raise RequestError(f"--memory: {text} given, expected a size such as 80G or 48GiB")
    return size
