"""Backward simulation against the exact chain of a student that is affine at each of its levels."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flcompress.diffusion.contract import contract_of
from flcompress.diffusion.experts import Experts
from flcompress.diffusion.student import student_contract
from flcompress.training.distillation.simulation import Simulation
from tests.fixtures.gaussian import (
    COVARIANCE,
    KINDS,
    LATENTS,
    PROMPT,
    SHIFTS,
    Clips,
    Exact,
    Normal,
    as_predicted,
    coefficients,
    draws,
    graph_of,
    moments,
    program_of,
    teacher_contract,
)

CAPTION = torch.tensor([[[0.5, -0.5]]])


class Steps:
    """A student that gives x0 = A x + c at each of its levels, and keeps what it was called with."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.calls: list[tuple[Tensor, Tensor, bool]] = []
        self.weight = torch.tensor([[0.7, 0.2], [-0.1, 0.5]], requires_grad=True)
        self.bias = torch.tensor([0.4, -0.8])

    def __call__(self, x: Tensor, timestep: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        flat = x.flatten(1)
        a, b = (one.float() for one in coefficients(self.kind, timestep))
        found = as_predicted(self.kind, flat, flat @ self.weight.T + self.bias, a, b).reshape(x.shape)
        self.calls.append((x.detach().clone(), timestep, found.requires_grad))
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_backward_simulation_reaches_each_level_from_the_last_one(kind: str) -> None:
    """Exactly: x' = a' x0 + b' e with x0 = A x + c of the level before; fresh noise of a flow, DDIM's own of others."""
    teacher = teacher_contract(kind)
    contract = student_contract(teacher, 4)
    clips: Any = Clips(Normal(torch.zeros(2).double(), COVARIANCE), CAPTION)
    program = program_of(teacher, graph_of(Exact(kind, COVARIANCE, SHIFTS)))
    simulation = Simulation(program, contract, clips, clips.negative, "cpu")
    reached: dict[int, int] = {}
    for number in range(24):
        student = Steps(kind)
        start = simulation.draw(draws(number))
        x0, given = simulation.sample(student, start, grad=True), start.conditioning
        last = len(student.calls) - 1
        reached[last] = reached.get(last, 0) + 1
        assert [float(timestep[0]) for _, timestep, _ in student.calls] == list(contract.timesteps[: last + 1])
        assert [graded for *_, graded in student.calls] == [False] * last + [True]
        assert torch.equal(given[PROMPT], clips.given(64)[PROMPT])
        # From standard normal noise, by the student's own predictions.
        assert torch.equal(student.calls[0][0], draws(number).normal(*LATENTS))
        again = draws(number)
        again.normal(*LATENTS)
        for (x, timestep, _), (following, next_step, _) in pairwise(student.calls):
            clean = predicted(student, x)
            a, b = (one.float()[:, None] for one in coefficients(kind, timestep))
            a_next, b_next = (one.float()[:, None] for one in coefficients(kind, next_step))
            noise = again.normal(*LATENTS).flatten(1) if kind == "flow" else (x.flatten(1) - a * clean) / b
            torch.testing.assert_close(following.flatten(1), a_next * clean + b_next * noise, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x0.flatten(1), predicted(student, student.calls[-1][0]), rtol=1e-3, atol=1e-3)
        (slope,) = torch.autograd.grad(x0.sum(), student.weight)
        expected = student.calls[-1][0].flatten(1).sum(0).expand(2, 2)
        torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-2)
    assert sorted(reached) == [0, 1, 2, 3]


def predicted(student: Steps, x: Tensor) -> Tensor:
    return (x.flatten(1) @ student.weight.T + student.bias).detach()


def test_the_distribution_at_each_of_the_students_levels() -> None:
    """x0 ~ N(c, A A') from pure noise; at the next level x ~ N((1 - s) m, (1 - s)^2 S + s^2), and so on."""
    teacher = teacher_contract("flow")
    contract = student_contract(teacher, 3)
    clips: Any = Clips(Normal(torch.zeros(2).double(), COVARIANCE), CAPTION)
    program = program_of(teacher, graph_of(Exact("flow", COVARIANCE, SHIFTS)))
    simulation = Simulation(program, contract, clips, clips.negative, "cpu")
    weight = torch.tensor([[0.7, 0.2], [-0.1, 0.5]], dtype=torch.float64)
    bias, unit = torch.tensor([0.4, -0.8], dtype=torch.float64), torch.eye(2).double()
    mean, covariance = bias, weight @ weight.T
    expected = [(mean, covariance)]
    for sigma in contract.sigmas[1:]:
        mean = weight @ ((1 - sigma) * mean) + bias
        covariance = weight @ ((1 - sigma) ** 2 * covariance + sigma**2 * unit) @ weight.T
        expected.append((mean, covariance))
    seen = set()
    for number in range(12):
        student = Steps("flow")
        x0 = simulation.sample(student, simulation.draw(draws(number, batch=1500)), grad=False)
        assert not x0.requires_grad
        level = len(student.calls) - 1
        found = moments(x0)
        seen.add(level)
        torch.testing.assert_close(found, expected[level], atol=0.09, rtol=0)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("compressed", ["high", "low"])
def test_of_two_experts_each_makes_its_own_steps(compressed: Any) -> None:
    """A low-noise student starts where its partner ends; a high-noise one is never asked below the boundary."""
    experts = Experts(boundary_ratio=0.8, compressed=compressed, guidance_scale=1.0)
    teacher = contract_of(
        {"shift": 3.0}, num_inference_steps=50, guidance_scale=1.0, max_sequence_length=1, experts=experts
    )
    contract = student_contract(teacher, 4)
    boundary = sum(timestep >= 800.0 for timestep in contract.timesteps)
    clips: Any = Clips(Normal(torch.zeros(2).double(), COVARIANCE), CAPTION)
    program = program_of(teacher, graph_of(Exact("flow", COVARIANCE, SHIFTS)))
    partner, lengths = Steps("flow"), set()
    simulation = Simulation(program, contract, clips, clips.negative, "cpu", partner if compressed == "low" else None)
    for number in range(16):
        student = Steps("flow")
        partner.calls.clear()
        simulation.sample(student, simulation.draw(draws(number, batch=2)), grad=False)
        lengths.add(len(student.calls))
        first = boundary if compressed == "low" else 0
        assert len(partner.calls) == first
        told = [float(timestep[0]) for _, timestep, _ in (*partner.calls, *student.calls)]
        assert told == list(contract.timesteps[: first + len(student.calls)])
        assert all((timestep >= 800.0) == (compressed == "high") for timestep in told[first:])
    assert lengths == set(range(1, 1 + (4 - boundary if compressed == "low" else boundary)))
