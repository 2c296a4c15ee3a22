"""Every engine on two processes against one process on the same batches: losses, and weights after the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.comparing import Difference, applied, difference, moved, passes_of, weights_of
from tests.training.home import Home

pytestmark = pytest.mark.slow

# Rates at which the smooth optimiser moves weights far further than rounding does, and the scores apart.
DEPTH = "by: middle, remove: 0.3, batch: 4, learning_rate: 0.1"
MATCHING = "student_steps: 2, critic_updates: 1, batch: 4, learning_rate: 0.05, critic_learning_rate: 0.1"
PASSES = (
    # One of the prune set, both, or none are skipped in a step; then always both.
    f"stochastic-depth: {{{DEPTH}, steps: 4, target: frozen, alpha: 0.7}}",
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: self, skip_probability: 1.0}}",
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: ema}}",
    "prune: {remove: 0.3, by: middle}",
    "feature-distill: {steps: 2, batch: 4, learning_rate: 0.05, discriminator_learning_rate: 0.05}",
    f"dmd: {{{MATCHING}, steps: 2, intra_cfg: [0.2, 0.3]}}",
    "consistency: {student_steps: 2, levels: 4, batch: 4, steps: 2, learning_rate: 0.1}",
)
UPDATES = 18
"""Eight, two each of a student and its discriminator, two each of a critic and a generator, and two of consistency."""
SHORT = (
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: self}}",
    f"dmd: {{{MATCHING}, steps: 1}}",
)
SHORT_UPDATES = 4
GAN = (f"dmd: {{{MATCHING}, steps: 2, gan_weight: 0.5}}",)


def compared(
    home: Home, name: str, passes: Sequence[str], one: Path, engine: str, *options: str, processes: int = 2
) -> Difference:
    found = difference(home.model, one, applied(home, name, passes, engine, processes, *options))
    print(f"{engine}: {found}")
    return found


@pytest.fixture(scope="module")
def reference(home: Home) -> Path:
    return applied(home, "plain", PASSES, "local", 1)


def test_the_reference_trains_and_skips(home: Home, reference: Path) -> None:
    """What is compared below is not nothing: every training moves the weights far further than they are rounded."""
    before = weights_of(home.model)
    for folder in passes_of(reference):
        after = weights_of(folder)
        if (folder / "metrics.jsonl").exists():
            assert moved(before, after) > 1e-4
        before = after


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_two_processes_equal_one(home: Home, reference: Path, engine: str) -> None:
    compared(home, "plain", PASSES, reference, engine).require(UPDATES)


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_one_process_that_is_meant_equals_local(home: Home, reference: Path, engine: str) -> None:
    compared(home, "plain", PASSES, reference, engine, "training.processes=1", processes=1).require(UPDATES)


@pytest.fixture(scope="module")
def adversarial(home: Home) -> Path:
    return applied(home, "gan", GAN, "local", 1)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_the_adversarial_term(home: Home, adversarial: Path, engine: str) -> None:
    """On ddp it is in test_micro_batches.py."""
    compared(home, "gan", GAN, adversarial, engine, "training.gradient_checkpointing=true").require(UPDATES)


@pytest.fixture(scope="module")
def short(home: Home) -> Path:
    return applied(home, "short", SHORT, "local", 1)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_gradient_checkpointing_changes_nothing(home: Home, short: Path, engine: str) -> None:
    compared(home, "short", SHORT, short, engine, "training.gradient_checkpointing=true").require(SHORT_UPDATES)


@pytest.fixture(scope="module")
def half(home: Home) -> Path:
    return applied(home, "half", SHORT, "local", 1, "training.precision=bf16")


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_bf16(home: Home, short: Path, half: Path, engine: str) -> None:
    """Two trainings in bf16 are about as far apart as each is from fp32: bf16's own rounding, measured here."""
    noise = difference(home.model, short, half)
    print(f"bf16: {noise}")
    found = compared(home, "half", SHORT, half, engine, "training.precision=bf16")
    for folder in passes_of(home.folder / f"run-half-{engine}-2"):
        for file in folder.glob("transformer/*.safetensors"):
            assert {value.dtype for value in load_file(file).values()} == {torch.float32}
    assert 0.0 < noise.logged < 0.1
    assert 0.0 < noise.weights < 0.1
    assert found.logged < 3.0 * noise.logged
    assert found.weights < 3.0 * noise.weights
