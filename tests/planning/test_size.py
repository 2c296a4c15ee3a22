from __future__ import annotations

import json
from pathlib import Path

import pytest

from flcompress.driver.data_checks import check_data
from flcompress.driver.start import model_index
from flcompress.errors import DataError
from flcompress.frontend.loading import load_recipe
from flcompress.planning.plan import data_latents, make_plan
from tests.data.datasets import write_dataset
from tests.fixtures.recipes import WriteRecipe
from tests.fixtures.video_files import write_video


def videos(folder: Path, *files: str) -> str:
    """A recipe's data with these files."""
    captions = folder / "captions.jsonl"
    captions.write_text("\n".join(json.dumps({"file": file, "caption": "a two"}) for file in files))
    return f"data: {{videos: {{folder: {folder}, captions: {captions}}}}}\n"


def test_no_data(write: WriteRecipe) -> None:
    assert data_latents(load_recipe(write("passes: [score]\n"))) is None


def test_moving_digits(write: WriteRecipe) -> None:
    assert data_latents(load_recipe(write("data: {moving-digits: {clips: 8}}\n"))) == (3, 8, 8)


def test_videos_are_measured_and_shrunk_as_the_autoencoder_does(write: WriteRecipe, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=17, height=64, width=64)
    (tmp_path / "broken.mp4").write_text("no video")
    path = write("passes: [score]\n" + videos(tmp_path, "broken.mp4", "a.mp4"))
    large = make_plan(load_recipe(path), flops_per_second=1e9)
    small = make_plan(load_recipe(write("passes: [score]\n")), flops_per_second=1e9)
    assert (large.latents, small.latents) == ((5, 16, 16), (3, 8, 8))
    assert large.flops > 6 * small.flops  # 6.7 times the tokens
    assert large.passes[0].memory.activations > 5 * small.passes[0].memory.activations


def test_videos_are_cut_to_what_the_model_takes(write: WriteRecipe, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=10, height=32, width=40)
    assert data_latents(load_recipe(write(videos(tmp_path, "a.mp4")))) == (3, 8, 10)


def test_the_largest_size_of_a_dataset_counts(write: WriteRecipe, tmp_path: Path) -> None:
    write_dataset(tmp_path / "encoded", {(5, 16, 24): 2, (17, 16, 16): 1, (9, 16, 16): 2})
    assert data_latents(load_recipe(write(f"data: {{latents: {tmp_path}/encoded}}\n"))) == (5, 4, 4)
    write_dataset(tmp_path / "prompts", {})
    assert data_latents(load_recipe(write(f"data: {{latents: {tmp_path}/prompts}}\n"))) is None


def test_a_sampled_size_that_the_model_does_not_take_is_told_before_encoding(
    write: WriteRecipe, tmp_path: Path
) -> None:
    write_video(tmp_path / "a.mp4", frames=10)
    path = write(videos(tmp_path, "a.mp4"))
    size = [f"sampling.{name}={value}" for name, value in (("num_frames", 9), ("height", 36), ("width", 32))]
    recipe = load_recipe(path, size)
    with pytest.raises(
        DataError, match="sampling: height: 36 given, expected a multiple of 8 for this model, such as 32 or 40"
    ):
        check_data(recipe, model_index(recipe))
