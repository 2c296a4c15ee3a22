"""What the commands do, called from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flcompress
from flcompress.progress import QuietDisplay

pytestmark = pytest.mark.e2e

QUIET = QuietDisplay()

RECIPE = """
version: 1
model: {model}
sampling: {{num_inference_steps: 2, max_sequence_length: 16}}
data: {{moving-digits: {{clips: 8}}}}
passes:
  - prune: {{remove: 0.2, by: middle}}
exports: [diffusers]
"""


@pytest.fixture(scope="module")
def recipe(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(model=model), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pruned(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pruned") / "run"
    flcompress.apply(recipe, folder, display=QUIET)
    return str(folder)


def test_plan(recipe: Path) -> None:
    plan = flcompress.plan(str(recipe), gpus=2, memory="80G").to_dict()
    assert [row["name"] for row in plan["passes"]] == ["prune"]
    assert flcompress.plan(flcompress.load_recipe(recipe), gpus=2, memory="80G").to_dict() == plan


def test_inspect(model: Path) -> None:
    assert len(flcompress.inspect(model).graph.blocks) == 4
    assert flcompress.inspect(str(model / "transformer"), frames=5).to_dict()["clip"]["frames"] == 5


def test_encode(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a one\na two\n", encoding="utf-8")
    given = (str(model), tmp_path / "prompts.txt", tmp_path / "out")
    assert flcompress.encode(*given, max_sequence_length=16, display=QUIET)["prompts"] == 2
    assert flcompress.encode(*given, max_sequence_length=16, display=QUIET)["made"] == 0


def test_export_and_generate(pruned: str, tmp_path: Path) -> None:
    assert flcompress.export(pruned, display=QUIET)["diffusers"]["status"] == "cached"
    written = flcompress.generate(pruned, "a three", out=tmp_path / "clip.png", display=QUIET)
    assert written == tmp_path / "clip.png"
    with Image.open(written) as picture:
        assert picture.width == 9 * picture.height


@pytest.mark.slow
def test_evaluate(pruned: str) -> None:
    results = flcompress.evaluate(pruned, clips_per_prompt=1, seeds=2, display=QUIET)
    assert json.loads((Path(pruned) / "eval" / "results.json").read_text(encoding="utf-8")) == results


def test_report(pruned: str) -> None:
    page = flcompress.report(pruned)
    assert page == Path(pruned) / "report.html"
    assert "tiny" in page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_bench(pruned: str) -> None:
    results = flcompress.bench(pruned, rounds=1, display=QUIET)
    assert json.loads((Path(pruned) / "bench" / "results.json").read_text(encoding="utf-8")) == results


def test_remap_lora(pruned: str, tmp_path: Path) -> None:
    key = "transformer.blocks.{}.attn1.to_q.lora_{}.weight"
    save_file(
        {
            key.format(block, side): torch.ones(shape)
            for block in (0, 3)
            for side, shape in (("A", (2, 32)), ("B", (32, 2)))
        },
        tmp_path / "teacher.safetensors",
    )
    done = flcompress.remap_lora(tmp_path / "teacher.safetensors", pruned, str(tmp_path / "student.safetensors"))
    assert done["keys"] == {"given": 4, "used": 4}
    assert set(load_file(tmp_path / "student.safetensors")) == {
        key.format(block, side) for block in (0, 1) for side in "AB"
    }


def test_a_run_is_given_as_it_was_returned(recipe: Path, pruned: str) -> None:
    run = flcompress.apply(recipe, pruned, display=QUIET)
    assert flcompress.export(run, display=QUIET)["diffusers"]["status"] == "cached"
