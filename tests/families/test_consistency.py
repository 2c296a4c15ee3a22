"""Consistency distillation of three families, pruned and whole; what is refused before any work."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flcompress.cli import main
from flcompress.core.program import Fact
from flcompress.driver.manager import apply
from flcompress.models.loading import load_transformer
from flcompress.progress import QuietDisplay
from tests.families.pipelines import TINY
from tests.families.test_apply import encoded, generated

pytestmark = pytest.mark.e2e

RECIPE = """
version: 1
model: {model}
sampling:
  {{num_inference_steps: 4, guidance_scale: {guidance}, max_sequence_length: 16, num_frames: {size[0]},
   height: {size[1]}, width: {size[2]}}}
data: {data}
training: {{health: {{on_breach: warn, samples: 2, every: 1}}, log_to: []}}
passes:
{passes}
exports: [diffusers]
"""
CUT = "  - prune: {remove: 0.1, by: middle}\n"


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("wan", CUT + "  - consistency: {steps: 2, batch: 2, guidance: 4.0}"),
        ("hunyuan-video", CUT + "  - consistency: {steps: 1, batch: 2, embedded_guidance: [4.0, 8.0]}"),
        ("cogvideox", "  - consistency: {steps: 1, batch: 2, skip: 2, student_steps: 2}"),
    ],
)
def test_a_family_becomes_a_student_that_its_stock_pipeline_samples(
    pipeline_folder: Callable[[str], Path], name: str, passes: str, tmp_path: Path
) -> None:
    tiny = TINY[name]
    data = f"{{latents: {encoded(pipeline_folder(name), tiny.size, tmp_path)}}}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(model=pipeline_folder(name), data=data, size=tiny.size, guidance=tiny.guidance, passes=passes)
    )
    started = time.monotonic()
    run = apply(recipe, tmp_path / "run", display=QuietDisplay(), device="cpu")
    took, final = time.monotonic() - started, run.final()
    assert 0.0 < json.loads((run.entries()[-1].folder / "result.json").read_text())["seconds"] < took
    assert Fact.FEW_STEP in final.facts
    assert final.contract.evaluations == (2 if name == "cogvideox" else 4)
    assert final.contract.embedded_guidance == tiny.embedded
    assert (len(final.graph.blocks) < len(run.start().graph.blocks)) == passes.startswith(CUT)
    weights = load_transformer(final.components["transformer"]).state_dict()
    assert all(bool(value.isfinite().all()) for value in weights.values())
    original = load_transformer(final.components["original"]).state_dict()
    assert any(not torch.equal(value, original[path]) for path, value in weights.items() if path in original)
    folder = run.entries()[-1].folder
    assert (folder / "samples" / "step-00000001.png").is_file()
    assert "sample_distance" in (folder / "metrics.jsonl").read_text()
    assert '"critic_lag"' not in (folder / "health.json").read_text()
    generated(run.path / "exports" / "diffusers", name)


@pytest.mark.parametrize(
    ("name", "more", "arguments", "message"),
    [
        ("wan", "", "embedded_guidance: [3, 7]", "consistency.embedded_guidance: [3, 7] given, but this transformer"),
        ("wan-a14b", ", expert: low", "batch: 2", "consistency: this model has two experts, expected one transformer"),
        ("cogvideox", "", "student_steps: 3", "consistency.student_steps: 3 given, expected a divisor of the"),
        ("wan", "", "skip: 51", "skip: 51 given, expected at most the 50 levels; lower it or raise levels"),
        ("wan", "", "guidance: -1", "passes[0].consistency.guidance: -1 given, expected a number of at least 0"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_and_nothing_is_written(
    pipeline_folder: Callable[[str], Path], name: str, more: str, arguments: str, message: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    model = f"{{path: {pipeline_folder(name)}{more}}}"
    passes = f"  - consistency: {{steps: 1, {arguments}}}"
    data = "{moving-digits: {clips: 16}}"
    recipe.write_text(RECIPE.format(model=model, data=data, size=(9, 32, 32), guidance=3.0, passes=passes))
    done = CliRunner().invoke(main, ["apply", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
