"""Attention without its mask, in forwards whose prompts have no padding.

Flash attention takes no masks, and the kernels that do are slower. What a mask hides has no part in any result, so
prompts of one length are cut to it, and then there is nothing to hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from flcompress.diffusion.network import PROMPT_MASK, Conditioning

PROMPT = "encoder_hidden_states"


class MaskSwitch:
    """Whether the attention of one transformer leaves out its mask; its attention processors read it.

    Attributes:
        absent: whether they do so now.
        kept: whether masks stay, whatever the prompts.
    """

    def __init__(self) -> None:
        # Plain attributes, not a thread's: on a GPU the backward, which may recompute blocks, runs in other threads.
        self.absent = False
        self.kept = False

    def cut(self, conditioning: Conditioning) -> tuple[Conditioning, bool]:
        """Return (conditioning, whether its forward needs no mask): prompts of one length are cut to that length.

        Lengths are read from a mask in host memory only: the host never waits for the device. A mask with a gap stays,
        and so does one without a token.
        """
        shown = conditioning[PROMPT_MASK]
        if self.kept or type(shown) is not torch.Tensor or not shown.is_cpu:  # other classes may have no values
            return conditioning, False
        length = int(shown[0].count_nonzero())
        if not length or not (shown[:, :length] == 1).all() or shown[:, length:].any():
            return conditioning, False
        prompt = conditioning[PROMPT][:, :length]
        return {**conditioning, PROMPT: prompt, PROMPT_MASK: prompt.new_ones(prompt.shape[:2])}, True

    @contextmanager
    def without_mask(self, *, absent: bool) -> Iterator[None]:
        """While active, attention leaves out its mask, or does not."""
        before, self.absent = self.absent, absent
        try:
            yield
        finally:
            self.absent = before

    def recomputing(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Return a checkpointing function whose backward recomputes a block as its forward was, masked or not.

        Args:
            checkpoint: (block, its arguments) -> its outputs.
        """

        def alike(block: Any, *args: Any) -> Any:
            return checkpoint(partial(self._run, block, self.absent), *args)

        return alike

    def _run(self, block: Any, absent: bool, *args: Any) -> Any:
        with self.without_mask(absent=absent):
            return block(*args)
