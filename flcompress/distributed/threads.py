"""How many threads compute on a CPU: as many as there are free cores when the work starts.

Threads of one operation wait for each other by spinning. Beside other work one of them is often not running, and the
others burn their cores until it is: two threads on two cores of which one is taken need ten times the processor time of
one thread. Letting them sleep instead makes a quiet machine slower by more than a tenth (docs/benchmarks/speed.md).
"""

from __future__ import annotations

import os

SAMPLE_SECONDS = 0.5
"""How long the machine is watched."""


def free_cores() -> int:
    """Count the cores of this process that nothing else keeps busy; at least one."""
    import psutil

    used: list[float] = psutil.cpu_percent(interval=SAMPLE_SECONDS, percpu=True)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(used))
    busy = sum(used[core] for core in own if core < len(used)) / 100.0
    return max(1, len(own) - round(busy))


def use_free_cores(earlier: int | None = None) -> int:
    """Set how many threads torch computes with, and return it.

    OMP_NUM_THREADS, which launchers set as well, is obeyed.

    Args:
        earlier: the number of an earlier attempt at the same work: sums that are split over threads round differently.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(earlier or min(free_cores(), torch.get_num_threads()))
    return torch.get_num_threads()
