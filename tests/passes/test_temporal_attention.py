"""The attention on other frames: its closed values, where it is read in every family, and the choice by it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flcompress.core.program import Fact
from flcompress.distributed.world import World
from flcompress.driver.manager import apply, check
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import PreconditionError, RequestError
from flcompress.frontend.loading import load_recipe
from flcompress.ir.block import Estimate
from flcompress.ir.graph import BlockGraph
from flcompress.ir.selection import choose
from flcompress.ir.serial import from_json, to_json
from flcompress.models.families import family_of
from flcompress.passes.select import Select
from flcompress.passes.temporal_attention import TemporalAttention
from flcompress.progress import QuietDisplay
from flcompress.reporting.html import render
from flcompress.reporting.reading import read_run
from flcompress.tracing.skip import graph_of
from flcompress.training.methods import temporal_attention
from flcompress.training.methods.temporal_attention import QUERIES, mass_on_other_frames
from tests.fixtures.gaussian import teacher_contract
from tests.fixtures.tiny import tiny_pipeline
from tests.tracing import models

TEACHER = Path(__file__).parents[2] / "recipes/moving-digits/teacher"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_tokens_by_hand() -> None:
    """Frames of one token: the other one gets the logistic function of what its key has more than one's own."""
    query = torch.tensor([[[[1.0], [2.0]]]])
    key = torch.tensor([[[[0.5], [-0.25]]]])
    expected = (torch.sigmoid(torch.tensor(-0.75)) + torch.sigmoid(torch.tensor(2.0 * 0.75))) / 2.0
    torch.testing.assert_close(mass_on_other_frames(query, key, 2), expected[None])
    doubled = (torch.sigmoid(torch.tensor(-1.5)) + torch.sigmoid(torch.tensor(3.0))) / 2.0
    torch.testing.assert_close(mass_on_other_frames(query, key, 2, scale=2.0), doubled[None])


@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=20)
def test_what_the_mass_is_for_any_size(frames: int, per_frame: int, seed: int) -> None:
    """Between 0 and 1, 0 of one frame, (F - 1) / F if uniform; and nothing is said of the order of frames."""
    tokens = frames * per_frame
    query, key = random(2, 3, tokens, 4, seed=seed), random(2, 3, tokens, 4, seed=seed + 1)
    mass = mass_on_other_frames(query, key, frames)
    assert mass.shape == (2,)
    assert bool(((mass >= 0) & (mass <= 1 + 1e-6)).all())
    if frames == 1:
        assert mass.tolist() == [0.0, 0.0]
    uniform = mass_on_other_frames(torch.zeros_like(query), key, frames)
    assert uniform.tolist() == pytest.approx([1.0 - 1.0 / frames] * 2, abs=1e-5)
    if tokens <= QUERIES:
        order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed))
        shuffled = [x.reshape(2, 3, frames, per_frame, 4)[:, :, order].flatten(2, 3) for x in (query, key)]
        torch.testing.assert_close(mass_on_other_frames(shuffled[0], shuffled[1], frames), mass)


def test_64_queries_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = random(4, 8, 600, 8), random(4, 8, 600, 8, seed=1)
    sampled = mass_on_other_frames(query, key, 6)
    monkeypatch.setattr(temporal_attention, "QUERIES", 600)
    torch.testing.assert_close(sampled, mass_on_other_frames(query, key, 6), rtol=0.01, atol=0.0)


@dataclass
class RandomClips:
    """Random latents and conditioning of a model, with what a measurement asks of a dataset."""

    model: Any
    shape: tuple[int, int, int] = (3, 8, 8)
    tokens: int = 8
    text_seed: int = 0

    def batch(self, n: int, draw: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        family = family_of(type(self.model).__name__)
        text = torch.Generator().manual_seed(self.text_seed)
        x0 = torch.randn(n, family.channels(self.model.config), *self.shape, generator=draw)
        conditioning = family.example_conditioning(self.model.config, n, self.shape, self.tokens, text)
        if "pooled_projections" in conditioning:  # of which the clip's tokens know before any attention
            conditioning["pooled_projections"] = torch.zeros_like(conditioning["pooled_projections"])
        return x0, conditioning


def scored(model: Any, clips: Any, **arguments: Any) -> tuple[dict[str, Estimate], float]:
    scores = TemporalAttention(draws=8, noise_levels=2, batch=3, **arguments).scores
    return scores.score(
        model, graph_of(model), teacher_contract("flow"), clips, 0, lambda *_: None, World()
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "Wan": lambda: models.wan()[0],
    "CogVideoX": lambda: models.cogvideox()[0],
    "HunyuanVideo": lambda: models.hunyuan_video()[0],
}
FIRST = {"Wan": "blocks.0", "CogVideoX": "transformer_blocks.0", "HunyuanVideo": "transformer_blocks.0"}


@pytest.mark.parametrize("name", MODELS)
def test_a_family_is_read_at_the_tokens_of_its_clip(name: str) -> None:
    """Before the first attention the clip's tokens know nothing of the text: another one, as long as the clip even,
    changes nothing in the first block, and what is no block of the clip has no mass.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    model.requires_grad_(False)
    family = family_of(type(model).__name__)
    frames, rows, columns = family.token_grid(model.config, RandomClips(model).shape)
    attention, uniform = scored(model, RandomClips(model))
    assert uniform == pytest.approx(2.0 / 3.0)
    assert {path.rpartition(".")[0] for path in attention} == {
        stack for stack in graph_of(model).stacks if stack not in family.text_stacks
    }
    assert all(0.3 < score.mean < 0.9 and score.standard_error > 0.0 for score in attention.values())
    other, _ = scored(model, RandomClips(model, text_seed=1))
    assert other[FIRST[name]] == attention[FIRST[name]]
    assert other != attention
    if name != "CogVideoX":  # whose positions are for one length
        longer, _ = scored(model, RandomClips(model, tokens=frames * rows * columns))
        assert longer[FIRST[name]].mean == pytest.approx(attention[FIRST[name]].mean, rel=1e-6)
    single, none = scored(model, RandomClips(model, shape=(1, 8, 8)))
    assert none == 0.0
    assert {score.mean for score in single.values()} == {0.0}
    for path in attention:
        module = model.get_submodule(f"{path}.{family.self_attention}")
        for weights in module.to_q.parameters():
            weights.zero_()
    blind, _ = scored(model, RandomClips(model))
    assert [score.mean for score in blind.values()] == pytest.approx([uniform] * len(blind), abs=1e-6)


def test_attention_that_is_not_seen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["Wan"]()
    monkeypatch.setattr(family_of("WanTransformer3DModel").__class__, "self_attention", "attn3")
    with pytest.raises(RequestError, match=r"WanTransformer3DModel has no module 'blocks.0.attn3'; its family's"):
        scored(model, RandomClips(model))
    monkeypatch.setattr(family_of("WanTransformer3DModel").__class__, "self_attention", "ffn")
    with pytest.raises(RequestError, match=r"attention of 'blocks.0' does not run through torch's scaled_dot_product"):
        scored(model, RandomClips(model))


def test_a_graph_with_it_is_read_back_and_one_without_is_as_before() -> None:
    plain = graph_of(models.hunyuan_video()[0])
    assert "temporal_attention" not in to_json(plain)
    clip = [block.path for block in plain.blocks if block.stack.startswith(("transformer", "single"))]
    graph = plain.with_temporal_attention(
        {path: Estimate(mean=0.1 * number, standard_error=0.01) for number, path in enumerate(clip)}
    )
    assert from_json(to_json(graph)) == graph
    assert choose(graph, 0.25, "temporal-attention") == tuple(clip[:2])
    with pytest.raises(PreconditionError, match="has no temporal attention; put the temporal-attention pass before"):
        choose(plain, 0.25, "temporal-attention")


RECIPE = """
version: 1
model: {model}
sampling: {{max_sequence_length: 16}}
data: {{moving-digits: {{clips: 24}}}}
training: {{log_to: [], health: {{on_breach: warn}}}}
passes:
"""
STEPS = """
  - temporal-attention: {draws: 8, noise_levels: 2, batch: 4}
  - stochastic-depth: {remove: 0.2, by: temporal-attention, steps: 2, batch: 2}
  - prune: {remove: 0.2, by: temporal-attention}
  - feature-distill: {steps: 2, batch: 2, learning_rate: 1e-3}
"""


def test_a_choice_by_it_needs_the_pass(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=TEACHER) + "  - prune: {remove: 0.2, by: temporal-attention}\n")
    with pytest.raises(PreconditionError, match="prune: needs the program to be attention-scored"):
        check(load_recipe(recipe), RunDirectory(tmp_path / "run"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("attention") / "model")


@pytest.mark.e2e
def test_the_lowest_blocks_are_trained_cut_recovered_and_reported(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model) + STEPS)
    started = time.monotonic()
    run = apply(recipe, tmp_path / "run", display=QuietDisplay(), device="cpu")
    took = time.monotonic() - started
    folders = {entry.name: entry.folder for entry in run.entries()}
    results = {
        name: json.loads((folder / "result.json").read_text())
        for name, folder in folders.items()
        if (folder / "result.json").exists()
    }
    graph: BlockGraph = next(entry for entry in run.entries() if entry.name == "temporal-attention").program().graph
    assert 0.0 < results["temporal-attention"]["seconds"] < took
    masses = {block["path"]: block["mean"] for block in results["temporal-attention"]["blocks"]}
    assert [block.path for block in graph.blocks] == list(masses)
    lowest = sorted(masses, key=lambda path: masses[path])[:2]
    assert results["stochastic-depth"]["prune_set"] == results["prune"]["removed"] == sorted(lowest)
    assert results["prune"]["reasons"][lowest[1]].endswith("2 of 4 from the lowest")
    final = run.final()
    assert {Fact.ATTENTION_SCORED, Fact.PRUNED} <= final.facts
    assert results["feature-distill"]["steps"] == 2
    assert len(final.graph.blocks) == 2
    before, after = (
        load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
        for folder in (folders["prune"], folders["feature-distill"])
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    page = render(read_run(run.path))
    assert "Temporal attention" in page
    assert page.count("Attention of each block on other frames") == 2


def test_clips_of_one_latent_frame_are_refused() -> None:
    program: Any = SimpleNamespace(
        components={"transformer": TEACHER / "transformer"},
        family=family_of("WanPipeline"),
        latents=(16, 1, 8, 8),
    )
    context: Any = SimpleNamespace()
    with pytest.raises(PreconditionError, match="temporal-attention: the clips have one latent frame"):
        TemporalAttention().apply(program, context)


def test_select_compares_it_where_it_was_measured() -> None:
    plain = graph_of(models.wan()[0])
    graph = plain.with_temporal_attention(
        {block.path: Estimate(mean=1.0 / (1.0 + block.index), standard_error=0.01) for block in plain.blocks}
    )
    program: Any = SimpleNamespace(facts=frozenset({Fact.ATTENTION_SCORED}))
    rivals = Select(remove=0.3)._rivals(program, graph)
    assert rivals["temporal-attention"] == ("blocks.2", "blocks.3")
    assert "importance" not in rivals
