"""torch.compile, block by block: one compilation serves all blocks of a class, and blocks can still be skipped."""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flcompress.ir.graph import BlockGraph


def missing_compiler() -> str:
    """What torch.compile lacks on this machine's CPU, with the mend; empty where it lacks nothing."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) for torch.compile; install g++ or set CXX"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"no {header} for torch.compile; install Python's development headers"
    return ""


def compile_blocks(model: nn.Module, graph: BlockGraph) -> None:
    """Compile the forward of every block of `model`, in place.

    Not the modules themselves: their hooks, and the forwards that `skip` puts in place of theirs, must keep working.
    """
    forwards: dict[type[nn.Module], Any] = {}
    for block in graph.blocks:
        module = model.get_submodule(block.path)
        kind = type(module)
        forwards.setdefault(kind, torch.compile(kind.forward, dynamic=False))
        vars(module)["forward"] = partial(forwards[kind], module)
