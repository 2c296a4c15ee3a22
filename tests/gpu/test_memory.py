"""Memory that a real GPU's tensors take, at the width and size of real models, against the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from flcompress.core.steps import Pass
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer, transformer_class
from flcompress.models.tensor_memory import free_gpu_memory
from flcompress.passes.dmd import DistributionMatching
from flcompress.passes.stochastic_depth import StochasticDepth
from flcompress.planning.activations import saved_activations
from tests.planning.real_size import RealSize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHALLOW = {
    "wan2.1-t2v-14b": {"num_layers": 2},
    "hunyuanvideo": {"num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1},
    "cogvideox-5b": {"num_layers": 2},
}
"""Shipped recipes, and how many blocks are there; all else is as they have it, their size too."""
SHORTER = {"hunyuanvideo": ("sampling.num_frames=61",)}
"""An update at 129 frames takes a minute."""


def most_allocated(work: Callable[[], Any]) -> int:
    """Return the bytes that a call takes at most, over what is allocated before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", SHALLOW)
def test_a_frozen_forward_takes_the_planned_memory(name: str, tmp_path: Path) -> None:
    source = RealSize.of(name, tmp_path, SHALLOW[name]).source
    tokens, shape = source.contract.max_sequence_length, source.latents[1:]
    planned = saved_activations(source.transformer, source.graph, tokens, shape, "bf16", gpu=True).inference.of(1)
    stock = transformer_class(source.transformer)
    stock.from_config(stock.load_config(source.transformer)).save_pretrained(source.transformer)
    model = load_transformer(source.transformer, "cuda", torch.bfloat16)
    inputs = tree_map(
        lambda value: value.to("cuda", torch.bfloat16 if value.ndim > 2 else None),
        example_inputs(model, latent_shape=shape, tokens=tokens),
    )
    with torch.no_grad():
        model(**inputs)  # cuBLAS and cuDNN take their workspaces
        taken = most_allocated(lambda: model(**inputs))
    print(f"{name}, a frozen forward: {taken / 1e9:.2f} GB, planned {planned / 1e9:.2f}")
    assert taken == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("kind", [StochasticDepth, DistributionMatching])
@pytest.mark.parametrize("name", SHALLOW)
def test_an_update_takes_the_planned_memory(name: str, kind: type[Pass], tmp_path: Path) -> None:
    """All that is on the card, of every role; gradient checkpointing and bf16, as the recipes have them."""
    free_gpu_memory()
    model = RealSize.of(name, tmp_path, SHALLOW[name], *SHORTER.get(name, ()))
    removed = [model.source.graph.blocks[1].path] if kind is DistributionMatching else []
    before = torch.cuda.memory_allocated()
    taken, planned = model.measured(kind, removed) - before, model.planned(kind, removed)
    print(f"{name}, {kind.name}: {taken / 1e9:.2f} GB, planned {planned / 1e9:.2f}")
    assert taken == pytest.approx(planned, rel=0.1)
