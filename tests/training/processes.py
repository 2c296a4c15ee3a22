"""Commands of several processes as a launcher starts them, without the seconds that each takes to import torch.

A fork server imports once; every process is forked from it, gets a launcher's environment variables and its own output
files, and runs the real command line. Where there is a GPU every process imports on its own: what the server imports
opens the card, which no fork can use then. Tests that need the real launchers start those.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PATIENCE = 900.0
"""Seconds after which a command counts as hung. No test measures by it: on a busy machine all may take minutes."""

Hook = Callable[[], None]
"""Called in a process before the command runs."""

_WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def _context() -> Any:
    import torch

    # What the fork server and all that it starts inherit: as in a run by hand, where the command line sets both.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.warm"])
    return context


@dataclass(frozen=True)
class DieAtWrite:
    """SIGKILL this process just before its `number`-th change of a file or folder below `folder`."""

    folder: str
    number: int

    def __call__(self) -> None:
        count_writes(self.folder, self._reached)

    def _reached(self, count: int) -> None:
        if count == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class CountWrites:
    """Leave the number of changes below `folder` in `file`."""

    folder: str
    file: str

    def __call__(self) -> None:
        def note(count: int) -> None:
            Path(self.file).write_text(str(count), encoding="utf-8")

        count_writes(self.folder, note)


def count_writes(folder: str, seen: Callable[[int], None]) -> None:
    """Call `seen` with 1, 2, ... before each change of a file or folder below `folder` that Python makes."""
    count = 0
    busy = False

    def hook(event: str, given: Any) -> None:
        nonlocal count, busy
        if busy or (event not in _WRITES and event != "open"):
            return
        if event == "open" and not (isinstance(given[1], str) and set(given[1]) & set("wa+x")):
            return
        if not str(given[0]).startswith(folder):
            return
        busy = True
        count += 1
        seen(count)
        busy = False

    sys.addaudithook(hook)


def _run(arguments: Sequence[str], environment: Mapping[str, str], output: str, hook: Hook | None) -> None:
    os.environ.update(environment)
    for stream, place in ((1, ".out"), (2, ".err")):
        descriptor = os.open(output + place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    faulthandler.register(signal.SIGUSR1, file=2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    from flcompress.cli import main
    from tests.training import toy

    toy.install()
    if hook is not None:
        hook()
    main(list(arguments), prog_name="flcompress")


@dataclass
class Command:
    """One command of several processes, running or ended.

    Attributes:
        processes: by rank.
        outputs: prefix of the files with what each wrote.
    """

    processes: list[BaseProcess]
    outputs: list[Path] = field(default_factory=list)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self.processes]

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
        """Exit statuses by rank, negative signal numbers for killed ones; None for those that still run."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_any(self, seconds: float) -> None:
        """Until one has ended."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes], seconds)

    def signal(self, rank: int, number: int) -> None:
        """Send one process a signal, if it still runs."""
        if self.processes[rank].is_alive():
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """SIGKILL what still runs."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def show_stacks(self) -> None:
        """Have each that still runs write where it is to its standard error."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGUSR1)
        time.sleep(1.0)

    def errors(self) -> list[str]:
        """What each wrote to standard error."""
        return [Path(f"{output}.err").read_text(encoding="utf-8") for output in self.outputs]


def start(
    arguments: Sequence[str | Path],
    outputs: Path,
    *,
    processes: int = 1,
    hooks: Mapping[int, Hook] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Command:
    """Start `flcompress ARGUMENTS` on `processes` processes, as torchrun would; on one without a launcher's variables.

    Process 0 keeps the store in which they meet, as where a cluster's scheduler starts them.

    Args:
        arguments: of the command line.
        outputs: folder for what they write, made if need be.
        processes: how many.
        hooks: what to call in a process first, by rank.
        environment: variables to set beside.
    """
    outputs.mkdir(parents=True, exist_ok=True)
    context, port = _context(), str(free_port())
    started, files = [], []
    for rank in range(processes):
        variables = dict(environment or {})
        if processes > 1:
            variables |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        files.append(outputs / f"rank-{rank}")
        process = context.Process(
            target=_run, args=([str(one) for one in arguments], variables, str(files[-1]), (hooks or {}).get(rank))
        )
        process.start()
        started.append(process)
    return Command(started, files)


def run(arguments: Sequence[str | Path], outputs: Path, **given: Any) -> Command:
    """`start`, and wait; AssertionError with what they wrote where one fails."""
    command = start(arguments, outputs, **given)
    statuses = command.wait()
    if None in statuses:
        command.show_stacks()
    command.kill()
    assert statuses == [0] * len(statuses), (statuses, command.errors())
    return command


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
