"""Whether a removal is exact, found out without the library's own certificate."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import flcompress
from tests.zoo.entry import Entry

OTHER_SEEDS = (1, 2)  # the certificate was made with the inputs of seed 0


def randomised(entry: Entry, seed: int = 7) -> Any:
    """The entry's model with random weights everywhere, so that no branch is silent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = entry.build()
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() < 2 else max(parameter[:1].numel(), 1) ** -0.5
            parameter.data = torch.randn(parameter.shape) * spread + (1.0 if parameter.dim() < 2 else 0.0)
    return model


def answer(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """What the model returns, evaluated without gradients."""
    model.eval()
    with torch.no_grad():
        output = model(**inputs)
    values = list(output.values()) if isinstance(output, dict) else output
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def reloaded(model: Any) -> Any:
    """What stock diffusers loads from the folder the model was saved to."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for parameter in loaded.parameters():
        # PyTorch's kernels round by where a weight lies in memory, and in a mapped file it lies anywhere.
        parameter.data = parameter.data.clone()
    return loaded


def largest_difference(entry: Entry, model: nn.Module, smaller: nn.Module, paths: Iterable[str]) -> float:
    """Between the saved and loaded smaller model and the skip, on inputs that the removal never saw."""
    loaded = reloaded(smaller)
    certificate: Any = smaller.flcompress_certificate
    worst = 0.0
    for seed in OTHER_SEEDS:
        optional = seed == OTHER_SEEDS[-1]
        with flcompress.skip(model, paths):
            expected = answer(model, entry.draw(seed, optional=optional))
        actual = answer(loaded, certificate.inputs_for(entry.draw(seed, optional=optional)))
        assert [tensor.shape for tensor in actual] == [tensor.shape for tensor in expected]
        assert all(tensor.isfinite().all() for tensor in expected)
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True)))
    return worst


def named_set(path: str, message: str) -> tuple[str, ...]:
    """The blocks that a refusal says would go together with `path`; empty where it names none."""
    if "ask for both" in message:
        return path, message.rpartition("together with '")[2].partition("'")[0]
    if "such as " in message:
        return tuple(re.findall(r"'([^']+)'", message.rpartition("such as ")[2]))
    return ()
