"""The machine of a measurement, and its peak memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from flcompress.files import peak_mb, reset_peak

SLACK = 32e6
"""Bytes by which the peak may exceed the memory in use right after a reset: else the system did not reset it."""


def machine(device: str) -> dict[str, Any]:
    """Return what computed, by name; a GPU that is only installed is not named."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "torch": torch.__version__,
        "system": platform.platform(),
    }


class MemoryMeter:
    """Growth of the memory in use: torch's own on a GPU, the resident set of this process on a CPU (Linux)."""

    def __init__(self, device: str) -> None:
        self._gpu = device.startswith("cuda")
        self._start: float | None = 0.0

    def begin(self) -> None:
        """Forget the peak so far."""
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._start = float(torch.cuda.memory_allocated())
            return
        reset_peak()
        resident = float(psutil.Process().memory_info().rss)
        self._start = resident if peak_mb() * 1e6 <= resident + SLACK else None

    def growth(self) -> int | None:
        """Return the bytes from `begin` to the peak since; None where the system does not reset its peak."""
        if self._start is None:
            return None
        peak = torch.cuda.max_memory_allocated() if self._gpu else peak_mb() * 1e6
        return max(0, round(peak - self._start))


def memory_in_use(device: str) -> int:
    """Return the bytes in use: of the whole GPU, other libraries' included, or the resident set of this process."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        return int(total - free - torch.cuda.memory_reserved() + torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def _cpu_name() -> str:
    """Return the processor's name, as far as the system knows it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
