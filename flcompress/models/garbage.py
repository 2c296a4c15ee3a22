"""Memory of a GPU that nothing refers to any more, given back before the next model is loaded."""

from __future__ import annotations

import gc

import torch


def free_gpu_memory() -> None:
    """Free tensors that only reference cycles hold, and return torch's cached memory to the GPU; nothing on a CPU.

    Called after each pass, after clips are encoded and around decoding: wherever the next thing in memory is another
    model. Without it the garbage of a pass (gigabytes of sharded weights) is there until Python happens to collect.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
