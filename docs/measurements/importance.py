"""Cost of importance scoring against L + 1 full forwards, interleaved.

`python docs/measurements/importance.py TRANSFORMER` prints the median ratio of the times with its spread over rounds,
and the largest difference between the scores.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from flcompress.diffusion.contract import contract_of
from flcompress.diffusion.process import FLOW
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network
from flcompress.tracing.skip import skip
from flcompress.tracing.tracer import trace
from flcompress.training.methods.skipped_loss import skipped_losses

BATCH, ROUNDS = 32, 7


def main(folder: Path) -> None:
    """Measure and print."""
    model = load_transformer(folder)
    graph = trace(model, example_inputs(model))
    network = as_network(model)
    draw = torch.Generator().manual_seed(0)
    channels = model.config.in_channels
    x0, noise = (torch.randn(BATCH, channels, 3, 8, 8, generator=draw) for _ in range(2))
    given = {"encoder_hidden_states": torch.randn(BATCH, 16, model.config.text_dim, generator=draw)}
    contract = contract_of({}, num_inference_steps=50, guidance_scale=4.0, max_sequence_length=16)
    sigma = 0.05 + 0.9 * torch.rand(BATCH, generator=draw)
    singles = [(block.path,) for block in graph.blocks]
    x = FLOW.add_noise(x0, noise, sigma)

    @torch.no_grad()
    def loss() -> torch.Tensor:
        error = (x0 - FLOW.tweedie(x, network(x, FLOW.timestep(sigma), given), sigma)).double()
        return FLOW.elbo_weight(sigma) * error.square().mean(dim=tuple(range(1, x.ndim)))

    def naive() -> dict[str, torch.Tensor]:
        full = loss()
        scores = {}
        for block in graph.blocks:
            with skip(model, [block.path], graph=graph):
                scores[block.path] = loss() - full
        return scores

    def reused() -> dict[str, torch.Tensor]:
        losses = skipped_losses(model, graph, contract, singles, x0, given, noise, sigma)
        return dict(zip((path for (path,) in singles), losses, strict=True))

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
