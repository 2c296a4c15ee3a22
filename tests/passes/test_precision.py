"""Half precision and gradient checkpointing: what they may change, and what not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flcompress.driver.manager import apply
from flcompress.models.loading import load_transformer
from flcompress.progress import QuietDisplay
from flcompress.training.engines import replicated
from tests.fixtures.rounding import rounding
from tests.fixtures.tiny import tiny_pipeline
from tests.training.comparing import STEP, apart, smooth

pytestmark = pytest.mark.e2e

RECIPE = """
version: 1
model: {model}
sampling: {{max_sequence_length: 16}}
data: {{moving-digits: {{clips: 32}}}}
training: {{health: {{on_breach: warn, samples: 0}}, log_to: []}}
passes:
  - importance: {{draws: 8, noise_levels: 2}}
  - stochastic-depth: {{remove: 0.3, steps: 3, batch: 4, target: {target}}}
  - prune: {{remove: 0.3}}
  - dmd: {{steps: 2, critic_updates: 2, batch: 4}}
"""


def losses(home: Path, target: str, *overrides: str) -> list[dict[str, float]]:
    """Every logged line of both training passes."""
    home.mkdir()
    model = tiny_pipeline(home / "model", layers=4)
    recipe = home / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, target=target))
    run = apply(recipe, home / "run", overrides=overrides, display=QuietDisplay(), device="cpu")
    folders = [entry.folder for entry in run.entries() if (entry.folder / "metrics.jsonl").exists()]
    lines = [line for folder in folders for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("target", ["frozen", "self"])
def test_gradient_checkpointing_changes_no_loss(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks are skipped: the backward, which computes blocks again, must skip the same ones."""
    monkeypatch.setattr(replicated, "optimiser", smooth)
    plain = losses(tmp_path / "plain", target)
    again = losses(tmp_path / "again", target, "training.gradient_checkpointing=true")
    assert len(plain) == len(again) == 7
    assert apart(plain, again) < rounding((3 + 2 * 3) * STEP)  # the generator's two updates follow two of the critic's


def test_half_precision_stays_near(tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", "frozen")
    half = losses(tmp_path / "half", "frozen", "training.precision=bf16")
    assert plain != half
    for one, other in zip(plain, half, strict=True):
        for name in set(one) & {"elbo_full", "elbo_pruned", "fake_score_loss", "stochastic_depth_loss"}:
            if one[name] == 0.0:  # no block is skipped; the target's network, held in bf16, rounds without autocast
                assert other[name] < 0.01 * max(line.get(name, 0.0) for line in plain), name
            else:
                assert other[name] == pytest.approx(one[name], rel=0.05), name


def test_a_frozen_model_in_bf16_leaves_its_weights_file(tmp_path: Path) -> None:
    """Layers that stay in fp32 are views of the mapped file: they would hold all of it in memory."""
    folder = tiny_pipeline(tmp_path / "model") / "transformer"
    model = load_transformer(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16, torch.float32}
    assert str(folder) not in Path("/proc/self/maps").read_text()
