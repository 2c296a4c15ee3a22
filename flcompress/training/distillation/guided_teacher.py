"""The real score of distribution matching: a frozen teacher guided by text and away from its pruned self."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flcompress.core.settings import Range
from flcompress.diffusion.matching import well_guided
from flcompress.diffusion.network import Conditioning, Network, with_negative_prompt
from flcompress.draws import Draws
from flcompress.ir.graph import BlockGraph
from flcompress.tracing.prefix import remember
from flcompress.training.distillation.settings import NO_INTER, NO_INTRA
from flcompress.training.engines import Engine

Scales = tuple[torch.Tensor, torch.Tensor]
"""(b1, b2) of each sample, [n] each."""


class GuidedTeacher:
    """FastLightGen's well-guided teacher.

        x_real = u_full + b1 (c_full - u_full) + b2 (c_full - c_pruned)

    with b1 and b2 drawn uniformly from their ranges for every sample. Guidance that has no effect costs no forward.

    Args:
        engine: runs the model.
        model: frozen; paths of blocks lead into it.
        network: the same model under the engine, as a network.
        graph: the model's.
        prune_set: blocks that its pruned self skips, in order of depth.
        inter_cfg: range of b1, text guidance; 1 is none.
        intra_cfg: range of b2, guidance away from the pruned self; 0 is none.
        negative: conditioning of the negative prompt, [1, ...].
        conditional: what predicts c_full, where it is more than `network`: it also keeps features.
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        network: Network,
        graph: BlockGraph,
        prune_set: Sequence[str],
        *,
        inter_cfg: Range,
        intra_cfg: Range,
        negative: Conditioning,
        conditional: Network | None = None,
    ) -> None:
        self._engine, self._model, self._network, self._graph = engine, model, network, graph
        self._conditional = conditional or network
        self._prune_set, self._inter_cfg, self._intra_cfg = prune_set, inter_cfg, intra_cfg
        self._negative = negative

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning, scales: Scales
    ) -> torch.Tensor:
        """Return the guided prediction, shaped as x [n, channels, frames, height, width]; `scales` are on its device.

        Tweedie's formula is affine in the prediction and guidance weights sum to one: guiding either is the same.
        """
        inter, intra = (scale.reshape(-1, *([1] * (x.ndim - 1))) for scale in scales)
        conditional, pruned = self._full_and_pruned(x, timestep, conditioning)
        unconditional = conditional
        if self._inter_cfg != NO_INTER:
            unconditional = self._network(x, timestep, with_negative_prompt(conditioning, self._negative))
        return well_guided(unconditional, conditional, pruned, inter, intra)

    def draw(self, draws: Draws) -> Scales:
        """Draw the scales of guidance, evenly from their ranges."""
        inter, intra = (low + (high - low) * draws.uniform() for low, high in (self._inter_cfg, self._intra_cfg))
        return inter, intra

    def _full_and_pruned(
        self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return predictions with all blocks and without the prune set; what comes before it is computed once."""
        model, graph, skipped = self._model, self._graph, self._prune_set
        if self._intra_cfg == NO_INTRA:
            full = self._conditional(x, timestep, conditioning)
            return full, full
        if self._engine.splits_weights:
            full = self._conditional(x, timestep, conditioning)
            with self._engine.skip(model, skipped, graph=graph):
                return full, self._network(x, timestep, conditioning)
        with remember(model, graph, until=skipped[0]) as memory:
            full = self._conditional(x, timestep, conditioning)
            with memory.skipping(*skipped, verify=False):  # the same call
                return full, self._network(x, timestep, conditioning)
