"""`flcompress bench` of every family: its own size, its conditioning, both experts of a pair, its exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.core.program import Program
from flcompress.diffusion.student import student_contract
from flcompress.driver.manager import export
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.start import read_source, starting_program
from flcompress.driver.store import Store
from flcompress.errors import RequestError, UnavailableError
from flcompress.evaluation.bench import bench
from flcompress.frontend.loading import load_recipe
from flcompress.models.families import family_of
from flcompress.progress import QuietDisplay
from flcompress.runtime import onnx_providers
from flcompress.runtime.torch_session import TorchSession
from tests.families.exports import RECIPE
from tests.families.pipelines import EXPERTS, EXPORTED

pytestmark = pytest.mark.e2e

FEW = 2
"""Steps of the students below."""


def make_run(model: Path, name: str, folder: Path, *overrides: str) -> RunDirectory:
    """A finished run of a family's tiny pipeline: the same transformer, sampled in few steps."""
    tiny = (EXPORTED | EXPERTS)[name]
    tokens = 512 if name == "wan-i2v" else 16
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, guidance=tiny.guidance, tokens=tokens, size=tiny.size))
    recipe = load_recipe(path, overrides)
    run = RunDirectory(folder / "run")
    run.begin(recipe)

    def distilled(work: Path) -> Program:
        program = starting_program(recipe, read_source(recipe), work)
        return replace(program, contract=student_contract(program.teacher_contract, FEW, program.family.sigmas))

    store = Store(run.path / "passes")
    start = store.make(0, "model", "0" * 64, {}, lambda work: starting_program(recipe, read_source(recipe), work))
    run.record_entries([start, store.make(1, "few", "1" * 64, {}, distilled)], finished=True)
    return run


@pytest.mark.parametrize("name", EXPORTED)
def test_every_family_is_timed_at_its_own_size(
    pipeline_folder: Callable[[str], Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(pipeline_folder(name), name, tmp_path)
    program, shapes, given = run.final(), set[tuple[int, ...]](), set[str]()

    def spied(self: TorchSession, x: torch.Tensor, timestep: torch.Tensor, conditioning: Any) -> torch.Tensor:
        shapes.add(tuple(x.shape))
        given.update(conditioning)
        return call(self, x, timestep, conditioning)

    call = TorchSession.__call__
    monkeypatch.setattr(TorchSession, "__call__", spied)
    results = bench(run, 1, backends=["torch"])
    assert shapes == {(1, *program.latents)}
    assert tuple(results["size"].values()) == EXPORTED[name].size
    assert results["family"] == family_of(program.pipeline_class).name
    assert results["teacher"]["evaluations"] == program.teacher_contract.evaluations
    assert results["student"]["evaluations"] == program.contract.evaluations == FEW
    if program.pipeline_class in program.family.from_image:
        assert given - set(program.family.prompt_names), "no first frame"


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("name", EXPERTS)
def test_both_experts_of_a_pair_are_timed(
    pipeline_folder: Callable[[str], Path], name: str, expert: str, tmp_path: Path
) -> None:
    run = make_run(pipeline_folder(name), name, tmp_path, f"model.expert={expert}", "sampling.guidance_scale_2=2.0")
    results, program = bench(run, 1, backends=["torch"]), run.final()
    for side, contract in (("teacher", program.teacher_contract), ("student", program.contract)):
        counted = results[side]
        assert counted["evaluations"] == contract.evaluations
        assert counted["own_evaluations"] == contract.own_evaluations
        assert counted["partner"]["evaluations"] == contract.evaluations - contract.own_evaluations > 0
        assert counted["flops"] > counted["partner"]["flops"] > 0
    own, partner = results["student"]["parameters"], results["student"]["partner"]["parameters"]
    work = [
        results[side]["own_evaluations"] * own + results[side]["partner"]["evaluations"] * partner
        for side in ("teacher", "student")
    ]
    assert results["work_ratio"] == pytest.approx(work[0] / work[1])


def test_an_export_of_any_family_is_timed(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """LTX takes sizes as tensors in its graph and as numbers in torch."""
    run = make_run(pipeline_folder("ltx"), "ltx", tmp_path)
    export(run, ["onnx"], display=QuietDisplay())
    results = bench(run, 1, backends=["onnx"])
    assert [row["backend"] for row in results["rows"][2:]] == ["ONNX Runtime (teacher: torch eager)"] * 2
    assert results["rows"][2]["precision"] == "fp32"
    assert results["rows"][2]["teacher_seconds"] == results["rows"][0]["teacher_seconds"]
    manifest = run.exports / "onnx" / "manifest.json"
    stated = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**stated, "kept": {"transformer_blocks.0": "transformer_blocks.3"}}))
    with pytest.raises(RequestError, match=r"onnx: an export of an earlier student; make it again with: flcompress ex"):
        bench(run, 1, backends=["onnx"])


def test_no_onnx_runtime_is_a_stated_reason(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(pipeline_folder("wan"), "wan", tmp_path)
    program = run.final()
    manifest = {"contract": program.contract.to_dict(), "kept": dict(program.kept), "sha256": {}}
    (run.exports / "onnx").mkdir(parents=True)
    (run.exports / "onnx" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(onnx_providers, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"pip install 'flcompress\[onnxruntime\]'"):
        bench(run, 1, backends=["onnx"])
