"""The processes of one command: how many a launcher started, which this one is, and how they agree."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flcompress.errors import FlcompressError, RequestError, TrainingError

if TYPE_CHECKING:
    import torch.distributed as dist

    from flcompress.pipeline.recipe import Training

LONGEST_WAIT = 0.2
"""Seconds between two looks for what another process will give."""
_EXCHANGE_WORDS = ("gloo", "nccl", "connection", "timed out", "process group")
"""What torch's errors of a broken exchange say; they have no class of their own in every backend."""
MIRROR_SECONDS = 5.0
"""How long a process that failed waits for the first one to report the same."""


class World:
    """One process among those that share the work; alone where no launcher started more.

    Attributes:
        rank: which process this is; 0 is the main one, which writes and speaks.
        size: how many there are.
        timeout: seconds without any progress after which a process counts as hung.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout: float = 0.0) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._store: Any = None  # of strings, shared by all processes
        self._control: dist.ProcessGroup | None = None
        self._messages = 0
        self._beats = 0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value over the processes; all must give the same names."""
        if self.size == 1:
            return dict(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(list(values.values()), dtype=torch.float64)
        with self._collective():
            dist.all_reduce(total, group=self._control)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def gathered(self, value: Any) -> list[Any]:
        """What every process gave, by rank, in every process; plain JSON values only."""
        if self.size == 1:
            return [value]
        number = self._messages = self._messages + 1
        self._put(f"gather/{number}/{self.rank}", value)
        return [self._get(f"gather/{number}/{rank}") for rank in range(self.size)]

    def once(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the main process, in every process; plain JSON values only."""
        if self.size == 1:
            return make()
        number = self._messages = self._messages + 1
        if self.main:
            value = make()
            self._put(f"once/{number}", value)
            return value
        return self._get(f"once/{number}")

    def barrier(self, what: str) -> None:
        """Wait until every process is here."""
        self.beat(what)
        self.mean({"here": 1.0})

    def beat(self, what: str) -> None:
        """Say that this process moves on, and to what: a hung one is told by its last word."""
        if self._store is not None:
            self._beats += 1
            self._store.set(f"beat/{self.rank}", json.dumps([self._beats, what]))

    def fail(self, error: FlcompressError) -> bool:
        """Tell the others why this process stops; whether the main one stops for the same reason and will say so."""
        if self._store is None:
            return False
        self._store.set(f"failed/{self.rank}", json.dumps([str(error), error.exit_status]))
        end = time.monotonic() + MIRROR_SECONDS
        while not self.main and time.monotonic() < end:
            if self._store.check(["failed/0"]):
                return True
            time.sleep(0.05)
        return False

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.broken(error) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work in which the processes exchange tensors: the loss of one becomes one line that names it."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.size == 1 or not any(word in text for word in _EXCHANGE_WORDS):
                raise
            raise self.broken(error) from error

    def broken(self, error: RuntimeError) -> FlcompressError:
        """What an error of a collective operation means: another process failed, died or hangs."""
        time.sleep(0.5)  # the one that failed may be about to say why
        for rank in range(self.size):
            said = self._peek(f"failed/{rank}") if rank != self.rank else None
            if said:
                return _failure(rank, said)
        first = str(error).splitlines()[0][:200]
        others = ", ".join(f"{rank} ({self._last(rank)})" for rank in range(self.size) if rank != self.rank)
        return TrainingError(
            f"process {self.rank} of {self.size} lost the others; one of them ended or cannot be reached. "
            f"Last heard of process {others}. "
            f"Give the same command again: it goes on from the last checkpoint ({first})"
        )

    def _last(self, rank: int) -> str:
        beat = self._peek(f"beat/{rank}")
        return str(beat[1]) if beat else "nothing"

    def _put(self, key: str, value: Any) -> None:
        assert self._store is not None
        self._store.set(key, json.dumps(value))

    def _peek(self, key: str) -> Any:
        import torch.distributed as dist

        assert self._store is not None
        try:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None
        except (dist.DistStoreError, dist.DistNetworkError):
            return None

    def _get(self, key: str) -> Any:
        """Wait for a value, however long the work that makes it takes; a failure elsewhere ends the wait."""
        import torch.distributed as dist

        assert self._store is not None
        wait = 0.001
        try:
            while not self._store.check([key]):
                for rank in range(self.size):
                    if rank != self.rank and (said := self._peek(f"failed/{rank}")):
                        raise _failure(rank, said)
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            return json.loads(self._store.get(key))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise self.broken(error) from error

    def _watch(self, client: Any, over: threading.Event) -> None:
        """End this process when none has moved for `timeout` seconds, naming those that are behind."""
        import torch.distributed as dist

        seen: list[Any] = []
        since = time.monotonic()
        while not over.wait(min(5.0, self.timeout / 4)):
            try:
                keys = [f"beat/{rank}" for rank in range(self.size)]
                beats = [json.loads(client.get(key)) if client.check([key]) else [0, "nothing"] for key in keys]
            except (dist.DistStoreError, dist.DistNetworkError):
                return
            if beats != seen:
                seen, since = beats, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                behind = [rank for rank, (count, _) in enumerate(beats) if count == min(one for one, _ in beats)]
                named = " and ".join(f"process {rank} (last: {beats[rank][1]})" for rank in behind)
                print(
                    f"error: {named} of {self.size} has not moved for {self.timeout:g} s (training.timeout); "
                    "give the same command again: it goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # the main thread waits in a collective operation that will never end


def _failure(rank: int, said: list[Any]) -> FlcompressError:
    message, status = said
    error = FlcompressError(f"process {rank}: {message}" if rank else message)
    error.exit_status = status
    return error


@dataclass(frozen=True)
class Launch:
    """What the launcher says in the environment (torchrun's variables, which accelerate launch sets too)."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> Launch:
        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        return cls(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0))


def check_launch(training: Training, launch: Launch) -> None:
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
    asked = {"ACCELERATE_USE_DEEPSPEED": ("zero1", "zero2", "zero3"), "ACCELERATE_USE_FSDP": ("fsdp2",)}
    for variable, engines in asked.items():
        if os.environ.get(variable, "false").lower() == "true" and engine not in engines:
            raise RequestError(
                f"training.engine: {engine} given, but accelerate was configured for {' or '.join(engines)} "
                f"({variable}); set one like the other"
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and precision != training.precision:
        raise RequestError(
            f"training.precision: {training.precision} given, but accelerate was configured for {precision} "
            "(ACCELERATE_MIXED_PRECISION); set one like the other"
        )


@contextmanager
def joined(training: Training, device: str) -> Iterator[World]:
    """Join the processes that a launcher started.

    Raises:
        RequestError: the recipe asks for other processes than there are.
    """
    launch = Launch.from_environment()
    check_launch(training, launch)
    if launch.size == 1 and training.engine == "local":
        yield World()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    stores: Any = dist  # mypy does not see those that come from C++
    if device == "cuda":
        torch.cuda.set_device(launch.local_rank)
    world = World(launch.rank, launch.size, training.timeout)
    limit = timedelta(seconds=training.timeout)
    if launch.size > 1:
        store, rank, size = next(rendezvous("env://", timeout=limit))
    else:  # one process under a distributed engine: sharding with offload on one device
        store, rank, size = stores.HashStore(), 0, 1
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    # The collectives wait a little longer than the watch, which names who is late.
    dist.init_process_group(
        backend, store=stores.PrefixStore("torch", store), rank=rank, world_size=size, timeout=2 * limit
    )
    if dist.get_world_size() != launch.size:
        raise RequestError(f"WORLD_SIZE: {launch.size} given, but {dist.get_world_size()} processes met; start anew")
    over = threading.Event()
    watch = threading.Thread(target=lambda: None)
    if size > 1:
        world._store = stores.PrefixStore("flcompress", store)
        world._control = dist.new_group(backend="gloo", timeout=2 * limit)
        client = stores.PrefixStore("flcompress", store.clone())
        watch = threading.Thread(target=world._watch, args=(client, over), daemon=True)
    watch.start()
    try:
        yield world
    finally:
        over.set()
        watch.join()
        dist.destroy_process_group()
