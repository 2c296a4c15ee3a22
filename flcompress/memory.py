"""Peak memory of this process over a stretch of work."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Forget the peak so far, where the system can (Linux); elsewhere `peak_mb` is the peak since the start."""
    if _RESET.exists():
        try:
            _RESET.write_text("5", encoding="ascii")
        except PermissionError:
            return  # a sandbox may forbid it; the peak since the start is then what is told


def peak_mb() -> float:
    """The peak resident memory in megabytes (10^6 bytes) since `reset_peak`."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
