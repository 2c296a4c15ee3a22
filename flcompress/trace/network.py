"""A transformer with skipped blocks as a plain network function."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.diffusion.sampling import Network
from flcompress.ir.graph import BlockGraph
from flcompress.models.network import as_network
from flcompress.trace.skip import skip


def skipping(
    transformer: torch.nn.Module,
    paths: Iterable[str],
    graph: BlockGraph | None = None,
    guidance: float | None = None,
) -> Network:
    """The transformer as a network in which the blocks at `paths` are identities; traced once where `graph` is None.

    `guidance` is the embedded scale, where the network is told one.
    """
    network, skipped = as_network(transformer, guidance), tuple(paths)

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        with skip(transformer, skipped, graph=graph):
            return network(x, timestep, conditioning)

    return call
