"""Cost of importance scoring against L + 1 full forwards, interleaved: python docs/measure_importance.py TRANSFORMER.

Prints the median ratio of the times with its spread over rounds, and the largest difference between the scores.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from flcompress.diffusion.flow import add_noise, elbo_weight, tweedie
from flcompress.diffusion.sampling import as_network
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.passes.importance import Importance
from flcompress.trace.skip import skip
from flcompress.trace.tracer import trace
from flcompress.training.objectives import predict

BATCH, ROUNDS = 32, 7


def main(folder: Path) -> None:
    """Measure and print."""
    model = load_transformer(folder)
    graph = trace(model, example_inputs(model))
    network = as_network(model)
    draw = torch.Generator().manual_seed(0)
    channels = model.config.in_channels
    x0, noise = (torch.randn(BATCH, channels, 3, 8, 8, generator=draw) for _ in range(2))
    embeds = torch.randn(BATCH, 16, model.config.text_dim, generator=draw)
    sigma = 0.05 + 0.9 * torch.rand(BATCH, generator=draw)
    step = Importance(draws=BATCH, noise_levels=1, batch=BATCH)
    x = add_noise(x0, noise, sigma)

    @torch.no_grad()
    def loss() -> torch.Tensor:
        error = (x0 - tweedie(x, predict(network, x, sigma, embeds), sigma)).double()
        return elbo_weight(sigma) * error.square().mean(dim=tuple(range(1, x.ndim)))

    def naive() -> dict[str, torch.Tensor]:
        full = loss()
        scores = {}
        for block in graph.blocks:
            with skip(model, [block.path], graph=graph):
                scores[block.path] = loss() - full
        return scores

    def reused() -> dict[str, torch.Tensor]:
        return step._differences(model, graph, x0, embeds, noise, sigma)

    plain, fast = naive(), reused()
    difference = max(float((plain[path] - fast[path]).abs().max()) for path in plain)
    ratios = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        naive()
        middle = time.perf_counter()
        reused()
        ratios.append((time.perf_counter() - middle) / (middle - started))
    print(
        f"{len(graph.blocks)} blocks: prefix reuse takes {statistics.median(ratios):.3f} of the time of "
        f"{len(graph.blocks) + 1} full forwards (from {min(ratios):.3f} to {max(ratios):.3f} over {ROUNDS} rounds); "
        f"largest difference between scores {difference:.1e}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
