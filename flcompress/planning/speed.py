"""How fast this machine computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.ir.graph import BlockGraph

if TYPE_CHECKING:
    from flcompress.models.families.family import LatentShape

CHEAP_FLOPS = 2e11
"""Up to here the transformer itself is timed; above, a matrix product."""


def measure_speed(
    transformer: Path,
    graph: BlockGraph,
    tokens: int,
    shape: LatentShape,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s that this machine reaches: on the transformer with random weights if that is cheap, else on a product."""
    import torch

    batch = max(1, min(16, int(CHEAP_FLOPS // max(graph.flops, 1))))
    if graph.flops > CHEAP_FLOPS:
        left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
        flops = 2.0 * 1024**3

        def work() -> Any:
            return left @ right
    else:
        from flcompress.models.inputs import example_inputs
        from flcompress.models.loading import meta_transformer

        model = meta_transformer(transformer).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        inputs = example_inputs(model, batch=batch, latent_shape=shape, tokens=tokens)
        flops = float(batch * graph.flops)

        def work() -> Any:
            return model(**inputs, return_dict=False)

    with torch.no_grad():
        work()
        times = []
        for _ in range(3):
            started = clock()
            work()
            times.append(clock() - started)
    return flops / min(times)
