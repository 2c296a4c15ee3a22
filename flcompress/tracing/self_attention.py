"""Read or change what self-attention computes in chosen blocks, and F3-Pruning's mask form, which changes it.

Every family's queries and keys, after norms and rotary positions, meet in the call of torch's
`scaled_dot_product_attention`. A torch function mode takes that call while it is active inside a block's self-attention
alone: a replaced processor would have to repeat each class's way to its queries and keys, and a hook on the module sees
neither. A mode around the module, not around the block, leaves cross-attention out, whose text may happen to be as long
as the clip.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from flcompress.diffusion.network import Conditioning, Network
from flcompress.errors import PreconditionError, RequestError
from flcompress.ir.graph import BlockGraph
from flcompress.ir.selection import choose
from flcompress.models.families import family_of
from flcompress.models.network import as_network, stock_model, stock_name
from flcompress.tracing.skip import replaced_forwards

POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Parameters of scaled_dot_product_attention that a caller may give by place."""


class SelfAttention(TorchFunctionMode):
    """Takes every call of scaled_dot_product_attention inside the self-attention of blocks.

    Args:
        model: a stock transformer.
        latents: (frames, height, width) of the clips that it is given.

    Attributes:
        frames: latent frames of a clip, in tokens.
        per_frame: tokens of each.
    """

    def __init__(self, model: Any, latents: Sequence[int]) -> None:
        super().__init__()
        self._model, self._family = model, family_of(stock_name(model))
        frames, height, width = latents
        self.frames, rows, columns = self._family.token_grid(model.config, (frames, height, width))
        self.per_frame = rows * columns
        self._path, self._calls = "", 0

    def inside(self, paths: Iterable[str]) -> AbstractContextManager[None]:
        """Return a context in which it is active during forwards of the blocks at `paths`.

        Raises:
            RequestError: a block lacks the module that its family names; in the forward, an attention that does not
                run through torch's scaled_dot_product_attention.
        """
        forwards: dict[str, Callable[..., Any]] = {}
        for path in paths:
            name = f"{path}.{self._family.self_attention}"
            try:
                module = self._model.get_submodule(name)
            except AttributeError as error:
                raise RequestError(
                    f"{stock_name(self._model)} has no module '{name}'; its family's self_attention names the module "
                    "in which the clip's tokens attend to one another"
                ) from error
            forwards[name] = self._active(path, module.forward)
        return replaced_forwards(self._model, forwards)

    def _active(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._path, self._calls = path, 0
            with self:
                output = forward(*args, **kwargs)
            if not self._calls:
                raise RequestError(
                    f"the attention of '{path}' does not run through torch's scaled_dot_product_attention; unset "
                    "DIFFUSERS_ATTN_BACKEND"
                )
            return output

        return run

    @override
    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self._calls += 1
        return self.attend(**dict(zip(POSITIONAL, args, strict=False)), **(kwargs or {}))

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Return what takes the place of the attention [n, heads, tokens, channels], of `_path`'s block."""

    def _clip(self, tokens: int) -> slice:
        """Return where the clip's tokens are among all; the text's, if there are any, come before or after."""
        clip = self.frames * self.per_frame
        first = tokens - clip if self._family.text_first else 0
        return slice(first, first + clip)


class FrameLocal(SelfAttention):
    """Attention of each clip token to its own latent frame and the text alone (after F3-Pruning, Su et al., AAAI 2024).

    Tokens of the text attend to everything. It is computed frame by frame, each over its own keys: what a mask over all
    tokens would give, without its memory (tokens squared) and with a kernel that takes none.
    """

    @override
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        if self.frames == 1:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)
        tokens, clip = key.shape[2], self._clip(key.shape[2])
        text = slice(0, clip.start) if self._family.text_first else slice(clip.stop, tokens)

        def attention(rows: slice, *columns: slice) -> torch.Tensor:
            keys, values = (torch.cat([part[:, :, own] for own in columns], dim=2) for part in (key, value))
            mask = attn_mask
            if mask is not None:
                mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
                mask = torch.cat([mask[..., own] for own in columns], dim=-1)
            return F.scaled_dot_product_attention(query[:, :, rows], keys, values, attn_mask=mask, **options)

        starts = range(clip.start, clip.stop, self.per_frame)
        outputs = [attention(own, own, text) for own in (slice(start, start + self.per_frame) for start in starts)]
        if text.start < text.stop:
            outputs.insert(0 if self._family.text_first else len(outputs), attention(text, slice(0, tokens)))
        return torch.cat(outputs, dim=2)


def frame_local_network(transformer: Any, paths: Iterable[str], guidance: float | None = None) -> Network:
    """Return the transformer as a network in which the blocks at `paths` attend within latent frames.

    Args:
        transformer: a stock model.
        paths: paths of blocks that see the clip.
        guidance: embedded guidance scale, for networks that take one.
    """
    network, blocks, model = as_network(transformer, guidance), tuple(paths), stock_model(transformer)

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        with FrameLocal(model, x.shape[2:]).inside(blocks):
            return network(x, timestep, conditioning)

    return call


def frame_local_blocks(graph: BlockGraph, share: float, run: object) -> tuple[str, ...]:
    """Return the blocks of the least attention on other latent frames, in execution order, for `--frame-local`.

    Args:
        graph: a run's, of the transformer that is sampled.
        share: share of the model's parameters that they hold at least, as `prune` counts `remove`.
        run: the run, for messages.

    Raises:
        RequestError: a share that is not between 0 and 1, or that the scored blocks do not hold; no scores.
    """
    given = f"--frame-local: {share:g} given"
    if not 0.0 < share < 1.0:
        raise RequestError(f"{given}, expected a share of the parameters between 0 and 1, such as 0.3")
    if all(block.temporal_attention is None for block in graph.blocks):
        raise RequestError(
            f"{given}, but {run} has not measured which blocks attend least to other frames; put the "
            "temporal-attention pass into its recipe"
        )
    try:
        return choose(graph, share, "temporal-attention")
    except PreconditionError as error:
        raise RequestError(
            f"{given}, but the measured blocks of {run} do not hold as much of the parameters with one to spare; give "
            "less"
        ) from error
