"""Errors of the operating system as one line each: what happened to which file, and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flcompress.errors import FlcompressError, RequestError

_REQUESTS = {
    errno.ENOENT: "give the name of one that exists",
    errno.ENOTDIR: "a part of this path is a file, expected a folder; choose another place",
    errno.EISDIR: "a folder given, expected the name of a file",
    errno.EEXIST: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle; remove one of them",
    errno.EROFS: "make it writable, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EINVAL: "its name or place is not one that this file system takes; choose another",
    errno.ENXIO: "no regular file; give one",
    errno.ENODEV: "no regular file; give one",
    errno.ETXTBSY: "choose another place",
    errno.EXDEV: "choose a place on the same disk",
}
"""Errors that another request would avoid, and the fix of each."""

_FAILURES = {
    errno.EIO: "check the disk and give the same command again",
    errno.ESTALE: "the file server has lost the file; give the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and give the same command again",
    errno.ENFILE: "raise the machine's limit of open files and give the same command again",
    errno.ENOMEM: "free some memory and give the same command again",
    errno.EBUSY: "another program uses it; give the same command again",
}

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_IN_TEXT = re.compile(r"\(os error (\d+)\)")
"""How safetensors' writer reports the operating system's error."""


@contextmanager
def system_errors_in_one_line(where: Path | None = None) -> Iterator[None]:
    """Turn an error of the operating system into a FlcompressError of one line.

    Args:
        where: what the work writes, for errors that name no file, such as that of a full disk.

    Raises:
        RequestError: a place that cannot be used: another request avoids it.
        FlcompressError: the disk is full, or failed; what was stored before is kept.
    """
    try:
        yield
    except UnicodeEncodeError as error:  # of a file's name or of what is printed; contents are always UTF-8
        text = error.object[max(error.start - 20, 0) : error.end + 20]
        raise RequestError(
            f"{text!a}: cannot be written in this system's encoding ({error.encoding}); set PYTHONUTF8=1"
        ) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of the output has gone; click ends quietly
            raise
        raise _one_line(error, error.errno, error.filename2 or error.filename, where) from error
    except SafetensorError as error:
        match = _IN_TEXT.search(str(error))
        if match is None:
            raise
        raise _one_line(error, int(match[1]), None, where) from error


def check_writable(path: Path) -> None:
    """Raise OSError, before any work, where no file or folder can be written at `path`."""
    above = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if above != path.absolute() and not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    if not os.access(above, os.W_OK):
        number = errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(above))


def _one_line(error: Exception, number: int | None, file: str | bytes | None, where: Path | None) -> FlcompressError:
    if number is None:  # a library's own, with a text alone
        return FlcompressError(" ".join(str(error).split()) or type(error).__name__)
    path = os.fsdecode(file) if file is not None else str(where or "flcompress")
    if number in _FULL:
        return FlcompressError(
            f"{where or path}: no space left on the disk; what was stored before is kept: "
            "free some space and give the same command again"
        )
    if number in _REQUESTS:
        return RequestError(f"{path}: {os.strerror(number)}; {_REQUESTS[number]}")
    return FlcompressError(f"{path}: {os.strerror(number)}; {_FAILURES.get(number, 'give the same command again')}")
