"""Score blocks by how much their tokens attend to other latent frames (after F3-Pruning, Su et al., AAAI 2024).

The queries and keys are those that a block's own attention computes with, after its norms and rotary positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from typing_extensions import override

from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, to_device
from flcompress.distributed.world import World
from flcompress.ir.block import Estimate
from flcompress.ir.graph import BlockGraph
from flcompress.models.families import family_of
from flcompress.models.network import as_network, stock_name
from flcompress.progress import ProgressSink
from flcompress.tracing.boundaries import clip_blocks
from flcompress.tracing.self_attention import SelfAttention
from flcompress.training.methods.stratified_draws import StratifiedDraws

QUERIES = 64
"""Queries of each head whose attention is measured; all of a shorter clip's."""

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, kw_only=True)
class TemporalAttentionScores(StratifiedDraws):
    """The measurement of the `temporal-attention` pass; the attributes are the pass's arguments."""

    def score(
        self,
        model: Any,
        graph: BlockGraph,
        contract: SamplingContract,
        data: LatentDataset,
        seed: int,
        progress: ProgressSink,
        world: World,
    ) -> tuple[dict[str, Estimate], float]:
        """Return (A_l of every block that sees the clip, by path; its value where attention is uniform).

        A_l = E over (x0, e, s), heads and queries of the attention's mass on other latent frames, among the clip's
        tokens: text keys are left out. One forward a draw.
        """
        paths = clip_blocks(family_of(stock_name(model)), graph)
        network, process = as_network(model, contract.embedded_guidance), contract.process
        device = next(model.parameters()).device
        uniform = draws = 0.0

        @torch.no_grad()
        def masses(
            x0: torch.Tensor, conditioning: Conditioning, noise: torch.Tensor, level: torch.Tensor
        ) -> torch.Tensor:
            nonlocal uniform, draws
            x0, noise, level = (tensor.to(device) for tensor in (x0, noise, level))
            probe = AttentionProbe(model, x0.shape[2:])
            with probe.inside(paths):
                network(process.add_noise(x0, noise, level), process.timestep(level), to_device(conditioning, device))
            uniform, draws = uniform + len(x0) * (1.0 - 1.0 / probe.frames), draws + len(x0)
            return torch.stack([probe.mass(path) for path in paths])

        measured = self.measure(masses, len(paths), contract, data, seed, progress, world)
        means = world.all_mean({"uniform": uniform, "draws": draws})
        return {path: measured.estimate(column) for column, path in enumerate(paths)}, means["uniform"] / means["draws"]


class AttentionProbe(SelfAttention):
    """Measures the attention on other frames in every self-attention in which it is active."""

    def __init__(self, model: Any, latents: Sequence[int]) -> None:
        super().__init__(model, latents)
        self._masses: dict[str, list[torch.Tensor]] = {}

    @override
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        clip = self._clip(key.shape[2])
        mass = mass_on_other_frames(query[:, :, clip], key[:, :, clip], self.frames, options.get("scale"))
        self._masses.setdefault(self._path, []).append(mass)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

    def mass(self, path: str) -> torch.Tensor:
        """Return the mass [samples] of the forward in a block, in float64 on the CPU."""
        return torch.cat(self._masses[path]).double().cpu()  # some classes call it sample by sample


def mass_on_other_frames(
    query: torch.Tensor, key: torch.Tensor, frames: int, scale: float | None = None
) -> torch.Tensor:
    """Return the share of attention that goes to tokens of other frames, the mean over heads and queries.

    One query in each `QUERIES`-th of the tokens, at places that a golden-ratio sequence spreads over a frame; the
    softmax over all keys in fp32.

    Args:
        query: of a clip's tokens, frame by frame [n, heads, tokens, channels].
        key: theirs.
        frames: the tokens' frames.
        scale: factor on the products; 1 / sqrt(channels) where None.

    Returns:
        [n].
    """
    tokens = key.shape[2]
    count = min(QUERIES, tokens)
    spread = (_GOLDEN * torch.arange(count, dtype=torch.float64)) % 1.0 if count < tokens else torch.zeros(count)
    picks = ((torch.arange(count) + spread) * tokens / count).long().to(query.device)
    frame = torch.arange(tokens, device=query.device) // (tokens // frames)
    other = frame[picks, None] != frame
    masses = []
    # A clip after the other: together their scores would be as large as the model at real size.
    with torch.autocast(query.device.type, enabled=False):
        for own_query, own_key in zip(query, key, strict=True):
            scores = own_query[:, picks].float() @ own_key.float().transpose(1, 2)
            attention = (scores * (query.shape[3] ** -0.5 if scale is None else scale)).softmax(dim=2)
            masses.append((attention * other).sum(dim=2).mean())
    return torch.stack(masses)
