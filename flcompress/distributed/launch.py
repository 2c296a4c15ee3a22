"""The start of a command's processes: the launcher's environment, joining the others, and threads per process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from flcompress.distributed.world import World
from flcompress.errors import RequestError, UnavailableError, first_line

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_NAMES = (*_NUMBERS, "MASTER_ADDR")

SAMPLE_SECONDS = 0.5
"""How long the load of the machine is measured."""


@dataclass(frozen=True)
class Launch:
    """A process among those that torchrun, accelerate launch or a cluster's scheduler started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which a launcher sets.

        Raises:
            RequestError: only some of them are set: each process would train alone.
        """
        values = {name: os.environ[name] for name in _NAMES if name in os.environ}
        if "RANK" not in values and "WORLD_SIZE" not in values:
            return cls()
        missing = [name for name in _NAMES if name not in values]
        if missing and values != {"WORLD_SIZE": "1"}:
            raise RequestError(
                f"environment: {', '.join(sorted(values))} set, but not {', '.join(missing)}; a launcher sets all of "
                "them: start with torchrun or accelerate launch, or unset them to run one process"
            )
        for name in _NUMBERS:
            if not values.get(name, "0").isdecimal():
                raise RequestError(f"environment: {name}={values[name]} given, expected a whole number")
        rank, size = int(values.get("RANK", 0)), int(values["WORLD_SIZE"])
        if rank >= size:
            raise RequestError(f"environment: RANK={rank} given with WORLD_SIZE={size}, expected a smaller RANK")
        return cls(rank, size, int(values.get("LOCAL_RANK", 0)))


@contextmanager
def join(
    engine: str,
    timeout: float,
    device: str,
    launch: Launch,
    *,
    sequence_parallel: int = 1,
    shard_size: int | None = None,
) -> Iterator[World]:
    """Join the processes that a launcher started, and leave them at the end of the context.

    Args:
        engine: "local" for one process alone.
        timeout: seconds without progress after which a process ends all of them.
        device: "cpu" or "cuda".
        launch: this process's place among them.
        sequence_parallel: how many of them compute a clip together.
        shard_size: how many of them split a training's weights, where that is not all.

    Raises:
        RequestError: they cannot meet, or their number is not the launcher's.
        UnavailableError: no NCCL.
    """
    if launch.size == 1 and engine == "local":
        yield World()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    stores: Any = dist
    if device == "cuda":
        if launch.local_rank >= torch.cuda.device_count():
            raise RequestError(
                f"environment: LOCAL_RANK={launch.local_rank} given, but this machine has "
                f"{torch.cuda.device_count()} GPUs; start one process for each"
            )
        if not dist.is_nccl_available():
            raise UnavailableError(
                f"training.engine: {engine} exchanges tensors between GPUs by NCCL, which torch {torch.__version__} "
                "was built without; install torch's CUDA build for Linux, or set engine: local"
            )
        torch.cuda.set_device(launch.local_rank)
    limit = timedelta(seconds=timeout)
    world = World(launch.rank, launch.size, launch.local_rank)
    try:
        # One process under a distributed engine: sharding with offload on one device.
        store = next(rendezvous("env://", timeout=limit))[0] if launch.size > 1 else stores.HashStore()
        # The collectives wait a little longer than the watch, which names who is late.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=stores.PrefixStore("torch", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=2 * limit,
        )
        if launch.size > 1:
            world.join(store, timeout)
        if sequence_parallel > 1:
            world.share_clips(sequence_parallel, timeout)
        if shard_size not in (None, launch.size):
            world.share_weights(shard_size, timeout, device)
    except (dist.DistStoreError, dist.DistNetworkError, dist.DistBackendError) as error:
        raise RequestError(
            f"the {launch.size} processes (WORLD_SIZE) did not meet within {timeout:g} s (training.timeout): "
            f"{first_line(error)[:200]}; start all of them, or set it higher"
        ) from error
    if dist.get_world_size() != launch.size:
        raise RequestError(f"WORLD_SIZE: {launch.size} given, but {dist.get_world_size()} processes met; start anew")
    try:
        yield world
    finally:
        if launch.size > 1:
            world.leave()
        else:
            dist.destroy_process_group()


@contextmanager
def repeatable(*, enabled: bool) -> Iterator[None]:
    """Let torch use only algorithms that sum in a fixed order while active, if `enabled`; before CUDA is used."""
    if not enabled:
        yield
        return
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's buffers have a fixed size for each stream
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, settings.fill_uninitialized_memory = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic, settings.fill_uninitialized_memory = before[1], filling


def free_cores() -> int:
    """Count the cores of this process that no other work keeps busy; at least one."""
    import psutil

    used: list[float] = psutil.cpu_percent(interval=SAMPLE_SECONDS, percpu=True)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(used))
    busy = sum(used[core] for core in own if core < len(used)) / 100.0
    return max(1, len(own) - round(busy))


def use_free_cores(earlier: int | None = None) -> int:
    """Set how many threads torch computes with, one per free core, and return that number.

    Threads of one operation wait for each other by spinning. Next to other work one of them is often not running, and
    the others burn their cores until it is: two threads on two cores of which one is busy need ten times the processor
    time of one thread. Letting them sleep instead slows down a quiet machine by more than a
    tenth (docs/benchmarks/speed.md).
    OMP_NUM_THREADS, which launchers set as well, is obeyed.

    Args:
        earlier: the number of an earlier attempt at the same work: sums that are split over threads round differently.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(earlier or min(free_cores(), torch.get_num_threads()))
    return torch.get_num_threads()
