"""The processes of one command: which one this is, how they exchange values, and how they end together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flcompress.distributed.watch import FAILED, LEFT, REPORTED, RESUME, Pulse, Watch
from flcompress.errors import INTERRUPTED, FlcompressError, TrainingError, first_line

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from flcompress.distributed.sequence import SequenceGroup

LONGEST_WAIT = 0.2
"""Seconds between two polls for a value of another process, at most."""
LEAVE_SECONDS = 10.0
"""How long the main process, which may keep the store, waits for the others to leave."""
_EXCHANGE_WORDS = ("gloo", "nccl", "connection", "timed out", "process group", "socket")
"""Words of torch's errors of a broken exchange; these have no class of their own in every backend."""


class World:
    """A process among those that share the work; the only one if no launcher started more.

    Attributes:
        rank: rank of this process; 0 is the main one, which writes files and prints.
        size: number of processes.
        sequence: those of them that compute one clip together with this one; None if each computes clips of its own.
        mesh: [groups, processes of a group] where the processes of a group split a training's weights and the groups
            hold copies; None if all split them.
        longest: (seconds, activity) of the longest time between two heartbeats while this process worked with the
            others; `training.timeout` must be longer than that.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size = rank, size
        self.sequence: SequenceGroup | None = None
        self.mesh: DeviceMesh | None = None
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
        """Whether this is the main process."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Number of shares that a batch is divided into: one a process, or one a group that computes clips together."""
        return self.size if self.sequence is None else self.size // self.sequence.size

    @property
    def data_rank(self) -> int:
        """Which of these shares is this process's."""
        return self.rank if self.sequence is None else self.rank // self.sequence.size

    def all_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each value over the processes; all must pass the same names."""
        if self.size == 1:
            return dict(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(list(values.values()), dtype=torch.float64)
        with self.exchanging():
            dist.all_reduce(total, group=self._control)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all processes by rank, in every process; plain JSON values only."""
        if self.size == 1:
            return [value]
        number = self._messages = self._messages + 1
        self._put(f"gather/{number}/{self.rank}", value)
        return [self._get(f"gather/{number}/{rank}") for rank in range(self.size)]

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Call `make` in the main process and return its result in every process; plain JSON values only.

        The call may take any time: the others wait without a timeout.
        """
        if self.size == 1:
            return make()
        number = self._messages = self._messages + 1
        if not self.main:
            return self._get(f"broadcast/{number}")
        activity, before = self._pulse.activity, self._pulse.main_only
        self._set_pulse(activity, main_only=True)
        value = make()
        self._set_pulse(activity, main_only=before)
        self._put(f"broadcast/{number}", value)
        return value

    def heartbeat(self, activity: str = "") -> None:
        """Signal that this process makes progress; a hung one is reported with its last activity.

        Everything that can take long calls this: each network call, each file.

        Args:
            activity: what this process does from now on; default: the same as before.
        """
        still = time.monotonic() - self._since
        if not self._pulse.main_only and still > self.longest[0]:
            self.longest = (round(still, 3), self._pulse.activity)
        self._pulse.beats += 1
        self._set_pulse(activity or self._pulse.activity, main_only=False)

    def ending(self) -> None:
        """Signal that this process was asked to end: it then waits only briefly for a silent peer."""
        self._pulse.ending = True

    def main_only(self, activity: str) -> None:
        """Signal that the main process works while the others wait for it, which may take any time."""
        self._set_pulse(activity, main_only=True)

    def _set_pulse(self, activity: str, *, main_only: bool) -> None:
        import torch.distributed as dist

        self._pulse.activity, self._pulse.main_only, self._since = activity, main_only, time.monotonic()
        if self._watch is not None:
            try:
                self._watch.publish(self._store)
            except (dist.DistStoreError, dist.DistNetworkError) as error:
                raise self._peer_error(error) from error

    @contextmanager
    def propagating_failures(self) -> Iterator[None]:
        """Report this process's failure to its peers so that exactly one of them prints it."""
        try:
            yield
        except FlcompressError as error:
            error.reported = self._report(error)
            raise
        except KeyboardInterrupt:
            interrupted = FlcompressError("interrupted")
            interrupted.exit_status, interrupted.reported = INTERRUPTED, True
            if self._report(interrupted):
                raise interrupted from None
            raise
        except Exception as error:
            failure = FlcompressError(f"{type(error).__name__}: {error}")
            if self._report(failure):
                failure.reported = True  # it follows from another's failure, such as a folder that is gone
                raise failure from error
            raise

    def _report(self, error: FlcompressError) -> bool:
        """Report to the others why this process stops; return whether another has reported a failure already."""
        if self._store is None:
            return False
        try:
            if self._store.add(REPORTED, 1) == 1:
                self._put(FAILED, [self.rank, str(error), error.exit_status])
                return False
        except (RuntimeError, FlcompressError):
            # The store is gone with the process that kept it. On each machine two processes print: one of them may
            # have been that process.
            return self._local_rank > 1
        time.sleep(0.5)  # a launcher ends all processes with the first: leave the one that prints time to do so
        with suppress(RuntimeError):
            if self._store.check([FAILED]):  # what follows from another's failure ends with its exit status
                _, _, error.exit_status = json.loads(self._store.get(FAILED))
        return True

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Turn a peer's disappearance during an exchange of tensors into one error that names it."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.size == 1 or not any(word in text for word in _EXCHANGE_WORDS):
                raise
            raise self._peer_error(error) from error

    def _peer_error(self, error: RuntimeError) -> FlcompressError:
        """Return the error that explains a broken exchange: another process failed, died or hangs."""
        cause = first_line(error)[:200]
        assert self._watch is not None
        try:
            before = self._watch.lives()
            end = time.monotonic() + 4 * self._watch.period
            while time.monotonic() < end:
                if self._store.check([FAILED]):  # the one that failed has reported why
                    return self._peer_failure()
                time.sleep(0.05)
            after = self._watch.lives()
        except RuntimeError:
            return TrainingError(
                f"process {self.rank} of {self.size} lost the one that all meet at: the launcher, or process 0, ended "
                f"or cannot be reached; {RESUME} ({cause})"
            )
        gone = [
            f"{rank} (last: {activity})"
            for rank, ((life, activity), (earlier, _)) in enumerate(zip(after, before, strict=True))
            if life == earlier
        ]
        if gone:
            return TrainingError(
                f"process {' and '.join(gone)} of {self.size} ended or cannot be reached; {RESUME} ({cause})"
            )
        return TrainingError(f"process {self.rank} of {self.size} lost its connection to another; {RESUME} ({cause})")

    def _peer_failure(self) -> FlcompressError:
        """Return the failure that another process reported."""
        rank, message, status = json.loads(self._store.get(FAILED))
        error = FlcompressError(f"process {rank}: {message}")
        error.exit_status = status
        return error

    def _put(self, key: str, value: Any) -> None:
        import torch.distributed as dist

        try:
            self._store.set(key, json.dumps(value))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise self._peer_error(error) from error

    def _get(self, key: str) -> Any:
        """Wait for a value, however long the work that makes it takes; a failure elsewhere ends the wait."""
        import torch.distributed as dist

        wait = 0.001
        try:
            while not self._store.check([key]):
                if self._store.check([FAILED]):
                    raise self._peer_failure()
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            return json.loads(self._store.get(key))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise self._peer_error(error) from error

    def join(self, store: Any, timeout: float) -> None:
        """Join the others in torch's process group, which exists by now, and in the store that they share.

        Args:
            store: torch's store.
            timeout: seconds without progress after which a process ends all of them.
        """
        import torch.distributed as dist

        stores: Any = dist  # mypy does not see those that come from C++
        self._store = stores.PrefixStore("flcompress", store)
        client = stores.PrefixStore("flcompress", store.clone())
        self._watch = Watch(client, self.rank, self.size, timeout, self._pulse)
        self._watch.start()
        self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout))

    def share_clips(self, processes: int, timeout: float) -> None:
        """Form groups of neighbours, each of which computes its clips together; all processes together.

        Args:
            processes: the size of a group; it divides their number.
            timeout: seconds without progress after which a process ends all of them.
        """
        import torch.distributed as dist

        from flcompress.distributed.sequence import SequenceGroup

        wait = timedelta(seconds=2 * timeout)
        group, _ = dist.new_subgroups(processes, timeout=wait)  # type: ignore[no-untyped-call]
        self.sequence = SequenceGroup(self.rank % processes, processes, group)

    def share_weights(self, processes: int, timeout: float, device: str) -> None:
        """Form groups of neighbours, each of which holds a copy of a training's weights; all processes together.

        Args:
            processes: the size of a group; it divides their number.
            timeout: seconds without progress after which a process ends all of them.
            device: "cpu" or "cuda".
        """
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        # Torch's own `init_device_mesh` would give these groups its default timeout, which may be shorter.
        wait = timedelta(seconds=2 * timeout)
        ranks = torch.arange(self.size).view(-1, processes)
        groups = [
            dist.new_subgroups_by_enumeration(split.tolist(), timeout=wait)[0]  # type: ignore[no-untyped-call]
            for split in (ranks.T, ranks)
        ]
        self.mesh = DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("copies", "parts"))

    def leave(self) -> None:
        """Leave the group; the main process leaves last, since it may keep the store that holds reported failures."""
        import torch.distributed as dist

        assert self._watch is not None
        with suppress(RuntimeError):
            self._watch.leave()
            end = time.monotonic() + LEAVE_SECONDS
            while self.main and time.monotonic() < end and any(life != LEFT for life, _ in self._watch.lives()):
                time.sleep(0.02)
        self._control = self.sequence = self.mesh = None
        dist.destroy_process_group()
