"""One clip on several processes: each computes a part of its tokens, and attention exchanges tokens for heads.

Ulysses (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509), with parts of unequal lengths and with text that every
process has whole.

The backward of every operation here is its adjoint. So the forwards of all processes are one graph, whose loss is the
sum of their losses, and the mean of their gradients, which every engine takes, is the gradient of the mean loss. No
parameter needs a rule of its own, wherever it is used: before the split, after it, or behind the gather.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from flcompress.errors import RequestError

Attention = Callable[..., torch.Tensor]
"""`scaled_dot_product_attention`: (query, key, value [n, heads, tokens, channels], attn_mask=None, ...) -> output."""


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that compute one clip together.

    Attributes:
        rank: position of this process among them.
        size: how many they are.
        group: torch's.
    """

    rank: int
    size: int
    group: Any = None

    def parts(self, tokens: int) -> list[int]:
        """Return how many of a sequence's tokens each process has: equal numbers, or one more in the first ones.

        Raises:
            RequestError: fewer tokens than processes.
        """
        if tokens < self.size:
            raise RequestError(
                f"training.sequence_parallel: {self.size} given, but a clip has {tokens} tokens; expected at least one "
                "for each process"
            )
        least, more = divmod(tokens, self.size)
        return [least + (rank < more) for rank in range(self.size)]

    def split(self, whole: torch.Tensor, axis: int) -> torch.Tensor:
        """Return this process's part of a tensor that all have, along an axis."""
        parts = self.parts(whole.shape[axis])
        part = whole.narrow(axis, sum(parts[: self.rank]), parts[self.rank])
        return part.clone(memory_format=torch.contiguous_format)  # a view would keep the whole in memory

    def gather(self, part: torch.Tensor, axis: int, tokens: int) -> torch.Tensor:
        """Return the whole tensor, of a length along an axis, of which every process has its part."""
        parts, rows = self.parts(tokens), part.movedim(axis, 0)
        copies = rows.expand(self.size, *rows.shape).flatten(0, 1)
        return self._exchange(copies, [len(rows)] * self.size, parts).movedim(0, axis)

    def attend(
        self,
        attention: Attention,
        qkv: Sequence[torch.Tensor],
        tokens: int,
        *,
        text: int = 0,
        text_first: bool = False,
        mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Return what attention over the whole sequence gives for this process's tokens.

        Tokens of the clip are exchanged for heads, so that each process has all tokens of its share of the heads. Text
        is the same in every process, which takes its heads of it.

        Args:
            attention: computes the attention of a share of the heads.
            qkv: queries, keys and values [n, heads, this process's tokens and the text's, channels].
            tokens: tokens of the clip, over all processes.
            text: tokens of the text; 0 if it is not in this attention.
            text_first: whether the text comes before the clip.
            mask: which keys are attended to, [n or 1, 1, 1, tokens and text]; never hides a token of the clip.
            options: passed to `attention`.
        """
        n, heads, length, channels = qkv[0].shape
        own, parts, mine = heads // self.size, self.parts(tokens), length - text
        start = text if text_first else 0
        # [share of heads, tokens, q k v, n, heads, channels]: one exchange, whose result needs no reordering.
        sent = torch.stack([part.narrow(2, start, mine) for part in qkv]).view(3, n, self.size, own, mine, channels)
        sent = sent.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
        clip = self._exchange(sent, [mine] * self.size, parts).permute(1, 2, 3, 0, 4)
        rows: Sequence[torch.Tensor] = clip.unbind(0)
        if text:
            texts = (part.narrow(2, 0 if text_first else mine, text) for part in qkv)
            texts = (part.narrow(1, self.rank * own, own) for part in texts)
            rows = [torch.cat(pair, dim=2) for pair in zip(rows, texts, strict=True)]
        if mask is not None:
            mask = F.pad(mask.narrow(-1, 0 if text_first else mine, text), (tokens, 0), value=True)
        output = attention(*rows, attn_mask=mask, **options).permute(2, 0, 1, 3)
        # Back: to each process its tokens and, of the text, this process's heads.
        pieces = torch.split(output, [*parts, text])
        order = [[pieces[-1], piece] if text_first else [piece, pieces[-1]] for piece in pieces[:-1]]
        sent = torch.cat([piece for pair in order for piece in pair])
        received = self._exchange(sent, [part + text for part in parts], [length] * self.size)
        return received.view(self.size, length, n, own, channels).permute(2, 0, 3, 1, 4).flatten(1, 2)

    def _exchange(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Send each process its number of rows, in order, and return the rows that come from each."""
        result: torch.Tensor = _Exchange.apply(rows, list(sent), list(received), self.group)  # type: ignore[no-untyped-call]
        return result


class _Exchange(torch.autograd.Function):
    """All-to-all along the first axis; its adjoint sends everything back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        back = _Exchange.apply(gradient, ctx.received, ctx.sent, ctx.group)  # type: ignore[no-untyped-call]
        return back, None, None, None
