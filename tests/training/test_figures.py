"""Sample figures and critic lag against what they must be by their formulas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.core.program import Program
from flcompress.core.settings import Health
from flcompress.core.steps import PassContext
from flcompress.data.dataset import LatentDataset
from flcompress.diffusion import matching
from flcompress.diffusion.contract import contract_of
from flcompress.diffusion.experts import Experts
from flcompress.diffusion.network import Conditioning, Network
from flcompress.diffusion.process import FLOW
from flcompress.diffusion.sampling import sample
from flcompress.diffusion.student import student_contract
from flcompress.distributed.world import World
from flcompress.training.distillation.critic_lag import critic_lag
from flcompress.training.distillation.samples import Prompts, compare, moments
from tests.fixtures.gaussian import LATENTS, SIZE, Clips, Normal

ALONE = World()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.25, 4.0), shift=st.floats(-3.0, 3.0), frames=st.integers(1, 5))
def test_scaled_and_shifted_samples_have_the_figures_of_the_formula(scale: float, shift: float, frames: int) -> None:
    """a x + b: deviation and motion are a; the distance sees b in the values alone, and a in every view."""
    teacher = normal(3, 2, frames, 4, 5)
    reference = moments(teacher, ALONE)
    found = compare(scale * teacher + shift, reference, ALONE)
    mean, deviation = reference["x.mean"], reference["x.deviation"]
    own = (((scale * mean + shift - mean) ** 2 + ((scale - 1) * deviation) ** 2) / deviation**2).mean()
    others = [
        ((((scale - 1) * reference[f"{view}.mean"]) ** 2) / reference[f"{view}.deviation"] ** 2).mean()
        + (scale - 1) ** 2
        for view in (("space", "time") if frames > 1 else ("space",))
    ]
    expected = (own + sum(others)) / (1 + len(others))
    assert found["sample_distance"] == pytest.approx(float(expected), rel=1e-6, abs=1e-9)
    assert found["sample_deviation"] == pytest.approx(scale, rel=1e-9)
    if frames > 1:
        assert found["sample_motion"] == pytest.approx(scale, rel=1e-9)
    else:
        assert "sample_motion" not in found


def test_saturation_is_the_share_beyond_three_deviations() -> None:
    teacher = normal(1, 1, 2, 10, 10)
    reference = moments(teacher, ALONE)
    middle, width = float(reference["x.mean"]), float(reference["x.deviation"])
    samples = torch.full((1, 1, 2, 10, 10), middle, dtype=torch.float64)
    samples[0, 0, 0, 0, :7] = middle + 3.1 * width
    samples[0, 0, 1, 0, :3] = middle - 3.1 * width
    samples[0, 0, 1, 1, :3] = middle - 2.9 * width
    assert compare(samples, reference, ALONE)["sample_saturation"] == 10 / 200


class Half(World):
    """One of two processes whose values, both known here, are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Mapping[str, float]] = []
        self.other: list[Mapping[str, float]] = []

    def all_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        self.seen.append(values)
        other = self.other[len(self.seen) - 1] if self.other else values
        assert list(other) == list(values)
        return {name: (one + other[name]) / 2 for name, one in values.items()}


def test_two_processes_agree_on_what_one_would_say() -> None:
    samples, teacher = normal(4, 2, 3, 4, 4), normal(4, 2, 3, 4, 4, seed=1)
    alone = compare(samples, moments(teacher, ALONE), ALONE)
    first, second = Half(), Half()
    reference = moments(teacher, ALONE)
    compare(samples[2:], reference, first)
    second.other = first.seen
    assert compare(samples[:2], reference, second) == pytest.approx(alone, rel=1e-12)


def linear(weight: float, constant: float = 0.0) -> Network:
    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return weight * x + constant

    return call


def test_the_fixed_samples_are_guided_as_the_sampler_guides(tmp_path: Path) -> None:
    """Two experts, each with a scale of its own; predictions that depend on the prompt alone."""
    teacher = contract_of(
        {"shift": 5.0},
        num_inference_steps=8,
        guidance_scale=4.0,
        max_sequence_length=16,
        experts=Experts(boundary_ratio=0.875, compressed="low", guidance_scale=3.0),
    )
    given, negative = {"prompt": torch.tensor([1.0, 2.0, 5.0])}, {"prompt": torch.tensor([0.0])}

    def network(x: torch.Tensor, timestep: torch.Tensor, given: Conditioning) -> torch.Tensor:
        return torch.zeros_like(x) + given["prompt"].reshape(-1, 1, 1, 1, 1)

    work = PassContext(directory=tmp_path, seed=0, data=_no_data, progress=lambda *told: None)
    prompts = Prompts(work, given, negative, (3, 2, 2, 4, 4), 2, 3, lambda noise, given: torch.zeros_like(noise))
    clean, _ = prompts.sample(network, teacher)
    expected = sample(network, teacher, torch.zeros(3, 2, 2, 4, 4), given, negative)
    torch.testing.assert_close(clean, expected, rtol=0, atol=0)
    assert len({teacher.guidance_at(place) for place in range(8)}) == 2


def test_the_fixed_samples_of_a_student_get_fresh_noise_at_every_step(tmp_path: Path) -> None:
    """x0 = (1 - s w) x for v = w x, then x' = (1 - s') x0 + s' n: the variance of each step follows from the last's."""
    teacher = contract_of({"shift": 3.0}, num_inference_steps=8, guidance_scale=1.0, max_sequence_length=16)
    student, w = student_contract(teacher, 3), 0.4
    assert student.stochastic
    work = PassContext(directory=tmp_path, seed=0, data=_no_data, progress=lambda *told: None)
    prompts = Prompts(work, {}, {}, (60, 2, 2, 8, 8), 60, 60, lambda noise, given: noise)
    clean, seen = prompts.sample(linear(w), student)
    variance = 1.0
    of_level: list[float] = []
    for level in student.sigmas:
        variance = (1.0 - level) ** 2 * of_level[-1] + level**2 if of_level else variance
        of_level.append((1.0 - level * w) ** 2 * variance)
    assert float(clean.var()) == pytest.approx(of_level[-1], rel=0.05)
    # Sample i shows what was predicted at level i modulo 3.
    assert [float(seen[at::3].var()) for at in range(3)] == pytest.approx(of_level, rel=0.05)


def test_the_fixed_samples_have_the_prompts_of_the_dataset(tmp_path: Path) -> None:
    clips: Any = Clips(Normal(torch.zeros(SIZE).double(), torch.eye(SIZE).double()), torch.tensor([[[0.5, -0.5]]]))
    work = PassContext(directory=tmp_path, seed=0, data=_no_data, progress=lambda *told: None, health=Health(samples=6))
    program: Any = SimpleNamespace(latents=LATENTS, family=SimpleNamespace(start=None))
    prompts = Prompts.choose(work, program, clips, 4)
    assert (prompts.shape, prompts.total, prompts.at_once) == ((6, *LATENTS), 6, 4)
    torch.testing.assert_close(prompts.conditioning, clips.given(6))


def _no_data(program: Program) -> LatentDataset:
    raise AssertionError("nothing here reads data")


@pytest.mark.parametrize("error", [0.0, 0.3, -0.5])
def test_critic_lag_of_gaussians_is_the_excess_loss(error: float) -> None:
    """x_g ~ N(0, w^2): the best flow prediction is a x_s with a = (s - (1 - s) w^2) / ((1 - s)^2 w^2 + s^2)."""
    w, s, n = 0.7, 0.6, 200
    x0, noise = w * normal(n, 2, 2, 8, 8), normal(n, 2, 2, 8, 8, seed=1)
    level = torch.full((n,), s, dtype=torch.float64)
    variance = (1 - s) ** 2 * w**2 + s**2
    best = (s - (1 - s) * w**2) / variance
    lag = critic_lag(
        linear(best + error), linear(0.1), FLOW, x0, {}, level, noise, at_once=64, world=ALONE
    )  # fmt: skip
    lowest = 1 + w**2 - best**2 * variance
    assert lag == pytest.approx(error**2 * variance / lowest, abs=0.01)
    assert lag >= 0


def test_a_critic_that_another_network_would_improve_lags() -> None:
    x0, noise, level = normal(50, 1, 1, 8, 8), normal(50, 1, 1, 8, 8, seed=1), torch.full((50,), 0.5)

    def knowing(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return noise - x0

    assert critic_lag(linear(0.0), knowing, FLOW, x0, {}, level, noise, at_once=50, world=ALONE) > 1e6


def test_the_lag_is_defined_where_critic_and_other_network_are_one() -> None:
    x0, noise, level = normal(50, 1, 1, 8, 8), normal(50, 1, 1, 8, 8, seed=1), torch.full((50,), 0.5)
    lag = critic_lag(linear(0.2), linear(0.2), FLOW, x0, {}, level, noise, at_once=7, world=ALONE)
    assert 0.0 < lag < 0.1


def test_the_normaliser_is_the_mean_distance_of_each_sample() -> None:
    generated, real = normal(3, 2, 4), torch.zeros(3, 2, 4, dtype=torch.float64)
    found = matching.normaliser(generated, real)
    torch.testing.assert_close(found, generated.abs().mean(dim=(1, 2)).float())
    g = matching.gradient(generated, real + 2.0, real)
    torch.testing.assert_close(g, (2.0 / (found + matching.EPSILON)).reshape(3, 1, 1).expand_as(generated))
