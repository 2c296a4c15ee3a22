"""Files that survive a kill or a power cut: whole in the new state, or untouched in the old."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flcompress.errors import FlcompressError, RequestError


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece: to a temporary one, which then takes its place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file; where the disk is full, the file is left as it was, without half a line."""
    added = line.encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(added) != len(added):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise


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
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the one lock on `folder` (which may be renamed meanwhile); gives False if another process has it.

    The lock goes with the process, so a killed one leaves none behind.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_told(where: Path) -> Iterator[None]:
    """Turn a full disk, however a library reports it, or one that may not be written, into one line; what was stored
    before stays as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES):
            raise RequestError(
                f"{error.filename or where}: {os.strerror(error.errno)}; make it writable, or choose another --run-dir"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(where) from error
    except SafetensorError as error:  # its writer reports the operating system's error as text
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise _full(where) from error


def _full(where: Path) -> FlcompressError:
    return FlcompressError(
        f"{where}: no space left on the disk; what was stored before is kept: "
        "free some space and give the same command again"
    )
