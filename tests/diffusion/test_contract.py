from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flcompress.diffusion.contract import SamplingContract, contract_of
from flcompress.diffusion.sampling import sample
from flcompress.diffusion.student import student_contract
from flcompress.errors import ModelError


def teacher(steps: int = 50, shift: float = 3.0) -> SamplingContract:
    return contract_of({"shift": shift}, num_inference_steps=steps, guidance_scale=4.0, max_sequence_length=16)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_student_levels_are_even_fractions_under_the_teachers_shift(steps: int, shift: float) -> None:
    wanted = [(steps - i) / steps for i in range(steps)]
    wanted = [shift * s / (1 + (shift - 1) * s) for s in wanted]
    assert student_contract(teacher(shift=shift), steps).sigmas == pytest.approx(wanted, abs=3e-3)


def test_a_stock_scheduler_with_the_saved_configuration_has_exactly_the_contracts_levels() -> None:
    contract = student_contract(teacher(), 4)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(contract.scheduler))
    scheduler.set_timesteps(4)
    assert tuple(scheduler.sigmas[:-1].tolist()) == contract.sigmas
    assert tuple(scheduler.timesteps.tolist()) == contract.timesteps
    assert scheduler.config.stochastic_sampling


def test_a_contract_survives_its_dictionary() -> None:
    contract = student_contract(teacher(), 4)
    assert SamplingContract.from_dict(contract.to_dict()) == contract


def test_evaluations_count_guidance_twice() -> None:
    assert teacher().evaluations == 100
    assert student_contract(teacher(), 4).evaluations == 4


def test_another_scheduler_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="scheduler: DDIMScheduler given, expected FlowMatchEulerDiscreteScheduler"):
        contract_of({"_class_name": "DDIMScheduler"}, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=16)


def test_euler_sampling_of_a_known_flow_equals_the_stock_schedulers() -> None:
    contract = contract_of({"shift": 3.0}, num_inference_steps=7, guidance_scale=1.0, max_sequence_length=4)
    noise = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    target = torch.full_like(noise, 0.3)

    def network(x: torch.Tensor, t: torch.Tensor, given: object) -> torch.Tensor:
        return (x - target) / (t / 1000.0).reshape(-1, 1, 1, 1, 1)

    ours = sample(network, contract, noise, {})
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2), noise), t, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x)
    torch.testing.assert_close(ours, target, atol=1e-5, rtol=1e-5)


def test_a_flow_solvers_shift_is_the_contracts() -> None:
    config = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for given, expected in (({"flow_shift": 5.0}, 5.0), ({}, 1.0)):
        contract = contract_of(
            {**config, **given}, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=16
        )  # fmt: skip
        assert contract.shift == expected
