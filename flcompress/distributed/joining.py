"""How the processes that a launcher started meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from flcompress.distributed.launch import Launch
from flcompress.distributed.world import World
from flcompress.errors import RequestError


@contextmanager
def joined(engine: str, timeout: float, device: str, launch: Launch) -> Iterator[World]:
    """Join the processes that a launcher started.

    Args:
        engine: "local" for one process alone.
        timeout: seconds after which a process that does not move ends all.
        device: "cpu" or "cuda".
        launch: of this process.

    Raises:
        RequestError: they cannot meet, or are not as many as the launcher says.
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
    except (dist.DistStoreError, dist.DistNetworkError, dist.DistBackendError) as error:
        raise RequestError(
            f"the {launch.size} processes (WORLD_SIZE) did not meet within {timeout:g} s (training.timeout): "
            f"{str(error).splitlines()[0][:200]}; start all of them, or set it higher"
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
