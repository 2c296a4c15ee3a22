"""The processes of one command: which one this is, how they agree, and how they end together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flcompress.distributed.watch import FAILED, LEFT, TOLD, Pulse, Watch
from flcompress.errors import INTERRUPTED, FlcompressError, TrainingError

if TYPE_CHECKING:
    import torch.distributed as dist

LONGEST_WAIT = 0.2
"""Seconds between two looks for what another process will give."""
LEAVE_SECONDS = 10.0
"""How long the main process, which may keep the store, waits for the others to leave."""
_EXCHANGE_WORDS = ("gloo", "nccl", "connection", "timed out", "process group", "socket")
"""What torch's errors of a broken exchange say; they have no class of their own in every backend."""
_AGAIN = "give the same command again: it goes on from the last checkpoint"


class World:
    """One process among those that share the work; alone where no launcher started more.

    Attributes:
        rank: which process this is; 0 is the main one, which writes and speaks.
        size: how many there are.
        longest: (seconds, at what) between two beats, at most, while it worked with the others; `training.timeout` must
            be longer than that.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size = rank, size
        self._local_rank = local_rank
        self._pulse = Pulse()
        self._store: Any = None  # of strings, shared by all processes
        self._control: dist.ProcessGroup | None = None
        self._watch: Watch | None = None
        self._messages = 0
        self.longest = (0.0, "")
        self._since = time.monotonic()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value over the processes; all must give the same names."""
        if self.size == 1:
            return dict(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(list(values.values()), dtype=torch.float64)
        with self.exchanging():
            dist.all_reduce(total, group=self._control)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def all_gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank, in every process; plain JSON values only."""
        if self.size == 1:
            return [value]
        number = self._messages = self._messages + 1
        self._put(f"gather/{number}/{self.rank}", value)
        return [self._get(f"gather/{number}/{rank}") for rank in range(self.size)]

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the main process, in every process; plain JSON values only. It may take any time."""
        if self.size == 1:
            return make()
        number = self._messages = self._messages + 1
        if not self.main:
            return self._get(f"broadcast/{number}")
        doing, before = self._pulse.doing, self._pulse.alone
        self._moved(doing, alone=True)
        value = make()
        self._moved(doing, alone=before)
        self._put(f"broadcast/{number}", value)
        return value

    def heartbeat(self, what: str = "") -> None:
        """Say that this process moves on together with the others, and to what: a hung one is told by its last word.

        Where nothing is said, it moves on with the same. All that can take long beats: each network call, each file.
        """
        still = time.monotonic() - self._since
        if not self._pulse.alone and still > self.longest[0]:
            self.longest = (round(still, 3), self._pulse.doing)
        self._pulse.beats += 1
        self._moved(what or self._pulse.doing, alone=False)

    def ending(self) -> None:
        """Say that this process was asked to end: it does not wait for long for one that gives no sign of life."""
        self._pulse.ending = True

    def main_only(self, what: str) -> None:
        """Say that the main process works on while the others wait for it, which may take any time."""
        self._moved(what, alone=True)

    def _moved(self, what: str, *, alone: bool) -> None:
        import torch.distributed as dist

        self._pulse.doing, self._pulse.alone, self._since = what, alone, time.monotonic()
        if self._watch is not None:
            try:
                self._watch.publish(self._store)
            except (dist.DistStoreError, dist.DistNetworkError) as error:
                raise self._broken(error) from error

    @contextmanager
    def propagating_failures(self) -> Iterator[None]:
        """Around all work: what ends this process is told to the others, and one of them says it."""
        try:
            yield
        except FlcompressError as error:
            error.reported = self._fail(error)
            raise
        except KeyboardInterrupt:
            interrupted = FlcompressError("interrupted")
            interrupted.exit_status, interrupted.reported = INTERRUPTED, True
            if self._fail(interrupted):
                raise interrupted from None
            raise
        except Exception as error:
            failure = FlcompressError(f"{type(error).__name__}: {error}")
            if self._fail(failure):
                failure.reported = True  # it follows from another's failure, such as a folder that is gone
                raise failure from error
            raise

    def _fail(self, error: FlcompressError) -> bool:
        """Tell the others why this process stops; whether one of them says it for all."""
        if self._store is None:
            return False
        try:
            if self._store.add(TOLD, 1) == 1:
                self._put(FAILED, [self.rank, str(error), error.exit_status])
                return False
        except (RuntimeError, FlcompressError):
            # The store is gone, with its keeper. Of each machine's processes two speak: the keeper may have been one.
            return self._local_rank > 1
        time.sleep(0.5)  # a launcher ends all processes with the first: leave the one that speaks time to do so
        with suppress(RuntimeError):
            if self._store.check([FAILED]):  # what follows from another's failure ends as that does
                _, _, error.exit_status = json.loads(self._store.get(FAILED))
        return True

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Around work in which the processes exchange tensors: the loss of one becomes one line that names it."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.size == 1 or not any(word in text for word in _EXCHANGE_WORDS):
                raise
            raise self._broken(error) from error

    def _broken(self, error: RuntimeError) -> FlcompressError:
        """What an error of an exchange means: another process failed, died or hangs."""
        first = str(error).splitlines()[0][:200]
        assert self._watch is not None
        try:
            before = self._watch.lives()
            end = time.monotonic() + 4 * self._watch.period
            while time.monotonic() < end:
                if self._store.check([FAILED]):  # the one that failed says why
                    return self._failure()
                time.sleep(0.05)
            after = self._watch.lives()
        except RuntimeError:
            return TrainingError(
                f"process {self.rank} of {self.size} lost the one that all meet at: the launcher, or process 0, ended "
                f"or cannot be reached; {_AGAIN} ({first})"
            )
        gone = [f"{rank} (last: {one[1]})" for rank, one in enumerate(after) if one[0] == before[rank][0]]
        if gone:
            return TrainingError(
                f"process {' and '.join(gone)} of {self.size} ended or cannot be reached; {_AGAIN} ({first})"
            )
        return TrainingError(f"process {self.rank} of {self.size} lost its connection to another; {_AGAIN} ({first})")

    def _failure(self) -> FlcompressError:
        """The failure that another process told."""
        rank, message, status = json.loads(self._store.get(FAILED))
        error = FlcompressError(f"process {rank}: {message}")
        error.exit_status = status
        return error

    def _put(self, key: str, value: Any) -> None:
        import torch.distributed as dist

        try:
            self._store.set(key, json.dumps(value))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise self._broken(error) from error

    def _get(self, key: str) -> Any:
        """Wait for a value, however long the work that makes it takes; a failure elsewhere ends the wait."""
        import torch.distributed as dist

        wait = 0.001
        try:
            while not self._store.check([key]):
                if self._store.check([FAILED]):
                    raise self._failure()
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            return json.loads(self._store.get(key))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise self._broken(error) from error

    def join(self, store: Any, timeout: float) -> None:
        """Meet the others in torch's process group, which stands, and in the store that they share."""
        import torch.distributed as dist

        stores: Any = dist  # mypy does not see those that come from C++
        self._store = stores.PrefixStore("flcompress", store)
        client = stores.PrefixStore("flcompress", store.clone())
        self._watch = Watch(client, self.rank, self.size, timeout, self._pulse)
        self._watch.start()
        self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout))

    def leave(self) -> None:
        """The main process leaves last, since it may keep the store that tells the others how it ended."""
        import torch.distributed as dist

        assert self._watch is not None
        with suppress(RuntimeError):
            self._watch.leave()
            end = time.monotonic() + LEAVE_SECONDS
            while self.main and time.monotonic() < end and any(life != LEFT for life, _ in self._watch.lives()):
                time.sleep(0.02)
        self._control = None
        dist.destroy_process_group()
