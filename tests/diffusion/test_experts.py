"""Sampling by two experts: which one answers a timestep, at which guidance, and what their students take."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from flcompress.diffusion.contract import SamplingContract, contract_of
from flcompress.diffusion.experts import Expert, Experts
from flcompress.diffusion.sampling import sample
from flcompress.diffusion.student import student_contract
from flcompress.errors import ModelError, PreconditionError
from flcompress.training.objectives import level_range


def contract(compressed: Expert, *, steps: int = 50, shift: float = 5.0, **more: Any) -> SamplingContract:
    return contract_of(
        {"shift": shift},
        num_inference_steps=steps,
        guidance_scale=4.0,
        max_sequence_length=16,
        experts=Experts(boundary_ratio=0.875, compressed=compressed, guidance_scale=3.0, **more),
    )


def test_each_call_goes_to_the_expert_of_its_timestep_at_its_own_scale() -> None:
    """From pure noise, predictions that depend on the expert and the prompt alone; the sum of the steps by hand."""
    teacher = contract("low", steps=8)
    assert teacher.experts is not None

    def constant(value: float) -> Any:
        return lambda x, timestep, given: torch.full_like(x, value) + given["prompt"].reshape(-1, 1, 1, 1, 1)

    joined = teacher.experts.combine(constant(10.0), constant(20.0))
    prompt, negative = {"prompt": torch.tensor([1.0])}, {"prompt": torch.tensor([0.0])}
    found = sample(joined, teacher, torch.zeros(1, 1, 1, 1, 1), prompt, negative)
    sigmas = torch.tensor([*teacher.sigmas, 0.0])
    high = sum(t >= 875.0 for t in teacher.timesteps)
    widths = sigmas[1:] - sigmas[:-1]
    assert 0 < high < 8
    assert float(found) == pytest.approx(float(24.0 * widths[:high].sum() + 13.0 * widths[high:].sum()), rel=1e-5)
    assert teacher.evaluations == 16


@pytest.mark.parametrize("ratio", [0.9, 0.417, 0.7, 1.0 / 3.0])
def test_the_boundary_itself_is_the_high_noise_experts_as_in_the_stock_pipeline(ratio: float) -> None:
    experts = Experts(boundary_ratio=ratio, compressed="low", guidance_scale=1.0)
    on = torch.tensor(ratio * 1000, dtype=torch.float32)
    for t in (on, torch.nextafter(on, torch.tensor(0.0)), torch.nextafter(on, torch.tensor(2000.0))):
        assert experts.at(float(t)) == ("high" if t >= ratio * 1000 else "low")


def test_a_student_keeps_the_guidance_of_a_partner_that_is_no_student() -> None:
    first = student_contract(contract("high"), 4)
    assert first.experts is not None
    assert (first.guidance_scale, first.experts.guidance_scale, first.own_steps) == (1.0, 3.0, (0, 1))
    alone = student_contract(contract("low"), 4)
    assert alone.experts is not None
    assert (alone.guidance_scale, alone.experts.guidance_scale, alone.own_steps) == (4.0, 1.0, (2, 3))
    second = student_contract(contract("low", partner_steps=4), 4)
    assert (second.evaluations, second.sigmas) == (4, first.sigmas)
    assert SamplingContract.from_dict(json.loads(json.dumps(second.to_dict()))) == second


@pytest.mark.parametrize(
    ("compressed", "steps", "more", "message"),
    [
        (
            "low",
            8,
            {"partner_steps": 4},
            "dmd.student_steps: 8 given, expected 4: the partner that model.partner names ",
        ),
        (
            "low",
            1,
            {},
            r"dmd.student_steps: 1 given, but none of its timesteps \(1000\) is the low-noise expert's, which answers "
            "below 875; give more steps",
        ),
    ],
)
def test_a_student_needs_a_step_of_its_own(compressed: Expert, steps: int, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        student_contract(contract(compressed, **more), steps)


@pytest.mark.parametrize("compressed", ["high", "low"])
@pytest.mark.parametrize("by", [1.0, 3.0, 5.0])
def test_the_levels_of_an_expert_before_the_shift(compressed: Expert, by: float) -> None:
    low, high = level_range(contract(compressed), by, low=0.02, high=0.98, key="x")
    after = [by * level / (1 + (by - 1) * level) for level in (low, high)]
    wanted = (0.875, after[1]) if compressed == "high" else (after[0], 0.875)
    assert after == pytest.approx(wanted)
    assert (low, high) == pytest.approx((low, 0.98) if compressed == "high" else (0.02, high))


def test_levels_that_an_expert_never_sees_are_refused() -> None:
    with pytest.raises(PreconditionError) as refused:
        level_range(contract("high"), 5.0, low=0.02, high=0.5, key="dmd.score_range")
    assert str(refused.value) == (
        "dmd.score_range: [0.02, 0.5] given, but the high-noise expert is responsible for [0.583, 1]; expected a range "
        "that reaches into it"
    )
