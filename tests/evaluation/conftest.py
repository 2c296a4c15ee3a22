from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flcompress.core.program import Fact, Program
from flcompress.diffusion.student import student_contract
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.start import read_source, starting_program
from flcompress.driver.store import Store
from flcompress.frontend.loading import load_recipe
from tests.fixtures.tiny import tiny_pipeline

RECIPE = """
version: 1
name: tiny
model: {model}
sampling: {{num_inference_steps: 3, max_sequence_length: 16}}
data: {data}
"""


def make_run(
    folder: Path, model: Path, *, data: str = "{moving-digits: {clips: 8}}", stages: bool = True
) -> RunDirectory:
    """A finished run as passes would leave it: two of four blocks cut, other weights, two steps."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(model=model, data=data), encoding="utf-8")
    recipe = load_recipe(path)
    run = RunDirectory(folder / "run")
    run.begin(recipe)
    store = Store(run.path / "passes")

    def compress(work: Path) -> Program:
        program = starting_program(recipe, read_source(recipe), work)
        if not stages:
            return program
        elastic = tiny_pipeline(folder / "elastic", layers=4, seed=1) / "transformer"
        student = tiny_pipeline(folder / "student", layers=2, seed=2) / "transformer"
        program = program.with_component("elastic", elastic).with_component("transformer", student)
        return replace(
            program,
            contract=student_contract(program.teacher_contract, 2),
            prune_set=("blocks.1", "blocks.2"),
            facts=program.facts | {Fact.FEW_STEP},
        )

    start = store.make(0, "model", "0" * 64, {}, lambda work: starting_program(recipe, read_source(recipe), work))
    last = store.make(1, "compress", "1" * 64, {}, compress)
    run.record_entries([start, last], finished=True)
    return run


@pytest.fixture(scope="session")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_run(tmp_path_factory.mktemp("evaluated"), model)
