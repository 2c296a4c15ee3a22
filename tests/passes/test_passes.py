"""The passes on a tiny stock pipeline, through the pass manager."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from PIL import Image

from flcompress.core.program import Fact, Program
from flcompress.driver.manager import apply
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import PreconditionError, TrainingError
from flcompress.ir.selection import choose, u_index
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.tracing.skip import skip
from flcompress.training.methods.skipped_loss import skipped_losses
from tests.fixtures.tiny import tiny_pipeline

pytestmark = pytest.mark.e2e

PASSES: list[dict[str, Any]] = [
    {"importance": {"draws": 8, "noise_levels": 2, "batch": 4}},
    {"stochastic-depth": {"remove": 0.2, "steps": 3, "batch": 2}},
    {"prune": {"remove": 0.2}},
    {"dmd": {"steps": 2, "batch": 2, "critic_updates": 2, "gan_weight": 0.01}},
]


def recipe(folder: Path, passes: list[dict[str, Any]], name: str = "tiny", **health: Any) -> Path:
    path = folder / f"{name}.yaml"
    content = {
        "version": 1,
        "model": {"path": "model"},
        "sampling": {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 16},
        "data": {"moving-digits": {"clips": 140}},
        "passes": passes,
        "training": {"health": {"every": 2, **health}, "log_to": []},
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


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


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
    draw = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(4, 16, 3, 8, 8, generator=draw), torch.randn(4, 16, 3, 8, 8, generator=draw)
    embeds, sigma = torch.randn(4, 16, 64, generator=draw), torch.tensor([0.1, 0.4, 0.6, 0.9])
    contract, given = program.teacher_contract, {"encoder_hidden_states": embeds}
    singles = [(block.path,) for block in program.graph.blocks]
    found = skipped_losses(model, program.graph, contract, singles, x0, given, noise, sigma)
    x = (1 - sigma.reshape(-1, 1, 1, 1, 1)) * x0 + sigma.reshape(-1, 1, 1, 1, 1) * noise

    def loss() -> torch.Tensor:
        with torch.no_grad():
            v = model(x, sigma * 1000, embeds, return_dict=False)[0]
        error = (noise - x0 - v) * sigma.reshape(-1, 1, 1, 1, 1)
        weighted: torch.Tensor = ((1 - sigma) / sigma**3) * error.double().square().mean(dim=(1, 2, 3, 4))
        return weighted

    full = loss()
    for (path,), lost in zip(singles, found, strict=True):
        with skip(model, [path]):
            torch.testing.assert_close(lost, loss() - full, atol=1e-5, rtol=1e-5)


def test_stochastic_depth_trains_and_logs_both_paths(run: RunDirectory) -> None:
    program, result, folder = at(run, "stochastic-depth")
    assert Fact.ELASTIC in program.facts
    assert [record["step"] for record in result["monitor"]] == [0, 2, 3]
    assert result["prune_set"] == list(program.prune_set)
    removed = sum(program.graph.block(path).parameters for path in program.prune_set)
    assert result["removed_share"] == pytest.approx(removed / program.graph.parameters)
    assert 0.2 <= result["removed_share"] < 1.0
    assert not (folder / "checkpoints").exists()


def test_the_cut_model_is_the_elastic_one_with_blocks_skipped(run: RunDirectory) -> None:
    program, result, _ = at(run, "prune")
    assert result["certificate"]["max_abs_difference"] == 0.0
    assert result["share"] <= 0.8
    assert all(reason.endswith(" from the least important") for reason in result["reasons"].values())
    elastic = load_transformer(program.components["elastic"])
    small = load_transformer(program.components["transformer"])
    for value in (*elastic.parameters(), *small.parameters()):
        value.data = value.data.clone()  # kernels round by where a weight lies, and in a mapped file it lies anywhere
    inputs = example_inputs(elastic, batch=2)
    with torch.no_grad(), skip(elastic, program.prune_set):
        expected = elastic(**inputs, return_dict=False)[0]
    with torch.no_grad():
        assert torch.equal(small(**inputs, return_dict=False)[0], expected)
    assert set(program.kept) == {block.path for block in program.graph.blocks}
    assert not set(program.kept.values()) & set(program.prune_set)


def test_only_blocks_that_stage_two_trained_to_be_skipped_are_cut(folder: Path, run: RunDirectory) -> None:
    """Even where others matter less: the first and the last block are trained here."""
    scored = at(run, "importance")[0].graph
    least = choose(scored, 0.2, "importance")
    passes = [
        PASSES[0],
        {"stochastic-depth": {**PASSES[1]["stochastic-depth"], "remove": 0.4, "by": "random"}},
        PASSES[2],
    ]
    cut = apply(recipe(folder, passes, "among"), folder / "among", overrides=["seed=1"], store=folder / "run")
    trained, removed = (
        set(at(cut, name)[1][key]) for name, key in (("stochastic-depth", "prune_set"), ("prune", "removed"))
    )
    assert removed < trained
    assert removed != set(least)


def test_a_pretraining_becomes_the_model_that_later_passes_start_from(folder: Path, run: RunDirectory) -> None:
    done = apply(recipe(folder, [{"pretrain": {"steps": 2, "batch": 2}}], "pretrained"), folder / "pretrained")
    program, result, place = at(done, "pretrain")
    assert result == {"steps": 2}
    assert {program.components[name] for name in ("transformer", "original", "elastic")} == {place / "transformer"}
    before, after = (load_transformer(f / "transformer").state_dict() for f in (folder / "model", place))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_distillation_gives_a_few_step_contract_with_finite_weights(run: RunDirectory) -> None:
    program, result, folder = at(run, "dmd")
    assert program.facts == {Fact.TRAINED, Fact.SCORED, Fact.PRUNED, Fact.FEW_STEP}
    assert program.contract.evaluations == 4
    assert list(program.contract.sigmas) == result["sigmas"]
    model = load_transformer(program.components["transformer"])
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    logged = lines(folder / "metrics.jsonl")
    assert [record["step"] for record in logged] == [0, 1, 2, 2]
    steps = [record for record in logged if "generator_loss" in record]
    assert all(one["normaliser_min"] <= one["normaliser_mean"] <= one["normaliser_max"] for one in steps)
    looks = [record for record in logged if "sample_distance" in record]
    assert [one.keys() for one in looks] == 2 * [
        {"step", "sample_distance", "sample_deviation", "sample_saturation", "sample_motion", "critic_lag"}
    ]
    drawn = lines(folder / "drawn.jsonl")
    assert [line["step"] for line in drawn] == [None, 0, 2], "the teacher's, and those of every strip"
    assert all(line["flow"] > 0 and line["saturation"] > 0 and line["diversity"] > 0 for line in drawn)
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["step-00000000.png", "step-00000002.png", "teacher.png"]
    with Image.open(folder / "samples" / "teacher.png") as strip:
        assert strip.size == (6 * 34 - 2, 4 * 34 - 2)  # six frames of four clips of 32 x 32


@pytest.mark.parametrize("target", ["self", "ema"])
def test_the_other_targets_train(folder: Path, run: RunDirectory, target: str) -> None:
    passes = [PASSES[0], {"stochastic-depth": {**PASSES[1]["stochastic-depth"], "target": target, "alpha": 0.5}}]
    done = apply(recipe(folder, passes, f"target-{target}"), folder / target, store=folder / "run")
    assert at(done, "stochastic-depth")[1]["target"] == target


def test_no_forward_has_more_samples_than_a_micro_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is trained, what judges it, and what is looked at."""
    sizes: list[int] = []
    forward = WanTransformer3DModel.forward

    def counted(model: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(hidden_states))
        return forward(model, hidden_states, *args, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", counted)
    passes: list[dict[str, Any]] = [
        {"pretrain": {"steps": 1, "batch": 5}},
        {"stochastic-depth": {"remove": 0.2, "by": "middle", "steps": 1, "batch": 5}},
        {"prune": {"remove": 0.2, "by": "middle"}},
        {"dmd": {"steps": 1, "batch": 5, "critic_updates": 1}},
    ]
    apply(recipe(folder, passes, "parts", samples=8), folder / "parts", overrides=["training.micro_batch=2"])
    assert max(sizes) == 2


SELF_AND_HOT = {"stochastic-depth": {"remove": 0.2, "steps": 12, "batch": 4, "learning_rate": 0.05, "target": "self"}}


def test_agreeing_on_rubbish_is_warned_of_and_stopped(folder: Path, run: RunDirectory) -> None:
    passes = [PASSES[0], SELF_AND_HOT]
    with pytest.raises(TrainingError) as error:
        apply(recipe(folder, passes, "drift", max_worsening=None), folder / "drift", store=folder / "run")
    said = str(error.value)
    assert re.fullmatch(
        r"stochastic-depth: step \d+: drift [\d.]+ \([\d.]+ to [\d.]+ on 8 other draws\), expected at most 1 "
        r"\(training.health.max_drift\); lower learning_rate, or set target: frozen; see docs/health.md; stopped, the "
        r"last good checkpoint is kept", said
    )  # fmt: skip
    warned = apply(
        recipe(folder, passes, "drift", max_worsening=None, on_breach="warn"), folder / "drift", store=folder / "run"
    )
    (event,) = [event for event in warned.journal() if event.event == "health" and event.status == "warn"]
    step = int(said.split()[2].rstrip(":"))
    assert (event.name, event.more["figure"], event.more["step"], event.more["high"]) == (
        "stochastic-depth",
        "drift",
        step,
        1.0,
    )
    (breach,) = lines(at(warned, "stochastic-depth")[2] / "breaches.jsonl")
    assert (breach["action"], breach["value"]) == ("warn", event.more["value"])


UNLIMITED: dict[str, Any] = dict.fromkeys(("max_worsening", "max_critic_lag", "deviation", "motion", "max_saturation"))


def test_a_student_that_saturates_is_stopped(folder: Path, run: RunDirectory) -> None:
    hot = {"dmd": {"steps": 8, "batch": 4, "critic_updates": 1, "learning_rate": 0.02}}
    limits = {**UNLIMITED, "max_saturation": 0.1}
    with pytest.raises(
        TrainingError, match=r"dmd: step \d+: sample_saturation [\d.]+ \(.+ draws\), expected at most 0.1 "
    ):
        apply(recipe(folder, [*PASSES[:3], hot], "hot", **limits), folder / "hot", store=folder / "run")


def test_a_student_that_never_was_better_than_its_start_has_nowhere_to_go_back_to(
    folder: Path, run: RunDirectory
) -> None:
    hot = {"dmd": {"steps": 6, "batch": 4, "critic_updates": 1, "learning_rate": 0.03}}
    limits = {**UNLIMITED, "max_worsening": 0.5}
    with pytest.raises(TrainingError, match=r"dmd: step 2: sample_distance .*stopped: no evaluation was better"):
        apply(
            recipe(folder, [*PASSES[:3], hot], "lost", on_breach="rollback", **limits),
            folder / "lost",
            store=folder / "run",
        )


def test_without_samples_a_distillation_is_watched_by_its_steps_alone(folder: Path, run: RunDirectory) -> None:
    passes = [*PASSES[:3], {"dmd": {"steps": 2, "batch": 2, "critic_updates": 1}}]
    with pytest.raises(TrainingError, match=r"dmd: step 1: fake_score_grad_norm .* expected at most 1e-12"):
        apply(recipe(folder, passes, "blind", samples=0, max_grad_norm=1e-12), folder / "b", store=folder / "run")


def test_a_discriminator_that_wins_is_stopped(folder: Path, run: RunDirectory) -> None:
    passes = [*PASSES[:3], {"dmd": {"steps": 4, "batch": 2, "critic_updates": 1, "gan_weight": 0.01}}]
    with pytest.raises(TrainingError, match=r"dmd: step \d+: logit_gap .* \(training.health.max_logit_gap\)"):
        apply(recipe(folder, passes, "wins", samples=0, max_logit_gap=1e-9), folder / "wins", store=folder / "run")


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
