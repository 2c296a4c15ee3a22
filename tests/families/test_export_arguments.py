"""Sizes given as tensors, and positions written anew for an export, are the stock forward's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flcompress.errors import RequestError
from flcompress.models.families import family_of
from flcompress.models.families.qwen_image import RotaryInputs
from flcompress.models.inputs import example_inputs
from flcompress.runtime.inputs import Denoiser, constants_of, tensors_of
from tests.families.pipelines import EXPORTED

pytestmark = pytest.mark.e2e


def built(name: str) -> Any:
    torch.manual_seed(0)
    return EXPORTED[name].build().transformer.requires_grad_(False)


@pytest.mark.parametrize(("name", "door"), [("ltx", "video_coords"), ("qwen-image", "image_rotary_emb.0")])
@pytest.mark.parametrize("shape", [(3, 4, 8), (2, 10, 6)])
def test_a_size_as_a_tensor_is_the_size_as_a_number(name: str, door: str, shape: tuple[int, int, int]) -> None:
    transformer = built(name)
    stock = example_inputs(transformer, batch=2, latent_shape=shape)
    expected = transformer(**stock, return_dict=False)[0]
    arguments = family_of(type(transformer).__name__).export_arguments(transformer.config, stock)
    tensors, constants = tensors_of(arguments), constants_of(arguments)
    assert door in tensors
    assert constants == {}
    for _ in range(2):  # a second denoiser of the same transformer is no second change
        assert torch.equal(Denoiser(transformer, constants, torch.float32)(tensors), expected)


def test_other_families_are_given_as_they_are() -> None:
    arguments = {"hidden_states": torch.zeros(1), "height": 3}
    assert family_of("WanTransformer3DModel").export_arguments({}, arguments) == arguments


def test_tables_that_nobody_gave() -> None:
    with pytest.raises(RuntimeError, match="image_rotary_emb was not given"):
        RotaryInputs()()


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 6, 4), (5, 4, 8)])
def test_sine_positions_of_any_size(shape: tuple[int, int, int]) -> None:
    """The configuration's own size and others; the stock tables are made in fp64."""
    transformer = built("cogvideox-2b")
    stock = example_inputs(transformer, batch=2, latent_shape=shape)
    expected = transformer(**stock, return_dict=False)[0]
    patch = transformer.patch_embed
    table = patch._get_positional_embeddings(shape[1], shape[2], 4 * shape[0] - 3)
    family_of(type(transformer).__name__).prepare_export(transformer)
    made = patch._get_positional_embeddings(shape[1], shape[2], 4 * shape[0] - 3)
    assert made.dtype is torch.float32
    assert made.shape == table.shape
    assert (made - table).abs().max() < 1e-6
    assert (transformer(**stock, return_dict=False)[0] - expected).abs().max() < 1e-5


def test_learned_positions_stay() -> None:
    """The stock forward takes them at its configuration's size, and sines at another number of frames."""
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    patch = CogVideoXPatchEmbed(embed_dim=32, text_embed_dim=8, sample_width=4, sample_height=4, sample_frames=9)
    family_of("CogVideoXTransformer3DModel").prepare_export(patch)
    assert (patch.sample_height, patch.sample_frames) == (4, 9)


def test_a_prompt_of_another_length_than_wan_cuts_off() -> None:
    check, config = family_of("WanTransformer3DModel").check_export, {"_class_name": "WanTransformer3DModel"}
    check(config, 226)
    check(config | {"added_kv_proj_dim": 1536}, 512)
    with pytest.raises(RequestError) as caught:
        check(config | {"added_kv_proj_dim": 1536}, 226)
    assert str(caught.value) == (
        "sampling.max_sequence_length: 226 given, but the stock WanTransformer3DModel with an image encoder takes the "
        "last 512 tokens for the prompt; set sampling.max_sequence_length: 512"
    )
