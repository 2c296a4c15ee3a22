"""Importance over processes and in half precision: the same scores, and memory as the plan has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flcompress.driver.manager import apply
from flcompress.driver.start import read_source
from flcompress.frontend.loading import load_recipe
from flcompress.ir.block import Estimate
from flcompress.models.families import family_of
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer, meta_transformer
from flcompress.models.network import half_precision
from flcompress.models.tensor_memory import Alive
from flcompress.passes.importance import Importance
from flcompress.passes.temporal_attention import TemporalAttention
from flcompress.planning.machines import gpu_machine
from flcompress.planning.plan import make_plan
from flcompress.planning.text import plan_text
from flcompress.progress import QuietDisplay
from flcompress.tracing import prefix
from tests.fixtures.tiny import tiny_pipeline
from tests.training import processes

pytestmark = pytest.mark.e2e

RECIPE = """
version: 1
model: {model}
sampling: {{max_sequence_length: 16}}
data: {{moving-digits: {{clips: 16}}}}
training: {{log_to: []{training}}}
passes:
  - importance: {{draws: 10, noise_levels: 2, batch: 2}}
"""
RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("importance") / "model")


def recipe(home: Path, model: Path, training: str = "") -> Path:
    path = home / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, training=training))
    return path


def test_two_processes_give_the_scores_of_one_to_the_last_bit(model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    apply(recipe(tmp_path, model), one, display=QuietDisplay(), device="cpu")
    file = recipe(tmp_path, model, ", engine: ddp")
    processes.run(["apply", file, "--run-dir", two, "--quiet"], tmp_path / "out", processes=2)
    results = [next(run.glob("passes/01-importance-*/result.json")) for run in (one, two)]
    found = [json.loads(result.read_text()) | {"seconds": 0} for result in results]
    assert found[0]["blocks"][0]["standard_error"] > 0
    assert found[0] == found[1]
    count = len(found[0]["blocks"])
    assert len(found[0]["sureness"]) == len(found[0]["membership"]) == count - 1
    # A resampling that chooses the whole set chooses each of its blocks, and none of the others.
    for sure, members in zip(found[0]["sureness"], found[0]["membership"], strict=True):
        assert all(share >= sure - 1e-3 or share <= 1.0 - sure + 1e-3 for share in members.values())
    assert found[0]["forwards_equivalent"] == (count + 3) / 2


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [("cpu", "fp32", None), ("cpu", "bf16", None), ("cuda", "fp32", None), ("cuda", "bf16", torch.bfloat16)],
)
def test_a_gpu_computes_in_the_precision_of_the_training(
    device: str, precision: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's scores are fp32, whatever a training's precision; those of attention too."""

    class Asked(Exception):  # noqa: N818
        pass

    source = RECIPES / "moving-digits" / "teacher" / "transformer"
    program: Any = SimpleNamespace(
        components={"transformer": source}, family=family_of("WanPipeline"), latents=(16, 3, 8, 8)
    )
    work: Any = SimpleNamespace(data=lambda program: None, device=device, precision=precision)

    def loading(*given: Any) -> None:
        raise Asked(*given)

    monkeypatch.setattr("flcompress.models.loading.load_transformer", loading)
    for step in (Importance(), TemporalAttention()):
        with pytest.raises(Asked) as asked:
            step.apply(program, work)
        assert asked.value.args == (source, device, dtype)


def test_half_precision_ranks_the_blocks_alike(model: Path, tmp_path: Path) -> None:
    graph = read_source(load_recipe(recipe(tmp_path, model))).graph
    scores = []
    for dtype in (None, torch.bfloat16):
        transformer = load_transformer(model / "transformer", dtype=dtype)
        inputs = example_inputs(transformer)
        with (
            half_precision("cpu", enabled=dtype is not None),
            torch.no_grad(),
            prefix.remember(transformer, graph) as memory,
        ):
            full = transformer(**inputs, return_dict=False)[0].float()
            found = []
            for block in graph.blocks:
                with memory.skipping(block.path):
                    found.append(float((transformer(**inputs, return_dict=False)[0].float() - full).square().mean()))
        scores.append(found)
    assert scores[1] == pytest.approx(scores[0], rel=0.05)


class OffTheCard(prefix._Stored):
    """Host memory beside fake tensors that stand for the card's: no tensor that `Alive` counts."""

    total = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self._like = torch.empty_like(tensor.detach(), device="meta")
        OffTheCard.total += tensor.numel() * tensor.element_size()

    def copy(self) -> torch.Tensor:
        return torch.empty_like(self._like, device="cpu")


def test_the_plan_counts_what_a_14b_model_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Card and host, at 480p x 81 frames; of its forty blocks four, to be quick, of which two are skipped."""
    folder = Path(shutil.copytree(RECIPES / "configs" / "wan2.1-t2v-14b", tmp_path / "model"))
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {"num_layers": 4}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    loaded = load_recipe(RECIPES / "wan2.1-t2v-14b.yaml", [f"model.path={folder}"])
    plan = make_plan(loaded, machine=gpu_machine(loaded, "h100", 16))
    planned, source = plan.passes[0], read_source(loaded)
    model = meta_transformer(source.transformer)
    inputs = example_inputs(model, latent_shape=source.latents[1:], tokens=512)
    monkeypatch.setattr(torch, "equal", lambda one, other: True)  # fake tensors have no values to compare
    monkeypatch.setattr(prefix, "_Stored", OffTheCard)
    single = set(model._keep_in_fp32_modules)
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty(one.shape, dtype=torch.float32 if single & set(name.split(".")) else torch.bfloat16)
            for name, one in model.named_parameters()
        } | {name: torch.empty(one.shape, dtype=one.dtype) for name, one in model.named_buffers()}
        given = tree_map_only(torch.Tensor, lambda one: torch.empty(one.shape, dtype=one.dtype), inputs)
        given |= {name: given[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
        with Alive() as alive, torch.no_grad(), prefix.remember(model, source.graph) as memory:
            torch.func.functional_call(model, state, (), given)
            for path in ("blocks.1", "blocks.3"):
                with memory.skipping(path):
                    torch.func.functional_call(model, state, (), given)
    weights = sum(one.numel() * one.element_size() for one in state.values())
    assert planned.memory.total == pytest.approx(weights + alive.most, rel=0.03)
    # And the first block's input, which is one more beside four outputs, and beside forty no matter.
    assert planned.memory.host == pytest.approx(OffTheCard.total * 4.0 / 5.0, rel=0.03)
    assert planned.processes == 16
    assert "memory: importance keeps 1.34 GB of each process in the machine's memory" in plan_text(plan)


def test_log_strata_have_less_than_half_the_error_at_equal_draws(tmp_path: Path) -> None:
    """On the trained benchmark model, whose weighted differences grow towards the lowest levels; equal expectation."""
    file = tmp_path / "recipe.yaml"
    estimates = {}
    for strata in ("even", "log"):
        file.write_text(
            f"version: 1\nmodel: {RECIPES / 'moving-digits/teacher'}\nsampling: {{max_sequence_length: 16}}\n"
            f"data: {{moving-digits: {{clips: 64}}}}\npasses: [importance: {{draws: 64, strata: {strata}}}]\n"
        )
        run = apply(file, tmp_path / strata, store=tmp_path / "store", display=QuietDisplay(), device="cpu")
        estimates[strata] = [block.importance for block in run.final().graph.blocks]
    for even, log in zip(estimates["even"], estimates["log"], strict=True):
        assert even is not None
        assert log is not None
        assert log.standard_error < 0.5 * even.standard_error
        assert abs(log.mean - even.mean) < 4.0 * (log.standard_error**2 + even.standard_error**2) ** 0.5


def test_half_precision_moves_a_score_by_a_small_part_of_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the trained benchmark model, as a GPU scores it; the scores of its blocks are further apart."""
    file = tmp_path / "recipe.yaml"

    def scores(name: str) -> list[Estimate]:
        file.write_text(
            f"version: 1\nmodel: {RECIPES / 'moving-digits/teacher'}\nsampling: {{max_sequence_length: 16}}\n"
            "data: {moving-digits: {clips: 8}}\npasses: [importance: {draws: 8, noise_levels: 1}]\n"
        )
        run = apply(file, tmp_path / name, display=QuietDisplay(), device="cpu")
        return [block.importance for block in run.final().graph.blocks if block.importance is not None]

    def furthest(others: list[Estimate]) -> float:
        pairs = zip(exact, others, strict=True)
        return max(abs(ours.mean - theirs.mean) / ours.standard_error for ours, theirs in pairs)

    exact = scores("exact")
    monkeypatch.setattr(
        "flcompress.models.loading.load_transformer",
        lambda folder, device, dtype: load_transformer(folder, device, torch.bfloat16),
    )
    half = scores("half")
    assert [score.mean for score in half] != [score.mean for score in exact]
    assert furthest(half) < 0.25 < furthest([*half[1:], half[0]])
