"""Files that survive a kill (whole in the new state, or untouched in the old), their hashes, locks, and peak memory."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from flcompress.errors import RequestError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""What flock reports on Lustre without -o flock, on NFS (which wants a file open for writing), and on FUSE."""

TEMPORARY = ".tmp"
"""Suffix of a file that is not whole yet; a killed process may leave one."""

_BLOCK = 1 << 24
"""Bytes that are hashed at once."""

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there replaces `path` in one piece, unless the context raises."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a JSON-lines file; if the disk is full, the file is left as it was, without half a line.

    A last line that a killed process left incomplete is removed, since the new one would continue it.
    """
    added = line.encode() + b"\n"
    with path.open("a+b", buffering=0) as file:
        before = file.tell()
        if before and os.pread(file.fileno(), 1, before - 1) != b"\n":
            last = path.read_bytes().rpartition(b"\n")[2]
            if _is_json(last):
                added = b"\n" + added
            else:
                before -= len(last)
                file.truncate(before)
        try:
            if file.write(added) != len(added):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def move_in_place(work: Path, final: Path) -> None:
    """Rename a finished folder once everything in it is on disk."""
    for path in sorted(work.rglob("*")):
        sync(path)
    sync(work)
    work.rename(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do so for a folder; its files are on disk all the same.
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        os.close(descriptor)


class Lock(Enum):
    """The outcome of an attempt to lock a folder."""

    HELD = "held"
    BUSY = "busy"
    """Another process has it."""
    UNSUPPORTED = "unsupported"
    """The file system has no locks, so nothing is known of other processes."""


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[Lock]:
    """Hold the lock on `folder` (which may be renamed meanwhile), or report why it is not held.

    The lock goes with the process, so a killed one leaves none behind.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor, wait)
    finally:
        os.close(descriptor)


@contextmanager
def working_alone(folder: Path, busy: str, say: Callable[[str], None]) -> Iterator[None]:
    """Work in `folder` while no other flcompress does.

    Args:
        folder: what is locked.
        busy: message of the RequestError if another process has it.
        say: called with one line if the file system has no locks, so that two commands could meet unnoticed.

    Raises:
        RequestError: another process holds the lock.
    """
    with locked(folder, wait=False) as lock:
        if lock is Lock.BUSY:
            raise RequestError(busy)
        if lock is Lock.UNSUPPORTED:
            say(f"{folder}: this file system has no locks (flock); run no other flcompress in this folder meanwhile")
        yield


def _lock(descriptor: int, wait: bool) -> Lock:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return Lock.BUSY
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return Lock.UNSUPPORTED
    return Lock.HELD


def sha256(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Args:
        path: the file.
        beat: called after each block read, so that a long read shows signs of life.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            beat()
    return digest.hexdigest()


def key_of(**parts: Any) -> str:
    """Return the SHA-256, in hexadecimal, of the canonical JSON of `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without their ends: a newline, or a carriage return and a newline.

    `str.splitlines` also cuts at form feeds, U+0085, U+2028 and others, which people and JSON have in sentences.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def reset_peak() -> None:
    """Forget the peak so far if the system can (Linux); elsewhere `peak_mb` is the peak since the process start."""
    if _RESET.exists():
        try:
            _RESET.write_text("5", encoding="ascii")
        except PermissionError:
            return  # a sandbox may forbid it; then the peak since the process start is reported


def peak_mb() -> float:
    """Return the peak resident memory in megabytes (10^6 bytes) since `reset_peak`."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
