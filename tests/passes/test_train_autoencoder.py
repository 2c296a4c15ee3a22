"""The pass that trains the embedded benchmark's autoencoder knows moving digits alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import flcompress
from flcompress.errors import RecipeError
from flcompress.frontend.loading import load_recipe
from flcompress.progress import QuietDisplay

pytestmark = pytest.mark.e2e

RECIPES = Path(__file__).parents[2] / "recipes"

RECIPE = """\
version: 1
model: {path: model, weights: random}
data: DATA
passes:
  - train-autoencoder: {steps: 1}
"""


def recipe(folder: Path, data: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(RECIPE.replace("DATA", data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("data", "kind"),
    [("{latents: encoded}", "latents"), ("{videos: {folder: clips, captions: captions.jsonl}}", "videos")],
)
def test_other_clips_are_refused_before_any_work(tmp_path: Path, data: str, kind: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(tmp_path, data))
    assert caught.value.exit_status == 2
    assert str(caught.value) == (
        f"{tmp_path}/x.yaml:5: passes[0].train-autoencoder: draws clips of its own from moving-digits, but the recipe "
        f"has data.{kind}, which it would not read; remove this pass, or set data: {{moving-digits: {{clips: 2048}}}}"
    )


def test_moving_digits_are_what_it_trains_on(tmp_path: Path) -> None:
    loaded = load_recipe(recipe(tmp_path, "{moving-digits: {clips: 4}}"))
    assert [step.name for step in loaded.passes] == ["train-autoencoder"]


def test_what_it_writes_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        f"version: 1\nmodel: {{path: {RECIPES / 'moving-digits/blank'}, weights: random}}\n"
        "sampling: {max_sequence_length: 16}\ndata: {moving-digits: {clips: 4}}\n"
        "passes:\n  - train-autoencoder: {steps: 1, batch: 1}\n",
        encoding="utf-8",
    )
    run = flcompress.apply(path, run_dir=tmp_path / "run", display=QuietDisplay())
    config = (run.final().components["vae"] / "config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in config
    assert str(RECIPES) not in config
