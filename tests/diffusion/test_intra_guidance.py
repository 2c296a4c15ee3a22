"""Sampling with guidance away from a weaker model."""

from __future__ import annotations

import torch

from flcompress.diffusion.contract import contract_of
from flcompress.diffusion.matching import well_guided
from flcompress.diffusion.network import Conditioning
from flcompress.diffusion.sampling import IntraGuidance, sample

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}


def strong(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    return x * conditioning["prompt"].reshape(-1, 1, 1, 1, 1)


def weak(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    return 0.25 * strong(x, timestep, conditioning)


def test_one_step_is_the_well_guided_teachers() -> None:
    """x_1 = x - (u + b1 (c - u) + b2 (c - c_weak)), as distribution matching guides; b2 = 0 changes nothing."""
    contract = contract_of(SCHEDULER, num_inference_steps=1, guidance_scale=3.0, max_sequence_length=4)
    noise = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts, negative = {"prompt": torch.tensor([0.5, 2.0])}, {"prompt": torch.tensor([-1.0])}
    expected = well_guided(
        -noise,
        strong(noise, noise, prompts),
        weak(noise, noise, prompts),
        3.0,
        0.5,
    )
    moved = sample(strong, contract, noise, prompts, negative, intra=IntraGuidance(weak, 0.5))
    torch.testing.assert_close(moved, noise - expected, rtol=1e-12, atol=1e-12)
    plain = sample(strong, contract, noise, prompts, negative)
    assert torch.equal(sample(strong, contract, noise, prompts, negative, intra=IntraGuidance(weak, 0.0)), plain)
