"""A transformer with skipped blocks as a plain network function."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from flcompress.diffusion.sampling import Network, as_network
from flcompress.ir.graph import BlockGraph
from flcompress.trace.skip import skip


def skipping(transformer: torch.nn.Module, paths: Iterable[str], graph: BlockGraph | None = None) -> Network:
    """The transformer as a network in which the blocks at `paths` are identities; traced once where `graph` is None."""
    network, skipped = as_network(transformer), tuple(paths)

    def call(x: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        with skip(transformer, skipped, graph=graph):
            return network(x, timestep, embeds)

    return call
