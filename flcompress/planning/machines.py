"""Machines that a plan can be made for: GPUs with their stated memory and speed, or this machine, measured."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.core.settings import Precision
from flcompress.errors import RequestError
from flcompress.frontend.recipe import Recipe
from flcompress.ir.graph import BlockGraph

if TYPE_CHECKING:
    from flcompress.models.families.family import LatentShape

UTILISATION = 0.4
"""Share of the stated speed that training of large transformers usually reaches: an assumption, printed as such."""

LINK_UTILISATION = 0.7
"""Share of a link's stated speed that an exchange of large tensors usually reaches: an assumption, printed as such."""

MACHINE = 8
"""GPUs in a machine: an assumption."""

RESERVE = 0.1
"""Share of a GPU's memory that a plan leaves for what it does not count: CUDA, NCCL, and gaps between tensors."""

TIMED_FLOPS = 2e11
"""Up to this many FLOPs a forward of the transformer itself is timed; above, a matrix product."""

_UNITS = {"G": 1e9, "GB": 1e9, "GiB": 2.0**30, "M": 1e6, "MB": 1e6, "MiB": 2.0**20}
_SIZE = re.compile(rf"(?P<number>\d+(\.\d+)?)(?P<unit>{'|'.join(_UNITS)})")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU model.

    Attributes:
        name: the name that a plan prints.
        memory: bytes.
        half: dense FLOP/s in bf16.
        single: dense FLOP/s in fp32, without TF32, which PyTorch leaves off.
        link: bytes/s, one way, to the other GPUs of its machine: NVLink of SXM cards, PCIe 4.0 x16 of the others.
        network: bytes/s, one way, to other machines: the assumption is 400 Gb/s for each data-centre card, if its PCIe
            does that, and 100 Gb/s for all others of a machine together.
    """

    name: str
    memory: float
    half: float
    single: float
    link: float
    network: float


GPUS = {
    "a100": Gpu("A100 80 GB", 80e9, 312e12, 19.5e12, 300e9, 50e9),
    "h100": Gpu("H100 80 GB", 80e9, 989e12, 67e12, 450e9, 50e9),
    "h200": Gpu("H200 141 GB", 141e9, 989e12, 67e12, 450e9, 50e9),
    "l40s": Gpu("L40S 48 GB", 48e9, 362e12, 91.6e12, 32e9, 32e9),
    "rtx4090": Gpu("RTX 4090 24 GB", 24e9, 165e12, 82.6e12, 32e9, 12.5e9 / MACHINE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The hardware that a plan is made for.

    Attributes:
        name: name of the GPU, or "process" for this machine.
        count: number of GPUs, or of processes.
        memory: bytes per GPU; None on this machine, where nothing is checked to fit.
        half: FLOP/s to plan with in bf16.
        single: FLOP/s to plan with in fp32.
        gpu: whether it has GPUs.
        link: bytes/s to plan with between GPUs of a machine; None where exchanges are taken to need no time.
        network: the same between machines.
    """

    name: str
    count: int
    memory: float | None
    half: float
    single: float
    gpu: bool
    link: float | None = None
    network: float | None = None

    def speed(self, precision: Precision) -> float:
        """Return the FLOP/s of one GPU or process."""
        return self.half if precision == "bf16" else self.single

    def exchange_seconds(self, within: float, between: float) -> float:
        """Return how long a GPU sends bytes within its machine and, at the same time, to other machines."""
        if self.link is None or self.network is None:
            return 0.0
        return max(within / self.link, between / self.network)

    def holds(self, size: float) -> bool:
        """Return whether `size` bytes fit one GPU, with `RESERVE` left for what is not counted."""
        return self.memory is None or size <= (1.0 - RESERVE) * self.memory


def this_machine(recipe: Recipe, flops_per_second: float) -> Machine:
    """Return the machine that this runs on, at a measured speed."""
    return Machine(
        name="process",
        count=recipe.training.fewest_processes,
        memory=None,
        half=flops_per_second,
        single=flops_per_second,
        gpu=False,
    )


def gpu_machine(recipe: Recipe, gpu: str, count: int | None = None, memory: str | None = None) -> Machine:
    """Return `count` GPUs of one model.

    Args:
        recipe: the recipe; its `training.processes` is the default of `count`.
        gpu: a key of `GPUS`.
        count: number of GPUs.
        memory: memory per GPU, such as "80G" or "48GiB"; default: that of the GPU model.

    Raises:
        RequestError: no size, no GPU, or a count that differs from the recipe's.
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
    name = kind.name if memory is None else f"{kind.name.rsplit(maxsplit=2)[0]} with {memory}"
    return Machine(
        name=name,
        count=count or recipe.training.fewest_processes,
        memory=size,
        half=UTILISATION * kind.half,
        single=UTILISATION * kind.single,
        gpu=True,
        link=LINK_UTILISATION * kind.link,
        network=LINK_UTILISATION * kind.network,
    )


def gpu_here() -> tuple[str | None, str | None]:
    """Return (key of `GPUS`, memory where it is not that model's) of the GPU here; (None, None) for no known one."""
    import torch

    if not torch.cuda.is_available():
        return None, None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    size = torch.cuda.mem_get_info()[1]
    for key, kind in GPUS.items():
        if key in name:
            same = abs(size - kind.memory) <= RESERVE * kind.memory  # 80 GB cards say 79 to 85
            return key, None if same else f"{size / 1e9:.0f}G"
    return None, None


def running_machine(recipe: Recipe, processes: int) -> tuple[Machine, Gpu | None]:
    """Return the GPUs that `processes` processes here compute on, and their model; None for one that `GPUS` lacks.

    The speed of a machine of unknown GPUs is not a number.
    """
    import torch

    key, memory = gpu_here()
    if key is not None:
        return gpu_machine(recipe, key, processes, memory), GPUS[key]
    name, size = torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[1])
    return Machine(name=name, count=processes, memory=size, half=math.nan, single=math.nan, gpu=True), None


def _bytes(text: str) -> float:
    match = _SIZE.fullmatch(text)
    size = float(match["number"]) * _UNITS[match["unit"]] if match else 0.0
    if not size:
        raise RequestError(f"--memory: {text} given, expected a size such as 80G or 48GiB")
    return size


def measure_speed(
    transformer: Path,
    graph: BlockGraph,
    tokens: int,
    shape: LatentShape,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the FLOP/s of this machine: on the transformer with random weights if that is cheap, else on a product."""
    import torch

    batch = max(1, min(16, int(TIMED_FLOPS // max(graph.flops, 1))))
    if graph.flops > TIMED_FLOPS:
        left, right = torch.ones(1024, 1024), torch.ones(1024, 1024)
        flops = 2.0 * 1024**3

        def work() -> Any:
            return left @ right
    else:
        from flcompress.models.inputs import example_inputs
        from flcompress.models.loading import meta_transformer

        model = meta_transformer(transformer).to_empty(device="cpu")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        inputs = example_inputs(model, batch=batch, latent_shape=shape, tokens=tokens)
        flops = float(batch * graph.flops)

        def work() -> Any:
            return model(**inputs, return_dict=False)

    with torch.no_grad():
        work()
        times = []
        for _ in range(3):
            started = clock()
            work()
            times.append(clock() - started)
    return flops / min(times)
