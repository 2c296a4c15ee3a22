from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flcompress.diffusion import matching
from flcompress.diffusion.contract import from_conditional_convention
from flcompress.diffusion.process import FLOW, shift
from flcompress.diffusion.sampling import guide

levels = st.floats(0.01, 0.99)


@given(levels, st.integers(0, 2**31))
def test_tweedie_inverts_noising_with_the_true_velocity(sigma: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 4, generator=draw).double(), torch.randn(2, 3, 4, generator=draw).double()
    s = torch.full((2,), sigma, dtype=torch.float64)
    x = FLOW.add_noise(x0, noise, s)
    torch.testing.assert_close(FLOW.tweedie(x, FLOW.target(x0, noise, s), s), x0)


@given(levels, st.floats(0.2, 8.0), st.floats(0.2, 8.0))
def test_shifts_compose_by_multiplying(sigma: float, a: float, b: float) -> None:
    s = torch.tensor([sigma], dtype=torch.float64)
    torch.testing.assert_close(shift(shift(s, a), b), shift(s, a * b))


@given(st.floats(0.05, 0.95))
def test_elbo_weight_is_half_the_slope_of_the_signal_to_noise_ratio(sigma: float) -> None:
    s = torch.tensor([sigma], dtype=torch.float64, requires_grad=True)
    snr = ((1 - s) / s) ** 2
    (slope,) = torch.autograd.grad(snr.sum(), s)
    torch.testing.assert_close(FLOW.elbo_weight(s.detach()), -0.5 * slope)


def test_guidance_of_one_is_the_conditional() -> None:
    u, c = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guide(u, c, 1.0), c)
    assert from_conditional_convention(3.5) == 4.5


def test_well_guided_without_intra_is_plain_guidance() -> None:
    u, c, p = torch.randn(3, 2, 4).unbind(0)
    torch.testing.assert_close(matching.well_guided(u, c, p, 3.0, 0.0), guide(u, c, 3.0))
    torch.testing.assert_close(matching.well_guided(u, c, p, 3.0, 0.5), guide(u, c, 3.0) + 0.5 * (c - p))


def test_the_gradient_of_the_matching_loss_is_g() -> None:
    x = torch.randn(2, 5, requires_grad=True)
    fake, real = torch.randn(2, 5), torch.randn(2, 5)
    g = matching.gradient(x.detach(), fake, real)
    matching.loss(x, g).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.numel(), g)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_gradient_does_not_grow_with_the_scale_of_the_latents(scale: float) -> None:
    x, fake, real = torch.randn(3, 2, 50).unbind(0)
    torch.testing.assert_close(
        matching.gradient(x * scale, fake * scale, real * scale), matching.gradient(x, fake, real), rtol=1e-4, atol=1e-4
    )
