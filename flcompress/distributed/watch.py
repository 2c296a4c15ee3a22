"""A thread that publishes this process's progress, and ends the process when another one hangs or has failed."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

PERIOD_SECONDS = 1.0
"""Between two checks of the others, and two signs of life; less if `training.timeout` is very short."""
GRACE_SECONDS = 3.0
"""How long a process has to end by itself once another has failed. It may wait in a collective that never ends."""
FAILED, REPORTED = "failed", "reported"
"""Keys in the store: the first failure, and the number of processes that reported one."""
LEFT = -1
"""The sign of life of a process that has ended without a failure."""
RESUME = "give the same command again: it resumes from the last checkpoint"


@dataclass
class Pulse:
    """The progress of this process.

    Attributes:
        beats: number of heartbeats.
        activity: what the process does since the last one.
        main_only: whether the main process works while the others wait: that may take any time.
        ending: whether the process was asked to end (SIGTERM); not published. A launcher asks when a process has died,
            which cannot publish anything any more.
    """

    beats: int = 0
    activity: str = "start"
    main_only: bool = True
    ending: bool = False


@dataclass(frozen=True, slots=True)
class _Published:
    """The entries of one process in the store: its sign of life and its pulse."""

    life: int
    beats: int
    activity: str
    main_only: bool


@dataclass
class Watch:
    """The watch of one process over all.

    Attributes:
        client: a store connection of its own.
        rank: rank of this process.
        size: number of processes.
        timeout: seconds without any progress after which the processes count as hung.
        pulse: pulse of this process; its main thread writes it.
    """

    client: Any
    rank: int
    size: int
    timeout: float
    pulse: Pulse
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _checked: float = 0.0

    @property
    def period(self) -> float:
        """Seconds between two checks."""
        return min(PERIOD_SECONDS, self.timeout / 8)

    def start(self) -> None:
        """Publish the first sign of life and start the threads."""
        self._publish_life(0)
        self.publish(self.client)
        self._checked = time.monotonic()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._guard)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the threads."""
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self.period)  # a thread that waits for a store that is gone is abandoned

    def leave(self) -> None:
        """Stop, and publish that this process is about to end and must not be reported as missing."""
        self.stop()
        self._publish_life(LEFT)

    def lives(self) -> list[tuple[int, str]]:
        """Return (sign of life, activity) of every process, by rank."""
        return [(process.life, process.activity) for process in self._processes()]

    def publish(self, client: Any) -> None:
        """Publish the pulse through a store connection of the calling thread."""
        pulse = [self.pulse.beats, self.pulse.activity, self.pulse.main_only]
        client.set(f"pulse/{self.rank}", json.dumps(pulse))

    def _publish_life(self, life: int) -> None:
        self.client.set(f"life/{self.rank}", str(life))

    def _processes(self) -> list[_Published]:
        keys = [f"{kind}/{rank}" for kind in ("life", "pulse") for rank in range(self.size)]
        values = [json.loads(text) for text in self.client.multi_get(keys)]
        lives, pulses = values[: self.size], values[self.size :]
        return [_Published(life, *pulse) for life, pulse in zip(lives, pulses, strict=True)]

    def _watch(self) -> None:
        import torch.distributed as dist

        life, moved = 0, time.monotonic()
        last: list[tuple[int, str]] = []
        alive = [(-1, moved)] * self.size
        try:
            while not self._over.wait(self.period):
                life += 1
                self._publish_life(life)
                processes, now = self._processes(), time.monotonic()
                if self._over.is_set():
                    return
                alive = [
                    old if old[0] == process.life != LEFT else (process.life, now)
                    for old, process in zip(alive, processes, strict=True)
                ]
                progress = [(process.beats, process.activity) for process in processes]
                if progress != last or processes[0].main_only:
                    last, moved = progress, now
                self._checked = now
                self._judge(processes, [now - when for _, when in alive], now - moved)
                if self.client.check([FAILED]):
                    self._follow()
        except (dist.DistStoreError, dist.DistNetworkError):
            return  # the main thread meets the same error, and reports it

    def _judge(self, processes: list[_Published], silent: list[float], still: float) -> None:
        """End this process if another has been silent, or all have made no progress, for too long.

        Args:
            processes: what every process has published.
            silent: seconds since the last sign of life of each.
            still: seconds since any of them made progress.
        """
        limit = min(self.timeout, GRACE_SECONDS + 4 * self.period) if self.pulse.ending else self.timeout
        if max(silent) < limit and still < self.timeout:
            return
        late = [rank for rank, seconds in enumerate(silent) if seconds > max(4 * self.period, limit / 2)]
        fewest = min(process.beats for process in processes)
        behind = late or [rank for rank, process in enumerate(processes) if process.beats == fewest]
        named = " and ".join(f"process {rank} (last: {processes[rank].activity})" for rank in behind)
        why = " (training.timeout)" if limit == self.timeout else ", and this command was asked to end"
        self._end(f"{named} of {self.size} has not moved for {limit:g} s{why}")

    def _follow(self) -> None:
        """End this process with the exit status of another that has failed and reported it."""
        if not self._over.wait(GRACE_SECONDS):
            os._exit(json.loads(self.client.get(FAILED))[2])

    def _guard(self) -> None:
        """End this process if the store hangs with the process that keeps it: then `_watch` hangs too."""
        while not self._over.wait(self.period):
            if time.monotonic() - self._checked > self.timeout + GRACE_SECONDS + 2 * self.period:
                self._print(f"the process that all others meet at has not answered for {self.timeout:g} s")
                os._exit(1)

    def _end(self, what: str) -> None:
        if self.client.add(REPORTED, 1) == 1:
            self.client.set(FAILED, json.dumps([self.rank, what, 1]))
            self._print(what)
        os._exit(1)  # the main thread waits in a collective operation that will never end

    def _print(self, what: str) -> None:
        print(f"error: {what}; {RESUME}", file=sys.stderr, flush=True)
