"""The passes on a tiny stock pipeline, through the pass manager."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flcompress.errors import PreconditionError, TrainingError
from flcompress.ir.selection import choose, u_index
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.passes.importance import Importance
from flcompress.pipeline.manager import apply
from flcompress.pipeline.program import Fact, Program
from flcompress.pipeline.rundir import RunDirectory
from flcompress.trace.skip import skip
from tests.tiny import tiny_pipeline

PASSES: list[dict[str, Any]] = [
    {"importance": {"draws": 8, "noise_levels": 2, "batch": 4}},
    {"stochastic-depth": {"remove": 0.2, "steps": 3, "batch": 2, "monitor_every": 2}},
    {"prune": {"remove": 0.2}},
    {"dmd": {"steps": 2, "batch": 2, "critic_updates": 2, "gan_weight": 0.01}},
]


def recipe(folder: Path, passes: list[dict[str, Any]], name: str = "tiny") -> Path:
    path = folder / f"{name}.yaml"
    content = {
        "version": 1,
        "model": {"path": "model"},
        "sampling": {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 16},
        "data": {"moving-digits": {"clips": 140}},
        "passes": passes,
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("passes")
    tiny_pipeline(folder / "model")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> RunDirectory:
    return apply(recipe(folder, PASSES), folder / "run")


def at(run: RunDirectory, name: str) -> tuple[Program, dict[str, Any], Path]:
    (entry,) = [entry for entry in run.entries() if entry.name == name]
    return entry.program(), json.loads((entry.folder / "result.json").read_text()), entry.folder


def test_every_block_gets_a_finite_score_with_its_error(run: RunDirectory) -> None:
    program, result, _ = at(run, "importance")
    assert Fact.SCORED in program.facts
    for block in program.graph.blocks:
        assert block.importance is not None
        assert block.importance.standard_error > 0
        assert len(block.importance.per_level) == 2
        levels = [level[2] for level in block.importance.per_level]
        assert sum(levels) / 2 == pytest.approx(block.importance.mean)
    assert result["u_index"] == pytest.approx(u_index([block["mean"] for block in result["blocks"]]))


def test_scores_equal_plain_skipping(folder: Path, run: RunDirectory) -> None:
    program, _, _ = at(run, "importance")
    model = load_transformer(folder / "model" / "transformer")
    step = Importance(draws=8, noise_levels=1, batch=8)
    draw = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(4, 16, 3, 8, 8, generator=draw), torch.randn(4, 16, 3, 8, 8, generator=draw)
    embeds, sigma = torch.randn(4, 16, 64, generator=draw), torch.tensor([0.1, 0.4, 0.6, 0.9])
    contract, given = program.teacher_contract, {"encoder_hidden_states": embeds}
    found = step._differences(model, program.graph, contract, x0, given, noise, sigma)
    x = (1 - sigma.reshape(-1, 1, 1, 1, 1)) * x0 + sigma.reshape(-1, 1, 1, 1, 1) * noise

    def loss() -> torch.Tensor:
        with torch.no_grad():
            v = model(x, sigma * 1000, embeds, return_dict=False)[0]
        error = (noise - x0 - v) * sigma.reshape(-1, 1, 1, 1, 1)
        weighted: torch.Tensor = ((1 - sigma) / sigma**3) * error.double().square().mean(dim=(1, 2, 3, 4))
        return weighted

    full = loss()
    for block in program.graph.blocks:
        with skip(model, [block.path]):
            torch.testing.assert_close(found[block.path], loss() - full, atol=1e-5, rtol=1e-5)


def test_stochastic_depth_trains_and_logs_both_paths(run: RunDirectory) -> None:
    program, result, folder = at(run, "stochastic-depth")
    assert Fact.ELASTIC in program.facts
    assert [record["step"] for record in result["monitor"]] == [0, 2, 3]
    assert result["prune_set"] == list(program.prune_set)
    assert not (folder / "checkpoints").exists()


def test_the_cut_model_is_the_elastic_one_with_blocks_skipped(run: RunDirectory) -> None:
    program, result, _ = at(run, "prune")
    assert result["certificate"]["max_abs_difference"] == 0.0
    assert result["share"] <= 0.8
    elastic = load_transformer(program.components["elastic"])
    small = load_transformer(program.components["transformer"])
    inputs = example_inputs(elastic, batch=2)
    with torch.no_grad(), skip(elastic, program.prune_set):
        expected = elastic(**inputs, return_dict=False)[0]
    with torch.no_grad():
        assert torch.equal(small(**inputs, return_dict=False)[0], expected)
    assert set(program.kept) == {block.path for block in program.graph.blocks}
    assert not set(program.kept.values()) & set(program.prune_set)


def test_distillation_gives_a_few_step_contract_with_finite_weights(run: RunDirectory) -> None:
    program, result, folder = at(run, "dmd")
    assert program.facts == {Fact.TRAINED, Fact.SCORED, Fact.PRUNED, Fact.FEW_STEP}
    assert program.contract.evaluations == 4
    assert list(program.contract.sigmas) == result["sigmas"]
    model = load_transformer(program.components["transformer"])
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged] == [1, 2]


@pytest.mark.parametrize("target", ["self", "ema"])
def test_the_other_targets_train(folder: Path, run: RunDirectory, target: str) -> None:
    passes = [PASSES[0], {"stochastic-depth": {**PASSES[1]["stochastic-depth"], "target": target, "alpha": 0.5}}]
    done = apply(recipe(folder, passes, f"target-{target}"), folder / target, store=folder / "run")
    assert at(done, "stochastic-depth")[1]["target"] == target


def test_a_full_path_that_drifts_is_stopped_by_the_monitor(folder: Path, run: RunDirectory) -> None:
    passes = [PASSES[0], {"stochastic-depth": {**PASSES[1]["stochastic-depth"], "steps": 40, "learning_rate": 0.5,
                                               "monitor_every": 5, "target": "self"}}]  # fmt: skip
    with pytest.raises(TrainingError, match=r"stopped by its monitor at step \d+: held-out ELBO loss of the full path"):
        apply(recipe(folder, passes, "drift"), folder / "drift", store=folder / "run")


def test_what_a_pass_needs_is_checked_before_any_work(folder: Path) -> None:
    with pytest.raises(PreconditionError, match="prune: needs the program to be scored"):
        apply(recipe(folder, [{"prune": {"remove": 0.2}}], "unscored"), folder / "unscored")
    assert not (folder / "unscored").exists()


@pytest.mark.parametrize("by", ["random", "middle"])
def test_choices_hold_the_share(run: RunDirectory, by: Any) -> None:
    graph = at(run, "importance")[0].graph
    chosen = choose(graph, 0.2, by, seed=3)
    assert sum(graph.block(path).parameters for path in chosen) >= 0.2 * graph.parameters
    assert chosen == choose(graph, 0.2, by, seed=3)


def test_more_than_the_blocks_hold_is_refused(run: RunDirectory) -> None:
    with pytest.raises(PreconditionError, match=r"remove: 0.99 of the parameters asked for; the blocks"):
        choose(at(run, "importance")[0].graph, 0.99, "importance")
