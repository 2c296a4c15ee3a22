"""A transformer with skipped blocks as a plain network function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.diffusion.sampling import Network
from flcompress.ir.graph import BlockGraph
from flcompress.models.network import as_network, stock_model
from flcompress.tracing.skip import graph_of, skip


def skipping(
    transformer: torch.nn.Module,
    paths: Iterable[str],
    graph: BlockGraph | None = None,
    guidance: float | None = None,
    skip: Callable[..., AbstractContextManager[None]] = skip,
) -> Network:
    """The transformer as a network in which the blocks at `paths` are identities; traced once where `graph` is None.

    Args:
        transformer: a stock model, or what an engine wrapped around one.
        paths: of the blocks.
        graph: its block graph.
        guidance: the embedded scale, where the network is told one.
        skip: `trace.skip.skip`, or `mute`.
    """
    network, skipped, model = as_network(transformer, guidance), tuple(paths), stock_model(transformer)
    graph = graph or graph_of(model)

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        with skip(model, skipped, graph=graph):
            return network(x, timestep, conditioning)

    return call
