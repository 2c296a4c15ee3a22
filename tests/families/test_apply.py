"""Every family through every stage, exported, loaded by the stock pipeline, and generating."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.data.build import encode_dataset
from flcompress.models.parts import open_parts
from flcompress.pipeline.display import QuietDisplay
from flcompress.pipeline.manager import apply
from flcompress.pipeline.program import Fact
from tests.families.pipelines import TINY

CAPTIONS = ("a three drifting up", "a two drifting left")
RECIPE = """
version: 1
model: {{path: {model}}}
sampling:
  {{num_inference_steps: 5, guidance_scale: {guidance}, max_sequence_length: 16, num_frames: {size[0]},
   height: {size[1]}, width: {size[2]}}}
data: {{latents: {data}}}
passes:
  - importance: {{draws: 8, noise_levels: 2, batch: 4}}
  - stochastic-depth: {{remove: 0.1, steps: 2, batch: 2, max_drift: 1e9}}
  - prune: {{remove: 0.1}}
  - dmd: {{inter_cfg: [{guidance}, {guidance}], steps: 1, critic_updates: 1, batch: 2}}
exports: [diffusers]
"""


def silent(done: int, total: int, values: object) -> None:
    pass


@pytest.mark.parametrize("name", TINY)
def test_a_family_goes_all_the_way(pipeline_folder: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    folder, tiny = pipeline_folder(name), TINY[name]
    draw = torch.Generator().manual_seed(0)
    clips = torch.rand(16, 3, *tiny.size, generator=draw) * 2.0 - 1.0
    parts = open_parts(folder)
    encode_dataset(clips, [n % 2 for n in range(16)], CAPTIONS, parts, 16, silent).save(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=folder, data=tmp_path / "data", size=tiny.size, guidance=tiny.guidance))
    run = apply(recipe, tmp_path / "run", display=QuietDisplay(), device="cpu")

    final = run.final()
    assert {Fact.PRUNED, Fact.FEW_STEP} <= final.facts
    assert 0 < len(final.graph.blocks) < tiny.blocks
    assert final.contract.embedded_guidance == tiny.embedded
    generated(run.path / "exports" / "diffusers", name, tmp_path)


def generated(folder: Path, name: str, tmp_path: Path) -> None:
    """The stock pipeline, called as the export says, gives a clip of the right size."""
    import diffusers
    from PIL import Image

    facts = json.loads((folder / "flcompress.json").read_text())
    pipeline = getattr(diffusers, facts["pipeline_class"]).from_pretrained(str(folder), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = TINY[name].size
    given: dict[str, Any] = {}
    if facts["pipeline_class"] in open_parts(folder).family.from_image:
        given["image"] = Image.new("RGB", (width, height), (90, 10, 200))
    made = pipeline(prompt="a three drifting up", **facts["call"], **given, output_type="pt", return_dict=False)[0]
    assert made.shape[-2:] == (height, width)
    assert made.numel() == frames * 3 * height * width
    assert bool(torch.isfinite(made).all())
