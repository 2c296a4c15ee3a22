"""Frozen transformers compute in the half precision that holds their weights, as stock pipelines run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from flcompress.models.families import family_of
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network, choose_attention, half_precision
from tests.families.pipelines import TINY
from tests.fixtures.rounding import relative, rounding

pytestmark = pytest.mark.e2e

SHAPE = (2, 4, 4)


@contextmanager
def attention_dtypes() -> Iterator[set[torch.dtype]]:
    """Collect the dtypes of queries, keys and values that are given to attention."""
    stock, seen = torch.nn.functional.scaled_dot_product_attention, set[torch.dtype]()

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update((query.dtype, key.dtype, value.dtype))
        return stock(query, key, value, *args, **kwargs)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield seen


def predictions(folder: Path, dtype: torch.dtype | None) -> tuple[torch.Tensor, set[torch.dtype]]:
    """Return the transformer's prediction inside autocast, and the dtypes that its attention was given."""
    model = load_transformer(folder / "transformer", dtype=dtype)
    network, family, draw = as_network(model), family_of(type(model).__name__), torch.Generator().manual_seed(0)
    shape = family.fixed_latents(model.config) or ((1, 4, 4) if TINY[folder.name].size[0] == 1 else SHAPE)
    conditioning = family.example_conditioning(model.config, 2, shape, 16, draw)
    x = torch.randn(2, family.channels(model.config), *shape, generator=draw)
    with torch.no_grad(), half_precision("cpu", enabled=dtype is not None), attention_dtypes() as seen:
        prediction = network(x, torch.tensor([300.0, 700.0]), conditioning)
    assert prediction.dtype == torch.float32
    return prediction, seen


@pytest.mark.parametrize("name", TINY)
def test_a_half_precision_network_computes_without_autocast(pipeline_folder: Callable[[str], Path], name: str) -> None:
    exact, _ = predictions(pipeline_folder(name), None)
    half, seen = predictions(pipeline_folder(name), torch.bfloat16)
    assert seen == {torch.bfloat16}
    assert 0 < (half - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_the_kernel_of_attention_is_chosen_for_one_model(pipeline_folder: Callable[[str], Path], name: str) -> None:
    """By diffusers' own switch, which would choose it for every other model as well."""
    model = load_transformer(pipeline_folder(name) / "transformer")
    inputs = example_inputs(model)
    with torch.no_grad():
        usual = model(**inputs, return_dict=False)[0]
        choose_attention(model, "math")
        chosen = model(**inputs, return_dict=False)[0]
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    kernels = {processor._attention_backend for processor in processors if hasattr(processor, "_attention_backend")}
    assert kernels == {AttentionBackendName._NATIVE_MATH}
    assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE
    assert relative(chosen, usual) < rounding(10_000)
