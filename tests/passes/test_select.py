"""The select pass through the pass manager, and what takes its set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flcompress.core.program import Fact
from flcompress.distributed.world import World
from flcompress.draws import generator
from flcompress.driver.clips import Clips
from flcompress.driver.manager import apply
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import PreconditionError, RecipeError
from flcompress.frontend.loading import load_recipe
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network
from flcompress.planning.plan import plan_recipe
from flcompress.progress import QuietDisplay
from flcompress.reporting.findings import blocks
from flcompress.reporting.html import render
from flcompress.reporting.reading import read_run
from flcompress.training.methods.joint_selection import JointLoss
from tests.fixtures.tiny import tiny_pipeline
from tests.training import processes

SELECT: dict[str, Any] = {"select": {"remove": 0.2, "draws": 16, "recover": 1, "recover_batch": 2, "candidates": 2}}
STAGES: list[dict[str, Any]] = [
    {"importance": {"draws": 8, "noise_levels": 2}},
    SELECT,
    {"stochastic-depth": {"remove": 0.2, "steps": 1, "batch": 2, "by": "joint"}},
    {"prune": {"remove": 0.2, "by": "joint"}},
]


def recipe(folder: Path, stages: list[dict[str, Any]], name: str = "select", **training: Any) -> Path:
    path = folder / f"{name}.yaml"
    content = {
        "version": 1,
        "model": {"path": "model"},
        "sampling": {"num_inference_steps": 4, "max_sequence_length": 16},
        "data": {"moving-digits": {"clips": 16}},
        "passes": stages,
        "training": {"log_to": [], **training},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    tiny_pipeline(folder / "model", layers=4)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> RunDirectory:
    return apply(recipe(folder, STAGES), folder / "run", display=QuietDisplay(), device="cpu")


def result_of(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(next(run.glob("passes/*-select-*/result.json")).read_text())
    return value


@pytest.mark.e2e
def test_the_chosen_set_is_trained_and_cut(run: RunDirectory) -> None:
    result = result_of(run.path)
    selected, depth, cut = (entry.program() for entry in run.entries()[1:])
    assert Fact.SELECTED in selected.facts
    (chosen,) = [row for row in result["candidates"] if row["name"] == result["chosen"]]
    assert selected.prune_set == depth.prune_set == cut.prune_set == tuple(chosen["paths"])
    assert result["share"] >= 0.2
    assert [row["mean"] for row in result["candidates"]] == sorted(row["mean"] for row in result["candidates"])
    judged = [row for row in result["candidates"] if row["recovered"] is not None]
    assert len(judged) == 2
    assert chosen["recovered"] == min(row["recovered"] for row in judged)


@pytest.mark.e2e
def test_the_joint_score_is_the_loss_that_the_cut_model_adds(run: RunDirectory, folder: Path) -> None:
    """J(S) against the losses of two stock models on the same draws: the whole one, and the one without the set."""
    file = recipe(folder, [STAGES[0], SELECT, {"prune": {"remove": 0.2, "by": "joint"}}], "cut")
    cut = apply(file, folder / "cut", store=run.path, display=QuietDisplay(), device="cpu").final()
    start = run.start()
    data = Clips(load_recipe(file), run.path / "data", QuietDisplay(), "cpu")(start)
    whole, small = (load_transformer(program.components["transformer"]) for program in (start, cut))
    score = JointLoss(whole, start.graph, start.teacher_contract, data, seed=3, batch=16, world=World())
    joint = score([cut.prune_set], 16, 16)[0]
    draw = generator(3, "select", 16)
    x0, conditioning = data.batch(16, draw)
    noise, level, process = (
        torch.randn(x0.shape, generator=draw),
        score.levels(16, 16)[0],
        start.teacher_contract.process,
    )
    weight = (1.0 - level) / level**3 * level * math.log(0.98 / 0.02) / 0.96

    @torch.no_grad()
    def loss(model: Any) -> torch.Tensor:
        x = process.add_noise(x0, noise, level)
        error = x0 - process.tweedie(x, as_network(model)(x, process.timestep(level), conditioning), level)
        return (weight * error.double().square().mean(dim=(1, 2, 3, 4))).double()

    expected = loss(small) - loss(whole)
    assert float(expected.abs().max()) > 0.0
    torch.testing.assert_close(joint, expected, rtol=1e-3, atol=1e-5 * float(loss(whole).max()))


@pytest.mark.e2e
def test_the_report_lists_the_candidates_and_how_sure_the_ranking_is(run: RunDirectory) -> None:
    record = read_run(run.path)
    found = blocks(record)
    assert found is not None
    assert found.selection is not None
    assert found.selection.chosen == result_of(run.path)["chosen"]
    page = render(record)
    assert "Held-out loss after recovery" in page
    for row in result_of(run.path)["candidates"]:
        assert f">{row['name']}<" in page


@pytest.mark.slow
def test_two_processes_choose_the_set_of_one(folder: Path, tmp_path: Path) -> None:
    alone = [{"select": {"remove": 0.2, "draws": 32, "batch": 8}}]
    one = apply(recipe(folder, alone, "one"), tmp_path / "one", display=QuietDisplay(), device="cpu")
    file = recipe(folder, alone, "two", engine="ddp")
    processes.run(["apply", file, "--run-dir", tmp_path / "two", "--quiet"], tmp_path / "out", processes=2)
    assert result_of(one.path) == result_of(tmp_path / "two")


def test_the_plan_counts_the_search_and_the_recovery(folder: Path) -> None:
    plans = [
        plan_recipe(
            load_recipe(recipe(folder, [{"select": {**SELECT["select"], "recover": recover}}], f"plan{recover}"))
        )
        for recover in (0, 10)
    ]
    without, trained = (plan.to_dict()["passes"][0] for plan in plans)
    assert trained["forwards"] - without["forwards"] == pytest.approx(4.0 * 10 * 2 * 2)


def test_a_joint_set_needs_a_select_pass_of_the_same_share(folder: Path) -> None:
    with pytest.raises(PreconditionError, match=r"needs the program to be selected.*put select before it"):
        load_recipe(recipe(folder, [{"prune": {"remove": 0.2, "by": "joint"}}], "bare"))
    with pytest.raises(RecipeError, match="expected at least 2 candidates"):
        load_recipe(recipe(folder, [{"select": {"remove": 0.2, "recover": 5, "candidates": 1}}], "single"))


@pytest.mark.e2e
def test_a_larger_share_than_selected_is_refused(folder: Path, run: RunDirectory) -> None:
    greedy = [*STAGES[:2], {"prune": {"remove": 0.6, "by": "joint"}}]
    with pytest.raises(PreconditionError, match=r"0\.6 of the parameters asked for; the selected set holds 0\.\d+"):
        apply(recipe(folder, greedy, "greedy"), folder / "greedy", store=run.path, display=QuietDisplay())
