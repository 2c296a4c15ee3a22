"""Every engine on two processes against one process on the same batches: losses, and weights after the steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.home import Home
from tests.training.processes import run

pytestmark = pytest.mark.slow

DEPTH = "by: middle, remove: 0.3, batch: 4"
MATCHING = "student_steps: 2, critic_updates: 1, batch: 4"
PASSES = (
    # One of the prune set, both, or none are skipped in a step; then always both.
    f"stochastic-depth: {{{DEPTH}, steps: 4, target: frozen, alpha: 0.7}}",
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: self, skip_probability: 1.0}}",
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: ema}}",
    "prune: {remove: 0.3, by: middle}",
    f"dmd: {{{MATCHING}, steps: 2, intra_cfg: [0.2, 0.3]}}",
)
SHORT = (
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: self}}",
    f"dmd: {{{MATCHING}, steps: 1}}",
)
GAN = (f"dmd: {{{MATCHING}, steps: 2, gan_weight: 0.1}}",)

LOSS_TOLERANCE = 1e-5
"""Relative: fp32 sums in another order."""
WEIGHT_TOLERANCE = 1e-5
"""Absolute. An update is at most the learning rate, 2e-4 and more; what is wrong in one step shows as that."""


def applied(home: Home, name: str, passes: Sequence[str], engine: str, processes: int, *options: str) -> Path:
    folder = home.begun(home.folder / f"run-{name}-{engine}-{processes}")
    settings = [f"training.engine={engine}", *options]
    sets = [word for setting in settings for word in ("--set", setting)]
    recipe = home.recipe(name, passes)
    command = run(
        ["apply", recipe, "--run-dir", folder, "--quiet", *sets],
        folder.with_name(folder.name + "-output"),
        processes=processes,
    )
    assert command.errors() == [""] * processes
    return folder


def passes_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("passes/[0-9]*"))


def differences(one: Path, other: Path) -> tuple[float, float]:
    """(largest relative difference of anything logged, largest absolute difference of any weight)."""
    logged = weights = 0.0
    compared = 0
    for first, second in zip(passes_of(one), passes_of(other), strict=True):
        for file in first.glob("metrics.jsonl"):
            lines = [path.read_text().splitlines() for path in (file, second / file.name)]
            for left, right in zip(*(list(map(json.loads, text)) for text in lines), strict=True):
                assert left.keys() == right.keys()
                logged = max(logged, *(abs(left[key] - right[key]) / _scale(key, left[key]) for key in left))
                compared += 1
        for file in first.glob("transformer/*.safetensors"):
            found = load_file(file), load_file(second / "transformer" / file.name)
            assert found[0].keys() == found[1].keys()
            weights = max(weights, *(float((found[0][key] - found[1][key]).abs().max()) for key in found[0]))
    assert compared
    return logged, weights


def _scale(figure: str, value: float) -> float:
    """The drift is itself a relative difference, and 0 before the first step."""
    return 1.0 if figure == "drift" else max(abs(value), 1e-9)


@pytest.fixture(scope="module")
def reference(home: Home) -> Path:
    return applied(home, "plain", PASSES, "local", 1)


def test_the_reference_trains_and_skips(home: Home, reference: Path) -> None:
    """What is compared below is not nothing: the weights move by more than the tolerance in every pass."""
    before = load_file(next((home.folder / "model/transformer").glob("*.safetensors")))
    for folder in passes_of(reference)[1:]:
        after = load_file(next(folder.glob("transformer/*.safetensors")))
        common = [key for key in after if after[key].shape == before[key].shape]
        moved = max(float((after[key] - before[key]).abs().max()) for key in common)
        assert moved > 20 * WEIGHT_TOLERANCE
        before = after


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_two_processes_equal_one(home: Home, reference: Path, engine: str) -> None:
    logged, weights = differences(reference, applied(home, "plain", PASSES, engine, 2))
    print(f"{engine}: losses {logged:.1e}, weights {weights:.1e}")
    assert logged < LOSS_TOLERANCE
    assert weights < WEIGHT_TOLERANCE


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_one_process_that_is_meant_equals_local(home: Home, reference: Path, engine: str) -> None:
    logged, weights = differences(reference, applied(home, "plain", PASSES, engine, 1, "training.processes=1"))
    assert logged < LOSS_TOLERANCE
    assert weights < WEIGHT_TOLERANCE


def test_the_adversarial_term_on_ddp(home: Home) -> None:
    one = applied(home, "gan", GAN, "local", 1)
    logged, weights = differences(one, applied(home, "gan", GAN, "ddp", 2))
    assert logged < LOSS_TOLERANCE
    assert weights < WEIGHT_TOLERANCE


@pytest.fixture(scope="module")
def short(home: Home) -> Path:
    return applied(home, "short", SHORT, "local", 1)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_gradient_checkpointing_changes_nothing(home: Home, short: Path, engine: str) -> None:
    folder = applied(home, "short", SHORT, engine, 2, "training.gradient_checkpointing=true")
    logged, weights = differences(short, folder)
    assert logged < LOSS_TOLERANCE
    assert weights < WEIGHT_TOLERANCE


@pytest.fixture(scope="module")
def half(home: Home) -> Path:
    return applied(home, "half", SHORT, "local", 1, "training.precision=bf16")


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_bf16(home: Home, half: Path, engine: str) -> None:
    """bf16 rounds at 4e-3: losses agree to that, and a weight that takes another sign by one update or two."""
    logged, weights = differences(half, applied(home, "half", SHORT, engine, 2, "training.precision=bf16"))
    print(f"{engine}: losses {logged:.1e}, weights {weights:.1e}")
    assert logged < 2e-2
    assert weights < 2e-3
    for folder in passes_of(home.folder / f"run-half-{engine}-2")[1:]:
        for file in folder.glob("transformer/*.safetensors"):
            assert {value.dtype for value in load_file(file).values()} == {torch.float32}
