from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flcompress.data.latents import LatentDataset
from flcompress.errors import DataError
from flcompress.pipeline.plan import make_plan
from flcompress.pipeline.planned_size import latents
from flcompress.pipeline.recipe_loading import load_recipe
from tests.data.test_videos import captions, gif
from tests.pipeline.conftest import WriteRecipe


def test_no_data(write: WriteRecipe) -> None:
    assert latents(load_recipe(write("passes: [score]\n"))) is None


def test_moving_digits(write: WriteRecipe) -> None:
    assert latents(load_recipe(write("data: {moving-digits: {clips: 8}}\n"))) == (3, 8, 8)


def test_videos_are_measured_and_shrunk_as_the_autoencoder_does(write: WriteRecipe, tmp_path: Path) -> None:
    gif(tmp_path / "a.gif", frames=17, size=64)
    captions(tmp_path, "a.gif")
    path = write(f"passes: [score]\ndata: {{videos: {{folder: {tmp_path}, captions: {tmp_path}/captions.jsonl}}}}\n")
    large = make_plan(load_recipe(path), flops_per_second=1e9)
    small = make_plan(load_recipe(write("passes: [score]\n")), flops_per_second=1e9)
    assert (large.latents, small.latents) == ((5, 16, 16), (3, 8, 8))
    assert large.flops > 6 * small.flops  # 6.7 times the tokens
    assert large.passes[0].memory.activations > 5 * small.passes[0].memory.activations


def test_encoded_latents(write: WriteRecipe, tmp_path: Path) -> None:
    prompts, negative = ({"encoder_hidden_states": torch.zeros(1, 4, 8)} for _ in range(2))
    made = LatentDataset(torch.zeros(2, 16, 2, 4, 6), torch.zeros(2, dtype=torch.long), prompts, negative, ("a",))
    made.save(tmp_path / "encoded")
    assert latents(load_recipe(write(f"data: {{latents: {tmp_path}/encoded}}\n"))) == (2, 4, 6)


def test_a_size_that_the_autoencoder_cannot_code_is_told_before_encoding(write: WriteRecipe, tmp_path: Path) -> None:
    gif(tmp_path / "a.gif", frames=10)
    captions(tmp_path, "a.gif")
    path = write(f"data: {{videos: {{folder: {tmp_path}, captions: {tmp_path}/captions.jsonl}}}}\n")
    with pytest.raises(DataError) as caught:
        make_plan(load_recipe(path), flops_per_second=1e9)
    assert str(caught.value) == (
        f"{tmp_path}/a.gif: num_frames: 10 given, expected 1 plus a multiple of 4 for this autoencoder, such as 9"
    )
