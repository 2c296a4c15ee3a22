"""Time and memory of a piece of work over all its attempts: a killed one leaves its figures to the next."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.core.records import AttemptsFile
from flcompress.errors import RecordError
from flcompress.files import peak_mb, reset_peak

ATTEMPTS_FILE = "attempts.json"

PEAKS = ("peak_rss_mb", "peak_gpu_mb", "peak_gpu_reserved_mb")

PERIOD_SECONDS = 5.0
"""Between two records of an attempt that is under way: what a killed one loses at most."""


@dataclass
class Attempts:
    """The attempts at one piece of work, the last of which is under way.

    Attributes:
        file: JSON: the key of the work, and of each attempt its seconds and peak memory.
        key: the key of the result. Attempts at something else do not count.
        done: seconds and peak memory of the earlier attempts.
        began: when this one began, on the monotonic clock.
    """

    file: Path
    key: str
    done: list[dict[str, float]]
    began: float
    _ended: dict[str, float] | None = None

    def record(self) -> dict[str, Any]:
        """Return seconds and the number of attempts in total, and peaks of memory in megabytes, a GPU's where used."""
        all_of_them = [*self.done, self._own()]
        peaks = {name: [part[name] for part in all_of_them if name in part] for name in PEAKS}
        return {
            "seconds": round(sum(part["seconds"] for part in all_of_them), 3),
            **{name: max(values) for name, values in peaks.items() if values},
            "attempts": len(all_of_them),
        }

    def write(self) -> None:
        """Write the record so far. It is not essential: if it cannot be written, the work continues."""
        with suppress(OSError):
            AttemptsFile(key=self.key, attempts=[*self.done, self._own()]).write(self.file, indent=None)

    def end(self) -> None:
        """Stop the clock of this attempt."""
        self._ended = self._own()
        self.write()

    def _own(self) -> dict[str, float]:
        seconds = round(time.monotonic() - self.began, 3)
        return self._ended or {"seconds": seconds, "peak_rss_mb": peak_mb(), **_gpu_peaks()}


def describe(record: Mapping[str, Any]) -> str:
    """Return a record as a sentence."""
    several = f" in {record['attempts']} attempts" if record.get("attempts", 1) > 1 else ""
    gpu = f", on the GPU {record['peak_gpu_mb']:.0f} MB" if "peak_gpu_mb" in record else ""
    return f"{record['seconds']:.1f} s{several}, peak {record['peak_rss_mb']:.0f} MB{gpu}"


def _gpu_peaks() -> dict[str, float]:
    """Return the peak memory of this process's GPU: of tensors, and what torch reserved; empty if none is used.

    Without importing torch, which a command that needs none has not loaded.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_gpu_mb": round(allocated / 1e6, 1), "peak_gpu_reserved_mb": round(reserved / 1e6, 1)}


@contextmanager
def attempt(file: Path, key: str) -> Iterator[Attempts]:
    """Count one more attempt, from now to the end of the context, whatever ends it."""
    attempts = Attempts(file, key, _attempts(file, key), time.monotonic())
    reset_peak()
    if _gpu_peaks():
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    attempts.write()
    over = threading.Event()

    def keep() -> None:
        while not over.wait(PERIOD_SECONDS):
            attempts.write()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield attempts
    finally:
        over.set()
        keeper.join()
        attempts.end()


def seconds_so_far(file: Path, key: str) -> float:
    """Return the seconds of all recorded attempts."""
    return sum(earlier["seconds"] for earlier in _attempts(file, key))


def _attempts(file: Path, key: str) -> list[dict[str, float]]:
    try:
        record = AttemptsFile.read(file)
    except RecordError:
        return []  # there was no attempt, or one before they were counted
    return record.dump()["attempts"] if record.key == key else []
