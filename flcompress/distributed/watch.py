"""A thread that tells the other processes that this one lives, and ends this one when another hangs or has failed."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

LOOK_SECONDS = 1.0
"""Between two looks at the others, and two signs of life; less where `training.timeout` is very short."""
GRACE_SECONDS = 3.0
"""What a process has to end by itself once another has failed. It may wait in a collective that never ends."""
FAILED, TOLD = "failed", "told"
LEFT = -1
"""The sign of life of a process that has ended as it should."""


@dataclass
class Pulse:
    """What a process says of itself.

    Attributes:
        beats: how often it moved on.
        doing: to what, last.
        alone: whether it works without the others, who wait: that may take any time.
        ending: whether it was asked to end (SIGTERM); not for the others. A launcher asks when one of them has died,
            and the word of a dead one is waited for in vain.
    """

    beats: int = 0
    doing: str = "start"
    alone: bool = True
    ending: bool = False


@dataclass
class Watch:
    """The watch of one process over all.

    Attributes:
        client: a store connection of its own.
        rank: of this process.
        size: number of processes.
        timeout: seconds without any progress after which they count as hung.
        pulse: of this process; its main thread writes it.
    """

    client: Any
    rank: int
    size: int
    timeout: float
    pulse: Pulse
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _looked: float = 0.0

    @property
    def period(self) -> float:
        return min(LOOK_SECONDS, self.timeout / 8)

    def start(self) -> None:
        self._publish(0)
        self.publish(self.client)
        self._looked = time.monotonic()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._guard)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self.period)  # one that waits for a store that is gone is left behind

    def leave(self) -> None:
        """Stop, and say that this process is about to end and is not to be missed."""
        self.stop()
        self._publish(LEFT)

    def lives(self) -> list[tuple[int, str]]:
        """(signs of life, what it does) of every process, by rank."""
        return [(life, doing) for life, _, doing, _ in self._pulses()]

    def publish(self, client: Any) -> None:
        """Give the pulse to the store."""
        client.set(f"pulse/{self.rank}", json.dumps([self.pulse.beats, self.pulse.doing, self.pulse.alone]))

    def _publish(self, life: int) -> None:
        self.client.set(f"life/{self.rank}", str(life))

    def _pulses(self) -> list[tuple[int, int, str, bool]]:
        """(sign of life, beats, doing, alone) of every process."""
        keys = [f"{kind}/{rank}" for kind in ("life", "pulse") for rank in range(self.size)]
        found = [json.loads(one) for one in self.client.multi_get(keys)]
        return [(life, *pulse) for life, pulse in zip(found[: self.size], found[self.size :], strict=True)]

    def _watch(self) -> None:
        import torch.distributed as dist

        life, moved = 0, time.monotonic()
        last: list[tuple[int, str]] = []
        alive = [(-1, moved)] * self.size
        try:
            while not self._over.wait(self.period):
                life += 1
                self._publish(life)
                pulses, now = self._pulses(), time.monotonic()
                if self._over.is_set():
                    return
                alive = [
                    old if old[0] == pulse[0] != LEFT else (pulse[0], now)
                    for old, pulse in zip(alive, pulses, strict=True)
                ]
                beats = [(count, doing) for _, count, doing, _ in pulses]
                if beats != last or pulses[0][3]:
                    last, moved = beats, now
                self._looked = now
                self._judge(pulses, [now - when for _, when in alive], now - moved)
                if self.client.check([FAILED]):
                    self._follow()
        except (dist.DistStoreError, dist.DistNetworkError):
            return  # the main thread meets the same, and says so

    def _judge(self, pulses: list[tuple[int, int, str, bool]], silent: list[float], still: float) -> None:
        """End this process where another has been silent, or all have been still, for too long."""
        limit = min(self.timeout, GRACE_SECONDS + 4 * self.period) if self.pulse.ending else self.timeout
        if max(silent) < limit and still < self.timeout:
            return
        late = [rank for rank, seconds in enumerate(silent) if seconds > max(4 * self.period, limit / 2)]
        fewest = min(count for _, count, _, _ in pulses)
        behind = late or [rank for rank, (_, count, _, _) in enumerate(pulses) if count == fewest]
        named = " and ".join(f"process {rank} (last: {pulses[rank][2]})" for rank in behind)
        why = " (training.timeout)" if limit == self.timeout else ", and this command was asked to end"
        self._end(f"{named} of {self.size} has not moved for {limit:g} s{why}")

    def _follow(self) -> None:
        """Another has failed and says so itself."""
        if not self._over.wait(GRACE_SECONDS):
            os._exit(json.loads(self.client.get(FAILED))[2])

    def _guard(self) -> None:
        """The store itself can hang, with the process that keeps it; then the watch hangs too."""
        while not self._over.wait(self.period):
            if time.monotonic() - self._looked > self.timeout + GRACE_SECONDS + 2 * self.period:
                self._say(f"the process that all others meet at has not answered for {self.timeout:g} s")
                os._exit(1)

    def _end(self, what: str) -> None:
        if self.client.add(TOLD, 1) == 1:
            self.client.set(FAILED, json.dumps([self.rank, what, 1]))
            self._say(what)
        os._exit(1)  # the main thread waits in a collective operation that will never end

    def _say(self, what: str) -> None:
        again = "give the same command again: it goes on from the last checkpoint"
        print(f"error: {what}; {again}", file=sys.stderr, flush=True)
