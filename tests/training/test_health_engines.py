"""Looks on split weights: a moving average that was looked at must leave nothing behind in the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flcompress.pipeline.display import QuietDisplay
from flcompress.pipeline.manager import apply
from tests.tiny import tiny_pipeline

RECIPE = """
version: 1
model: {model}
sampling: {{num_inference_steps: 3, max_sequence_length: 16}}
data: {{moving-digits: {{clips: 16}}}}
training: {{health: {{every: 1, on_breach: warn, samples: 2}}, log_to: []}}
passes:
  - dmd: {{steps: 3, critic_updates: 1, batch: 2, learning_rate: 1e-2, intra_cfg: [0, 0]}}
"""


def logged(run: Path) -> list[dict[str, float]]:
    (file,) = run.glob("passes/*-dmd-*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_looks_on_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """fully_shard keeps what lies outside the blocks gathered after a forward without backward, averaged as it was."""
    model = tiny_pipeline(tmp_path / "model", layers=2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model))
    apply(recipe, tmp_path / "one", display=QuietDisplay(), device="cpu")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flcompress", "apply",
               str(recipe), "--run-dir", str(tmp_path / "two"), "--set", "training.engine=fsdp2"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 7
    assert two[0] == pytest.approx(one[0], rel=1e-6, abs=1e-6)  # the same draws; later a hot rate makes rounding grow
    for line, other in zip(one, two, strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-5)
