"""A transformer's forward on several processes together; the exchanges are in `flcompress.distributed.sequence`.

A forward takes whole latents and returns a whole prediction in each of them. In between each has its part of the clip's
tokens, and all of the text's: from the first module that makes tokens to the last one. Hooks of modules split and
gather, so skipped blocks, gradient checkpointing and the engines' own wrappers need no care.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from flcompress.distributed.sequence import SequenceGroup
from flcompress.errors import RequestError
from flcompress.ir.graph import BlockGraph
from flcompress.models.families import family_of
from flcompress.models.network import stock_name
from flcompress.tracing.boundaries import clip_blocks


def split_tokens(model: Any, graph: BlockGraph, group: SequenceGroup) -> None:
    """Let the processes of a group compute every forward of `model` together, in place.

    Args:
        model: a stock transformer.
        graph: its blocks.
        group: the processes, which call it with the same arguments.

    Raises:
        RequestError: the tokens of its class cannot be split; in the forward, fewer tokens than processes.
    """
    family = family_of(stock_name(model))
    axes = family.token_axes(model.config)
    if axes is None:
        raise RequestError(
            f"training.sequence_parallel: {group.size} given, but the tokens of {stock_name(model)} with this "
            "configuration cannot be split; set it to 1"
        )
    tokens = _Tokens(group)
    if axes.arguments:
        model.register_forward_pre_hook(partial(tokens.split_arguments, axes.arguments), with_kwargs=True)
    for path, axis in axes.outputs.items():
        model.get_submodule(path).register_forward_hook(partial(tokens.split_output, axis))
    if axes.grid is not None:
        model.get_submodule(axes.grid).register_forward_hook(tokens.split_grid)
    if axes.joined is not None:
        model.get_submodule(axes.joined).register_forward_hook(tokens.split_joined)
    model.get_submodule(axes.last).register_forward_hook(tokens.gather)
    for path in clip_blocks(family, graph):
        attention = model.get_submodule(f"{path}.{family.self_attention}")
        vars(attention)["forward"] = partial(tokens.attend, type(attention).forward, family.text_first, attention)


class _Tokens:
    """The tokens of the clip that a model computes.

    A backward that recomputes blocks follows its own forward: all clips of a step have one size.
    """

    def __init__(self, group: SequenceGroup) -> None:
        self._group = group
        self._count = 0

    def _split(self, whole: torch.Tensor, axis: int) -> torch.Tensor:
        if whole.ndim <= axis:
            return whole
        self._count = whole.shape[axis]
        return self._group.split(whole, axis)

    def split_arguments(self, axes: Mapping[str, int], model: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Split arguments of the model's forward: networks pass them by name."""
        split = {
            name: tree_map_only(torch.Tensor, partial(self._split, axis=axis), kwargs[name])
            for name, axis in axes.items()
            if name in kwargs
        }
        return args, {**kwargs, **split}

    def split_output(self, axis: int, module: Any, args: Any, output: Any) -> Any:
        """Split what a module returns."""
        return tree_map_only(torch.Tensor, partial(self._split, axis=axis), output)

    def split_grid(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Split [n, channels, frames, rows, columns]; what flattens it finds this process's tokens in one row."""
        return self._split(output.flatten(2), 2)[..., None, None]

    def split_joined(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Split the clip's part of [n, text and clip, channels]."""
        text = args[0].shape[1]
        return torch.cat([output[:, :text], self._split(output[:, text:], 1)], dim=1)

    def gather(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Gather the last tokens."""
        return self._group.gather(output, 1, self._count)

    def attend(
        self,
        forward: Callable[..., Any],
        text_first: bool,
        module: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute a self-attention, alone or joined with the text's, over the whole sequence."""
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        exchange = partial(self._group.attend, tokens=self._count, text=text, text_first=text_first)
        with _Attending(exchange):
            return forward(module, hidden_states, encoder_hidden_states, *args, **kwargs)


class _Attending(TorchFunctionMode):
    """While active, torch's attention is that over the whole sequence: every processor of diffusers ends in it."""

    def __init__(self, exchange: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._exchange = exchange

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._whole(*args, **(kwargs or {}))

    def _whole(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **options: Any
    ) -> torch.Tensor:
        kind, qkv = query.device.type, [query, key, value]
        if torch.is_autocast_enabled(kind):  # it rounds them for this operation: earlier, half as much is exchanged
            qkv = [part.to(torch.get_autocast_dtype(kind)) for part in qkv]
        return self._exchange(F.scaled_dot_product_attention, qkv, mask=attn_mask, **options)
