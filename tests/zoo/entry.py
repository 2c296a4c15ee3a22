"""One line of the zoo: a stock transformer class, a tiny configuration, and the arguments of one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tiny model of one class; `blocks` is {list: depth} of the lists whose children are its blocks."""

    name: str
    module: str  # under diffusers.models.transformers
    model_class: str
    config: Mapping[str, Any]
    inputs: Callable[[], Inputs]
    blocks: Mapping[str, int]
    optional: Callable[[], Inputs] = field(default=dict)  # arguments that a forward may be given as well

    def build(self) -> nn.Module:
        """The model with random weights, in training mode as constructed."""
        module = import_module(f"diffusers.models.transformers.{self.module}")
        model: nn.Module = getattr(module, self.model_class)(**self.config)
        return model

    def draw(self, seed: int, *, optional: bool = False) -> Inputs:
        """Arguments from a seed, on the default device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {**self.inputs(), **(self.optional() if optional else {})}


def x(*shape: int) -> Tensor:
    """Normal random numbers."""
    return torch.randn(*shape)


def t(*values: float) -> Tensor:
    """Timesteps, or other numbers, in float32."""
    return torch.tensor(values)


def long(*values: int) -> Tensor:
    """Integers."""
    return torch.tensor(values)


def yes(*shape: int) -> Tensor:
    """A mask that keeps everything."""
    return torch.ones(*shape, dtype=torch.bool)


def keep(batch: int, tokens: int, real: int) -> Tensor:
    """A mask [batch, tokens] that keeps the first `real` tokens."""
    return (torch.arange(tokens) < real).expand(batch, tokens)


def ids(tokens: int, axes: int) -> Tensor:
    """Position ids [tokens, axes] that differ from token to token."""
    return torch.arange(tokens).unsqueeze(1).repeat(1, axes).float()
