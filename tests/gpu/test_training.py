"""Trainings on a real GPU: every engine against one process, the same weights twice, and after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flcompress.driver.manager import apply
from flcompress.progress import QuietDisplay
from tests.fixtures.tiny import tiny_pipeline
from tests.training.comparing import applied
from tests.training.engines.test_engines import SHORT, SHORT_UPDATES, compared
from tests.training.home import Home
from tests.training.killing import killed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

RECIPE = """
version: 1
model: {model}
sampling: {{num_inference_steps: 2, max_sequence_length: 16}}
data: {{moving-digits: {{clips: 8}}}}
training: {{precision: bf16, deterministic: true, health: {{on_breach: warn, samples: 1}}, log_to: []}}
passes:
  - importance: {{draws: 8, noise_levels: 1, batch: 8}}
  - stochastic-depth: {{remove: 0.1, steps: 2, batch: 2}}
  - prune: {{remove: 0.1}}
  - dmd: {{student_steps: 2, steps: 2, critic_updates: 1, batch: 2}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home.make(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def one(home: Home) -> Path:
    return applied(home, "gpu", SHORT, "local", 1)


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_an_engine_on_one_card_equals_local(home: Home, one: Path, engine: str) -> None:
    compared(home, "gpu", SHORT, one, engine, "training.processes=1", processes=1).require(SHORT_UPDATES)


def test_what_waits_in_host_memory_changes_nothing(home: Home, one: Path) -> None:
    settings = ("training.gradient_checkpointing=true", "training.offload=[moments,inputs]")
    compared(home, "gpu-offload", SHORT, one, "local", *settings, processes=1).require(SHORT_UPDATES)


def test_a_killed_training_ends_as_an_unbroken_one(home: Home) -> None:
    assert len(list(killed(home, "local", 2, seed=0))) == 2


def test_repeatable_sums_give_the_same_weights_twice(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_pipeline(tmp_path / "model", layers=4)))
    runs = [apply(recipe, tmp_path / name, display=QuietDisplay()) for name in ("first", "second")]
    first, second = ((run.final().components["transformer"]) for run in runs)
    files = [sorted(folder.glob("*.safetensors")) for folder in (first, second)]
    assert files[0]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
