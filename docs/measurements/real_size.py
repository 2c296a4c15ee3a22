"""Whole updates of Stages II and III of whole models, on tensors without storage, against the plan.

`python -m docs.measurements.real_size [NAME ...]`: a row for each stage of the shipped recipes, on one GPU, one clip.
The real roles load, run and step on fake tensors under CUDA's autocast, and the bytes alive are counted; minutes of
processor time a model, and little memory. `NAME` is a recipe; three by default.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from flcompress.ir.selection import choose
from flcompress.passes.dmd import DistributionMatching
from flcompress.passes.stochastic_depth import StochasticDepth
from tests.planning.real_size import RealSize

NAMES = ("wan2.1-t2v-14b", "hunyuanvideo", "cogvideox-5b")
REMOVED = 0.3


def measure(name: str) -> None:
    """Print the rows of one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        model = RealSize.of(name, Path(folder))
        removed = choose(model.source.graph, REMOVED, "middle")
        for kind, gone in ((StochasticDepth, ()), (DistributionMatching, removed)):
            planned, counted = model.planned(kind, gone), model.counted(kind, gone)
            row = (name, kind.name, f"{counted / 1e9:.1f}", f"{planned / 1e9:.1f}", f"{planned / counted - 1:+.1%}")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    print("| model | pass | GB counted | planned | error |\n|---|---|---|---|---|")
    for name in sys.argv[1:] or NAMES:
        measure(name)
