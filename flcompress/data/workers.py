"""Encode in this process or in several; the result does not depend on their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

import torch

from flcompress.data.encoder import Encoder
from flcompress.errors import FlcompressError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_encoder: Encoder | None = None
"""The encoder of a worker process."""


class Runner(Protocol):
    """Applies a function to many items and yields the results as they finish, in any order."""

    def __call__(self, do: Callable[[Encoder, _Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """Yield `do(encoder, item)` for every item."""


@contextmanager
def workers(encoder: Encoder, processes: int) -> Iterator[Runner]:
    """Encode with `processes` processes; if several, each loads the parts, and GPUs are assigned in turn.

    On a CPU every process computes with one thread: the rounding of sums depends on the number of threads.
    """
    if processes == 1:
        with one_thread(encoder.device):
            yield lambda do, items: (do(encoder, item) for item in items)
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    # Workers end when the other end of this pipe is closed, so also with a killed parent.
    alive, keep = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _start, (encoder, numbers, alive))

    def run(do: Callable[[Encoder, _Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        try:
            for future in as_completed([pool.submit(_work, do, item) for item in items]):
                yield future.result()
        except BrokenProcessPool as error:
            raise FlcompressError(
                "encode: a worker process was ended from outside (out of memory?); finished shards are kept: "
                "give the same command again, with fewer --workers"
            ) from error

    try:
        yield run
    except BaseException:
        keep.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        keep.close()
        alive.close()
        numbers.close()


def _start(encoder: Encoder, numbers: Any, alive: Connection) -> None:
    """Set up a worker process."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers an interruption
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    number = numbers.get()
    if encoder.device.startswith("cuda"):
        encoder = replace(encoder, device=f"cuda:{number % torch.cuda.device_count()}")
    else:
        torch.set_num_threads(1)
    _encoder = encoder


def _end_with_parent(alive: Connection) -> None:
    alive.poll(None)
    os._exit(1)


def _work(do: Callable[[Encoder, _Item], _Result], item: _Item) -> _Result:
    assert _encoder is not None
    return do(_encoder, item)


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Compute with one thread on a CPU, so that results do not depend on the number of processes."""
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
