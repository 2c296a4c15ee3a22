"""What a launcher says in the environment, and whether the recipe asks for the same."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flcompress.errors import RequestError

if TYPE_CHECKING:
    from flcompress.core.passes import Pass
    from flcompress.frontend.recipe import Training

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_NAMES = (*_NUMBERS, "MASTER_ADDR")
_ACCELERATE = {"ACCELERATE_USE_DEEPSPEED": ("zero1", "zero2", "zero3"), "ACCELERATE_USE_FSDP": ("fsdp2",)}


@dataclass(frozen=True)
class Launch:
    """One process among those that torchrun, accelerate launch or a cluster's scheduler started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """Raises RequestError where the environment is half set: such a process would train alone, and all others too.

        A launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
        """
        given = {name: os.environ[name] for name in _NAMES if name in os.environ}
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls()
        missing = [name for name in _NAMES if name not in given]
        if missing and given != {"WORLD_SIZE": "1"}:
            raise RequestError(
                f"environment: {', '.join(sorted(given))} set, but not {', '.join(missing)}; a launcher sets all of "
                "them: start with torchrun or accelerate launch, or unset them to run one process"
            )
        for name in _NUMBERS:
            if not given.get(name, "0").isdecimal():
                raise RequestError(f"environment: {name}={given[name]} given, expected a whole number")
        rank, size = int(given.get("RANK", 0)), int(given["WORLD_SIZE"])
        if rank >= size:
            raise RequestError(f"environment: RANK={rank} given with WORLD_SIZE={size}, expected a smaller RANK")
        return cls(rank, size, int(given.get("LOCAL_RANK", 0)))


def check_launch(training: Training, launch: Launch, passes: Iterable[Pass] = ()) -> None:
    """Raise RequestError where the recipe and the launcher do not ask for the same."""
    engine, wanted = training.engine, training.processes
    how = f"torchrun --nproc-per-node {wanted or 2} -m flcompress apply RECIPE"
    if wanted is not None and wanted != launch.size:
        raise RequestError(
            f"training.processes: {wanted} given, but the launcher started {launch.size} (WORLD_SIZE); "
            f"start with {how}, or change it"
        )
    if engine == "local" and launch.size > 1:
        raise RequestError(
            f"training.engine: local given, but the launcher started {launch.size} processes (WORLD_SIZE); "
            "set it to ddp, zero1, zero2, zero3 or fsdp2, or start one"
        )
    if engine != "local" and launch.size == 1 and wanted != 1:
        raise RequestError(
            f"training.engine: {engine} given, but only one process runs (WORLD_SIZE is unset or 1; "
            f"`accelerate launch --cpu` starts one whatever it is told); start with {how}, "
            "or set training.processes: 1 if one is meant"
        )
    _check_accelerate(training)
    for step in passes:
        cost = step.cost(1.0, 1, 1.0)
        if step.distributed and cost.steps and cost.batch % launch.size:
            raise RequestError(
                f"{step.name}: batch {cost.batch} given, expected a multiple of the {launch.size} processes; "
                "change either"
            )


def _check_accelerate(training: Training) -> None:
    """The engines are ours, so what accelerate was configured for must be what the recipe says."""
    engine = training.engine
    for variable, engines in _ACCELERATE.items():
        if os.environ.get(variable, "false").lower() == "true" and engine not in engines:
            raise RequestError(
                f"training.engine: {engine} given, but accelerate was configured for {' or '.join(engines)} "
                f"({variable}); set one like the other"
            )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", engine[-1])
    if engine.startswith("zero") and stage != engine[-1]:
        raise RequestError(
            f"training.engine: {engine} given, but accelerate was configured for ZeRO stage {stage} "
            "(ACCELERATE_DEEPSPEED_ZERO_STAGE); set one like the other"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and precision != training.precision:
        raise RequestError(
            f"training.precision: {training.precision} given, but accelerate was configured for {precision} "
            "(ACCELERATE_MIXED_PRECISION); set one like the other"
        )
