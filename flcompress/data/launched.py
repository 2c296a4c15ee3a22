"""Encode on all processes that a launcher started: the main one plans and collects, each encodes its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from flcompress.data.encoder import ClipTask, Encoder, PromptTask, ShardResult, Skipped
from flcompress.data.index import WORK
from flcompress.data.sizes import Size
from flcompress.data.workers import Runner, one_thread
from flcompress.distributed.world import World
from flcompress.files import append_line

DONE_FILES = "done*.jsonl"
"""The results so far, in the folder of an unfinished dataset: a file for each process."""

RESULT = TypeAdapter(ShardResult)


@dataclass(frozen=True)
class _Work:
    """A method of the encoder, and how its items and results travel as JSON."""

    do: Callable[[Encoder, Any], Any]
    item: TypeAdapter[Any]
    result: TypeAdapter[Any]


_TASK = TypeAdapter(PromptTask | ClipTask)
_WORKS = {
    "measure": _Work(Encoder.measure, TypeAdapter(tuple[str, ...]), TypeAdapter(dict[str, Size | Skipped])),
    "make": _Work(Encoder.make, _TASK, RESULT),
    "make again as version 1": _Work(Encoder.make_as_version_1, _TASK, RESULT),
}


@contextmanager
def leading(encoder: Encoder, world: World) -> Iterator[Runner]:
    """Yield, in the main process, what runs items on all of them; afterwards the others return from `follow`."""
    encoder = replace(encoder, heartbeat=world.heartbeat)

    def run(do: Callable[[Encoder, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        name, work = next((name, work) for name, work in _WORKS.items() if work.do is do)
        plain = [work.item.dump_python(item, mode="json") for item in items]
        world.broadcast(lambda: {"work": name, "items": plain})
        yield from _own_share(encoder, world, work, plain)
        for others in world.all_gather([])[1:]:
            yield from map(work.result.validate_python, others)
        world.main_only("encoding")

    world.main_only("encoding")
    with one_thread(encoder.device):
        yield run
    world.broadcast(lambda: None)


def follow(encoder: Encoder, world: World) -> None:
    """Do this process's share of what the main one runs, until that is done."""
    encoder = replace(encoder, heartbeat=world.heartbeat)
    with one_thread(encoder.device):
        while (call := world.broadcast(dict)) is not None:
            work, results = _WORKS[call["work"]], []
            for result in _own_share(encoder, world, work, call["items"]):
                results.append(work.result.dump_python(result, mode="json"))
                # Of an unfinished dataset, so that a killed command loses one shard of each process.
                if work.result is RESULT and (encoder.out / WORK).is_dir():
                    append_line(encoder.out / WORK / f"done-{world.rank}.jsonl", RESULT.dump_json(result).decode())
            world.all_gather(results)


def _own_share(encoder: Encoder, world: World, work: _Work, plain: Sequence[Any]) -> Iterator[Any]:
    for number in range(world.rank, len(plain), world.size):
        world.heartbeat(f"encoding {number + 1} of {len(plain)}")
        yield work.do(encoder, work.item.validate_python(plain[number]))
