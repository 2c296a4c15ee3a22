"""The plan that a run keeps: the recipe's own setting, on the machine that it runs on."""

from __future__ import annotations

import pytest
import torch

from flcompress.driver.start import read_source
from flcompress.frontend.loading import load_recipe
from flcompress.frontend.recipe import Recipe
from flcompress.planning import plan as planning
from flcompress.planning.machines import GPUS, UTILISATION, gpu_machine
from flcompress.planning.plan import make_plan
from flcompress.planning.running import running_plan
from tests.fixtures.recipes import WriteRecipe

STEPS = "training: {engine: ddp, precision: bf16, gradient_checkpointing: true}\npasses: [score, {cut: {keep: 0.5}}]\n"


@pytest.fixture
def recipe(write: WriteRecipe) -> Recipe:
    return load_recipe(write(STEPS))


def on_gpu(monkeypatch: pytest.MonkeyPatch, name: str, size: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, size))


def test_on_a_known_gpu(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of `plan`, and the FLOP/s of both cards in the precision of each pass: `score` computes in fp32."""
    on_gpu(monkeypatch, "NVIDIA H100 80GB HBM3", 85e9)
    score, cut = running_plan(recipe, "cuda", 2)
    assert score is not None
    assert cut is not None
    whole = make_plan(recipe, machine=gpu_machine(recipe, "h100", 2)).passes
    assert [one.memory for one in (score, cut)] == [row.memory.total for row in whole]
    assert [one.seconds for one in (score, cut)] == [row.seconds for row in whole]
    assert (cut.machine, cut.gpu, cut.processes, cut.forwards) == ("H100 80 GB", True, 2, 3000)
    assert cut.flops == 3000 * read_source(recipe).graph.flops
    assert (score.peak_flops, cut.peak_flops) == (GPUS["h100"].single, 2 * GPUS["h100"].half)
    assert cut.seconds == pytest.approx(cut.flops / (UTILISATION * 2 * GPUS["h100"].half))


def test_on_an_unknown_gpu_there_is_no_speed(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, "NVIDIA Tesla T4", 15.6e9)
    _, cut = running_plan(recipe, "cuda", 1)
    assert cut is not None
    assert (cut.machine, cut.gpu, cut.seconds, cut.peak_flops) == ("NVIDIA Tesla T4", True, None, None)
    assert cut.memory > 0


def test_on_a_cpu_its_speed_is_measured(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure_speed", lambda *given: 1e9)
    _, cut = running_plan(recipe, "cpu", 2)
    assert cut is not None
    assert (cut.machine, cut.gpu, cut.processes, cut.peak_flops) == ("process", False, 2, None)
    assert cut.seconds == pytest.approx(cut.flops / 2e9)


def test_what_costs_nothing_is_not_planned(write: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "saved_activations", None)
    assert list(running_plan(load_recipe(write("passes: [{slow: {steps: 1}}]\n")), "cpu", 1)) == [None]


def test_measuring_the_speed_draws_nothing_from_the_global_state(write: WriteRecipe) -> None:
    before = torch.random.get_rng_state()
    running_plan(load_recipe(write("passes: [score]\n")), "cpu", 1)
    assert torch.equal(torch.random.get_rng_state(), before)
