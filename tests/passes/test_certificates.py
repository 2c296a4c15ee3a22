"""Certificates compare bits, so they are computed on the CPU, whatever a training runs on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flcompress.core.program import Fact
from flcompress.core.steps import PassContext
from flcompress.driver.start import read_source, starting_program
from flcompress.frontend.loading import load_recipe
from flcompress.passes.prune import Prune
from flcompress.passes.stochastic_depth import StochasticDepth
from tests.fixtures.tiny import tiny_pipeline

pytestmark = pytest.mark.e2e


def test_a_gpu_takes_no_part_in_a_certificate(tmp_path: Path) -> None:
    """Here there is none, so that anything put there would fail."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"version: 1\nmodel: {tiny_pipeline(tmp_path / 'model')}\nsampling: {{max_sequence_length: 16}}\n")
    recipe = load_recipe(path)
    program = starting_program(recipe, read_source(recipe), tmp_path / "start")
    (tmp_path / "work").mkdir()
    work = PassContext(
        directory=tmp_path / "work",
        seed=0,
        data=lambda program: pytest.fail("no data"),
        progress=lambda *told: None,
        device="cuda",
    )
    _, chosen = StochasticDepth(remove=0.2, steps=1, by="middle")._choose(program, work)
    elastic = replace(program, prune_set=chosen, facts=program.facts | {Fact.ELASTIC})
    assert Prune(remove=0.2, by="middle")(elastic, work).prune_set == chosen
