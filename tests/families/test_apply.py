"""Every family through every stage, exported, loaded by the stock pipeline, and generating."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flcompress.core.program import Fact
from flcompress.data.encoding import encode, folder_request
from flcompress.driver.data_checks import check_data
from flcompress.driver.manager import apply
from flcompress.driver.start import read_source
from flcompress.errors import DataError, RecipeError
from flcompress.frontend.loading import load_recipe
from flcompress.models.parts import open_parts
from flcompress.progress import QuietDisplay
from flcompress.runtime.generate import generate
from tests.families.pipelines import TINY
from tests.fixtures.video_files import write_video

pytestmark = pytest.mark.e2e

PROMPT, COLOUR = "a three drifting up", (90, 10, 200)
CAPTIONS = ("a three drifting up", "a two drifting left")
RECIPE = """
version: 1
model: {{path: {model}}}
sampling:
  {{num_inference_steps: 5, guidance_scale: {guidance}, max_sequence_length: 16, num_frames: {size[0]},
   height: {size[1]}, width: {size[2]}}}
data: {{latents: {data}}}
training: {{health: {{on_breach: warn, samples: 2}}, log_to: []}}
passes:
  - importance: {{draws: 8, noise_levels: 2, batch: 4}}
  - stochastic-depth: {{remove: 0.1, steps: 2, batch: 2}}
  - prune: {{remove: 0.1}}
  - dmd: {{inter_cfg: [{guidance}, {guidance}], steps: 1, critic_updates: 1, batch: 2}}
  - interpolate: {{start_share: 0.25}}
exports: [diffusers]
"""


def encoded(folder: Path, size: tuple[int, int, int], home: Path) -> Path:
    """A dataset of 16 clips."""
    frames, height, width = size
    for number in range(16):
        write_video(home / "videos" / f"{number}.mp4", frames=frames, height=height, width=width, seed=number)
    rows = [{"file": f"{number}.mp4", "caption": CAPTIONS[number % 2]} for number in range(16)]
    (home / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    request = folder_request(folder, home / "captions.jsonl", home / "data", home / "videos", max_sequence_length=16)
    made = encode(request, QuietDisplay())
    assert made["buckets"] == [{"frames": frames, "height": height, "width": width, "clips": 16}]
    return home / "data"


@pytest.mark.parametrize("name", TINY)
def test_a_family_goes_all_the_way(pipeline_folder: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    all_the_way(pipeline_folder(name), name, tmp_path)


def all_the_way(folder: Path, name: str, home: Path) -> None:
    """Encode clips, apply every stage, export, load by the stock pipeline, generate; AssertionError where it fails."""
    tiny, data = TINY[name], encoded(folder, TINY[name].size, home)
    recipe = home / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=folder, data=data, size=tiny.size, guidance=tiny.guidance))
    run = apply(recipe, home / "run", display=QuietDisplay(), device="cpu")

    final = run.final()
    assert {Fact.PRUNED, Fact.FEW_STEP} <= final.facts
    assert 0 < len(final.graph.blocks) < len(run.start().graph.blocks)
    assert final.contract.embedded_guidance == tiny.embedded
    made = generated(run.path / "exports" / "diffusers", name)
    if name in ("wan-i2v", "wan-ti2v", "hunyuan-video-i2v-concat"):  # the others' pipelines draw other noise
        picture = home / "first.png"
        Image.new("RGB", tiny.size[:0:-1], COLOUR).save(picture)
        theirs = (made[0].permute(2, 0, 3, 1).flatten(1, 2) * 255.0).round()
        strip = Image.open(generate(run.path, PROMPT, "torch", home / "strip.png", seed=0, image=picture))
        ours = np.array(strip.resize((theirs.shape[1], theirs.shape[0]), Image.Resampling.NEAREST))
        assert float((torch.from_numpy(ours).float() - theirs).abs().max()) <= 1.0


def generated(folder: Path, name: str) -> torch.Tensor:
    """What the stock pipeline, called as the export says, gives: a clip [1, frames, 3, height, width] in [0, 1]."""
    import diffusers

    facts = json.loads((folder / "flcompress.json").read_text())
    card = (folder / "README.md").read_text()
    assert f"from diffusers import {facts['pipeline_class']}\n" in card
    assert ("text-to-image" in card) == ("made.images[0]" in card) == ("num_frames" not in facts["call"])
    assert ("image-to-video" in card) == ("load_image" in card) == ("ImageToVideo" in facts["pipeline_class"])
    pipeline = getattr(diffusers, facts["pipeline_class"]).from_pretrained(str(folder), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = TINY[name].size
    given: dict[str, Any] = {}
    if facts["pipeline_class"] in open_parts(folder).family.from_image:
        given["image"] = Image.new("RGB", (width, height), COLOUR)
    torch.manual_seed(0)
    made = pipeline(prompt=PROMPT, **facts["call"], **given, output_type="pt", return_dict=False)[0]
    assert made.shape[-2:] == (height, width)
    if name == "hunyuan-video-i2v-concat":
        frames -= 4  # which its pipeline cuts off
    assert made.numel() == frames * 3 * height * width
    assert bool(torch.isfinite(made).all())
    return made  # type: ignore[no-any-return]


def test_a_recipe_may_name_another_pipeline_of_the_family(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Wan 2.2 TI2V-5B is published as a WanPipeline and starts from a first frame in the other one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nmodel: {{path: {pipeline_folder('wan')}, pipeline: WanImageToVideoPipeline}}\n")
    assert read_source(load_recipe(recipe)).index["_class_name"] == "WanImageToVideoPipeline"
    with pytest.raises(
        RecipeError,
        match=r"recipe\.yaml:2: model\.pipeline: FluxPipeline given, expected WanPipeline or WanImageToVideoPipeline",
    ):
        read_source(load_recipe(recipe, ["model.pipeline=FluxPipeline"]))


def test_embedded_guidance_is_refused_where_the_network_takes_none(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nmodel: {pipeline_folder('wan')}\nsampling: {{embedded_guidance: 6.0}}\n")
    with pytest.raises(RecipeError, match=r"sampling\.embedded_guidance: 6 given, but the Wan transformer takes no"):
        read_source(load_recipe(recipe))


def test_a_size_that_the_autoencoder_cannot_code_is_named(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    size = "{num_frames: 10, height: 32, width: 32}"
    recipe.write_text(f"version: 1\nmodel: {pipeline_folder('wan')}\nsampling: {size}\n")
    with pytest.raises(
        RecipeError,
        match=r"sampling\.num_frames: 10 given, expected 1 plus a multiple of 4 for this model, such as 9 or 13",
    ):
        read_source(load_recipe(recipe))


def test_a_dataset_is_made_for_one_pipeline_class(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Wan 2.2 TI2V-5B as WanImageToVideoPipeline needs first frames, which a dataset for WanPipeline lacks."""
    folder, prompts = pipeline_folder("wan"), tmp_path / "prompts.txt"
    prompts.write_text("a two\n")
    with pytest.raises(DataError, match=r"--pipeline-class FluxPipeline: expected WanPipeline or WanImageToVideoPipel"):
        folder_request(folder, prompts, tmp_path / "data", pipeline_class="FluxPipeline")
    request = folder_request(folder, prompts, tmp_path / "data", pipeline_class="WanImageToVideoPipeline")
    with pytest.raises(DataError, match=r"WanImageToVideoPipeline starts from a first frame, which prompts alone do"):
        encode(request, QuietDisplay())


def test_a_dataset_is_made_for_one_way_of_taking_a_first_frame(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """HunyuanVideo's two image models share every part that encodes, but not what they take of a picture."""
    folder = pipeline_folder("hunyuan-video-i2v-replace")
    data = encoded(folder, (5, 32, 32), tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "transformer" / "config.json").read_text()) | {"image_condition_type": "latent_concat"}
    (other / "transformer" / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nmodel: {other}\nsampling: {{max_sequence_length: 16}}\ndata: {{latents: {data}}}\n")
    loaded = load_recipe(recipe)
    with pytest.raises(DataError, match=r"encoded by another transformer's image condition than that of .*/other"):
        check_data(loaded, read_source(loaded).index)


def test_a_size_that_the_patches_do_not_divide_is_named(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Stock patch embeddings drop the row that is left over."""
    recipe = tmp_path / "recipe.yaml"
    size = "{num_frames: 9, height: 40, width: 32}"
    recipe.write_text(f"version: 1\nmodel: {pipeline_folder('wan')}\nsampling: {size}\n")
    with pytest.raises(
        RecipeError, match=r"sampling\.height: 40 given, expected a multiple of 16 for this model, such as 32 or 48"
    ):
        read_source(load_recipe(recipe))
