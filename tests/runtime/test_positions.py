"""Sizes given as tensors, and positions written anew for an export, are the stock forward's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flcompress.exporters.onnx_graph import cogvideox
from flcompress.models import example_inputs
from flcompress.runtime.inputs import Denoiser, constants_of, tensors_of
from flcompress.runtime.positions import GivenTables, with_positions
from tests.families.pipelines import EXPORTED


def built(name: str) -> Any:
    torch.manual_seed(0)
    return EXPORTED[name].build().transformer.requires_grad_(False)


@pytest.mark.parametrize(("name", "door"), [("ltx", "video_coords"), ("qwen-image", "image_rotary_emb.0")])
@pytest.mark.parametrize("shape", [(3, 4, 8), (2, 10, 6)])
def test_a_size_as_a_tensor_is_the_size_as_a_number(name: str, door: str, shape: tuple[int, int, int]) -> None:
    transformer = built(name)
    stock = example_inputs(transformer, batch=2, latent_shape=shape)
    expected = transformer(**stock, return_dict=False)[0]
    given = with_positions({**transformer.config, "_class_name": type(transformer).__name__}, stock)
    tensors, constants = tensors_of(given), constants_of(given)
    assert door in tensors
    assert constants == {}
    assert torch.equal(Denoiser(transformer, constants, torch.float32)(tensors), expected)


def test_other_families_are_given_as_they_are() -> None:
    given = {"hidden_states": torch.zeros(1), "height": 3}
    assert with_positions({"_class_name": "WanTransformer3DModel"}, given) == given


def test_tables_that_nobody_gave() -> None:
    with pytest.raises(RuntimeError, match="image_rotary_emb was not given"):
        GivenTables()()


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 6, 4), (5, 4, 8)])
def test_sine_positions_of_any_size(shape: tuple[int, int, int]) -> None:
    """The configuration's own size and others; the stock tables are made in fp64."""
    transformer = built("cogvideox-2b")
    stock = example_inputs(transformer, batch=2, latent_shape=shape)
    expected = transformer(**stock, return_dict=False)[0]
    patch = transformer.patch_embed
    table = patch._get_positional_embeddings(shape[1], shape[2], 4 * shape[0] - 3)
    for module in transformer.modules():
        cogvideox.free(module)
    made = patch._get_positional_embeddings(shape[1], shape[2], 4 * shape[0] - 3)
    assert made.dtype is torch.float32
    assert made.shape == table.shape
    assert (made - table).abs().max() < 1e-6
    assert (transformer(**stock, return_dict=False)[0] - expected).abs().max() < 1e-5


def test_learned_positions_stay() -> None:
    """The stock forward takes them at its configuration's size, and sines at another number of frames."""
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    patch = CogVideoXPatchEmbed(embed_dim=32, text_embed_dim=8, sample_width=4, sample_height=4, sample_frames=9)
    cogvideox.free(patch)
    assert (patch.sample_height, patch.sample_frames) == (4, 9)
