from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flcompress.driver.rundir import RunDirectory
from flcompress.evaluation.ablation import Variant, ablate
from flcompress.models.stock_files import folder_digest
from tests.fixtures.tiny import tiny_pipeline

pytestmark = pytest.mark.e2e


def test_variants_are_trained_evaluated_and_compared_with_the_base(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "model", layers=3)
    recipe = tmp_path / "base.yaml"
    content = {
        "version": 1,
        "model": {"path": "model"},
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": 16},
        "data": {"moving-digits": {"clips": 140}},
        "passes": [
            {"importance": {"draws": 8, "noise_levels": 2}},
            {"stochastic-depth": {"remove": 0.2, "steps": 1, "batch": 2}},
            {"prune": {"remove": 0.2}},
            {"dmd": {"steps": 1, "batch": 2, "critic_updates": 1, "student_steps": 2}},
        ],
        "evaluation": {"clips_per_prompt": 1, "seeds": 2},
    }
    recipe.write_text(yaml.safe_dump(content))
    variants = [
        Variant("base", "the recipe"),
        Variant("without", "no Stage II", without=("stochastic-depth",)),
        Variant("needless", "cannot run", without=("importance",)),
    ]
    results = ablate(recipe, tmp_path / "out", 2, variants)
    assert [variant["name"] for variant in results["variants"]] == ["base", "without"]
    assert results["variants"][0]["against_base"]["frechet"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    digests = set()
    for name in ("base-0", "base-1", "without-0", "without-1"):
        run = RunDirectory(tmp_path / "out/runs" / name)
        assert ("stochastic-depth" in [entry.name for entry in run.entries()]) == name.startswith("base")
        digests.add(folder_digest(run.final().components["transformer"]))
    assert len(digests) == 4
    assert "needs the program to be scored" in results["failed"]["needless"]
