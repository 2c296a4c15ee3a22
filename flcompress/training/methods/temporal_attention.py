"""Score blocks by how much their tokens attend to other latent frames (after F3-Pruning, Su et al., AAAI 2024).

The queries and keys are those that a block's own attention computes with, after its norms and rotary positions. They
are read where every family hands them over, in the call of torch's `scaled_dot_product_attention`, by a torch function
mode that is active inside the block's self-attention alone: a replaced processor would have to repeat each class's way
to its queries and keys, and a hook on the module sees neither. A mode around the module, not around the block, leaves
cross-attention out, whose text may happen to be as long as the clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, to_device
from flcompress.distributed.world import World
from flcompress.errors import RequestError
from flcompress.ir.block import Estimate
from flcompress.ir.graph import BlockGraph
from flcompress.models.families import family_of
from flcompress.models.network import as_network, stock_name
from flcompress.progress import ProgressSink
from flcompress.tracing.boundaries import clip_blocks
from flcompress.tracing.skip import replaced_forwards
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
        family = family_of(stock_name(model))
        paths = clip_blocks(family, graph)
        network, process = as_network(model, contract.embedded_guidance), contract.process
        device = next(model.parameters()).device
        uniform = draws = 0.0

        @torch.no_grad()
        def masses(
            x0: torch.Tensor, conditioning: Conditioning, noise: torch.Tensor, level: torch.Tensor
        ) -> torch.Tensor:
            nonlocal uniform, draws
            x0, noise, level = (tensor.to(device) for tensor in (x0, noise, level))
            _, _, *size = x0.shape
            frames, rows, columns = family.token_grid(model.config, (size[0], size[1], size[2]))
            probe = AttentionProbe(frames, rows * columns, text_first=family.text_first)
            with probe.inside(model, {path: f"{path}.{family.self_attention}" for path in paths}):
                network(process.add_noise(x0, noise, level), process.timestep(level), to_device(conditioning, device))
            uniform, draws = uniform + len(x0) * (1.0 - 1.0 / frames), draws + len(x0)
            return torch.stack([probe.mass(path, len(x0)) for path in paths])

        measured = self.measure(masses, len(paths), contract, data, seed, progress, world)
        means = world.all_mean({"uniform": uniform, "draws": draws})
        return {path: measured.estimate(column) for column, path in enumerate(paths)}, means["uniform"] / means["draws"]


class AttentionProbe(TorchFunctionMode):
    """Measures the attention on other frames in every call of scaled_dot_product_attention while it is active.

    Args:
        frames: latent frames of the clip, in tokens.
        per_frame: tokens of each.
        text_first: whether the text's tokens, where the attention runs over them too, come before the clip's.
    """

    def __init__(self, frames: int, per_frame: int, *, text_first: bool) -> None:
        super().__init__()
        self._frames, self._tokens, self._text_first = frames, frames * per_frame, text_first
        self._path = ""
        self._masses: dict[str, list[torch.Tensor]] = {}

    def inside(self, model: Any, modules: dict[str, str]) -> Any:
        """Return a context in which it is active during the forwards of modules: block -> its attention's path."""
        forwards: dict[str, Callable[..., Any]] = {}
        for path, name in modules.items():
            try:
                module = model.get_submodule(name)
            except AttributeError as error:
                raise RequestError(
                    f"temporal-attention: {stock_name(model)} has no module '{name}'; its family's self_attention "
                    "names the module in which the clip's tokens attend to one another"
                ) from error
            forwards[name] = self._active(path, module.forward)
        return replaced_forwards(model, forwards)

    def _active(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def probed(*args: Any, **kwargs: Any) -> Any:
            self._path = path
            with self:
                return forward(*args, **kwargs)

        return probed

    @override
    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self._measure(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _measure(self, query: torch.Tensor, key: torch.Tensor, *_: Any, scale: float | None = None, **__: Any) -> None:
        first = key.shape[2] - self._tokens if self._text_first else 0
        clip = slice(first, first + self._tokens)
        mass = mass_on_other_frames(query[:, :, clip], key[:, :, clip], self._frames, scale)
        self._masses.setdefault(self._path, []).append(mass)

    def mass(self, path: str, samples: int) -> torch.Tensor:
        """Return the mass [samples] of the last forward in a block, in float64 on the CPU.

        Raises:
            RequestError: not every sample's attention was seen.
        """
        masses = self._masses.get(path, [])
        if sum(map(len, masses)) != samples:  # some classes call it sample by sample
            raise RequestError(
                f"temporal-attention: the attention of '{path}' does not run through torch's "
                "scaled_dot_product_attention; unset DIFFUSERS_ATTN_BACKEND"
            )
        return torch.cat(masses).double().cpu()


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
