"""Build a narrow model of the same class and depth, on which removals from a large model can be certified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flcompress.errors import FlcompressError, NotRemovable
from flcompress.models.configs import BUILD_ERRORS
from flcompress.models.inputs import example_inputs, small_config
from flcompress.tracing.config_keys import build, changed_config, list_lengths
from flcompress.tracing.running import runs

HEADS, WIDTH = 2, 128
"""Attention heads, and largest other width, of a stand-in if its class allows it."""

LARGEST = 300_000_000
"""Most parameters of a stand-in: certifying takes several copies."""

_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_CHANNELS = ("attention_head_dim", "head_dim")


def stand_in(model: nn.Module) -> tuple[nn.Module, dict[str, tuple[Any, Any]]]:
    """Build a model like `model` (meta), with random weights and as few channels as its class allows, on the CPU.

    Every list of modules keeps its length, and no two tensors are equal, so that values identify them.

    Returns:
        The stand-in, and the config changes {key: (before, after)}: widths alone.

    Raises:
        NotRemovable: the narrowest model is still too large.
    """
    config: Any = model.config
    lengths = list_lengths(model)
    changes = small_config(model)
    for step in _steps(config):
        tried = changes | step
        try:
            built = build(model, tried)
            fits = list_lengths(built) == lengths and _count(built) < _count(build(model, changes))
            if fits:
                with torch.no_grad():
                    next(runs(built.eval(), example_inputs(built)))()
        except (*BUILD_ERRORS, FlcompressError):
            continue
        if fits:
            changes = tried
    count = _count(build(model, changes))
    if count > LARGEST:
        raise NotRemovable(
            f"{type(model).__name__}: no narrow model of this class and depth can be built to certify removals on: the "
            f"narrowest has {count:,} parameters, expected at most {LARGEST:,}"
        )
    factory: Any = type(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        narrow: nn.Module = factory.from_config(changed_config(config, changes)).eval().requires_grad_(False)
        for parameter in narrow.parameters():
            # The scale of a linear layer's weight: outputs stay finite through any number of blocks.
            parameter.normal_(std=max(parameter[0].numel(), 1) ** -0.5 if parameter.dim() > 1 else 0.1)
    return narrow, {key: (config[key], value) for key, value in changes.items()}


def _steps(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the changes to try in turn: fewer heads (with the widths that follow from them), then each width."""
    steps: list[dict[str, Any]] = []
    heads = next((key for key in _HEADS if type(config.get(key)) is int), None)
    channels = next((config[key] for key in _CHANNELS if type(config.get(key)) is int), None)
    numbers = {key: value for key, value in config.items() if type(value) is int and not key.startswith("_")}
    if heads is not None and config[heads] > HEADS:
        count = config[heads]
        fewer = {key: HEADS for key, value in numbers.items() if value == count and "heads" in key}
        width = count * channels if channels else None
        follow = {key: value // count * HEADS for key, value in numbers.items() if value == width}
        steps += [fewer | follow, fewer]
    steps += [{key: WIDTH} for key, value in numbers.items() if value > 2 * WIDTH]
    return steps


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
