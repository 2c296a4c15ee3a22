"""Processes, guidance, samplers and the matching gradient on Gaussian data: all are closed formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flcompress.diffusion import matching
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.matching import well_guided
from flcompress.diffusion.network import (
    PROMPT_MASK,
    beside,
    drop_captions,
    select,
    to_device,
    with_negative_prompt,
)
from flcompress.diffusion.process import shift
from flcompress.diffusion.sampling import guide, sample
from flcompress.diffusion.student import student_contract
from tests.fixtures.gaussian import (
    KINDS,
    PROMPT,
    Normal,
    as_predicted,
    coefficients,
    latents,
    moments,
    teacher_contract,
)

COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([0.8, -0.4], dtype=torch.float64)
DATA = Normal(MEAN, COVARIANCE)
WHITE = Normal(torch.zeros(2).double(), torch.eye(2).double())


def exact(kind: str, covariance: Tensor = COVARIANCE) -> Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]:
    """The network that predicts exactly for N(prompt, S)."""

    def network(x: Tensor, timestep: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        a, b = coefficients(kind, timestep)
        flat = x.flatten(1)
        x0 = Normal(given[PROMPT][:, 0], covariance).denoised(flat, a, b)
        return as_predicted(kind, flat, x0, a, b).reshape(x.shape)

    return network


def prompted(n: int, mean: Tensor = MEAN) -> dict[str, Tensor]:
    return {PROMPT: mean.expand(n, 1, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_noising_the_target_and_what_is_read_off_it(kind: str) -> None:
    """x = a x0 + b e with a and b of the stock scheduler; a network that knew x0 gives x0 back, by every process."""
    process = teacher_contract(kind).process
    n = 40
    x0, noise = latents(DATA.drawn(n, 0)), latents(WHITE.drawn(n, 1))
    level = (torch.arange(n).double() + 1.0) * 25 / 1000.0
    timestep = process.timestep(level)
    assert timestep.tolist() == pytest.approx([(one + 1) * 25 - (kind != "flow") for one in range(n)])
    a, b = (one.reshape(-1, 1, 1, 1, 1) for one in coefficients(kind, timestep))
    x = process.add_noise(x0, noise, level)
    torch.testing.assert_close(x, a * x0 + b * noise, rtol=1e-5, atol=1e-6)
    target = process.target(x0, noise, level)
    expected = {"flow": noise - x0, "v_prediction": a * noise - b * x0, "epsilon": noise}[kind]
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-6)
    if kind == "flow":
        torch.testing.assert_close(process.tweedie(x, target, level), x0, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(process.tweedie(x, target, level), x0, rtol=1e-4, atol=1e-4)
    # One step along the path of a known x0 and noise, to another level and to clean.
    for following in (level / 2.0, torch.zeros(n).double()):
        to = process.step(x, target, level, following)
        torch.testing.assert_close(to, process.add_noise(x0, noise, following), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(process.add_noise(x0, noise, torch.zeros(n)), x0)


def test_the_timestep_shift_by_hand() -> None:
    """k s / (1 + (k - 1) s): a half becomes three quarters at a shift of 3; both ends stay."""
    assert shift(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]
    assert shift(torch.tensor([0.25]), 1.0).tolist() == [0.25]


@pytest.mark.parametrize("kind", KINDS)
def test_tweedie_of_the_exact_network_is_the_posterior_mean(kind: str) -> None:
    process, n = teacher_contract(kind).process, 50
    level = (torch.arange(n).double() + 1.0) / n
    x = latents(WHITE.drawn(n, 2))
    timestep = process.timestep(level)
    a, b = coefficients(kind, timestep)
    found = process.tweedie(x, exact(kind)(x, timestep, prompted(n)), level)
    torch.testing.assert_close(found.flatten(1), DATA.denoised(x.flatten(1), a, b), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_the_weight_of_a_discrete_process_is_the_fall_of_its_signal_to_noise_ratio(kind: str) -> None:
    """-1/2 dSNR/dlevel over one timestep; it adds up to half the whole fall."""
    process = teacher_contract(kind).process
    level = torch.arange(1, 1001).double() / 1000.0
    a, b = coefficients(kind, torch.arange(1000))
    ratio = (a / b) ** 2
    weight = process.elbo_weight(level).double()
    torch.testing.assert_close(weight[1:], 500.0 * (ratio[:-1] - ratio[1:]), rtol=1e-3, atol=1e-2)
    assert weight[0] == weight[1]
    assert bool((weight > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_guided_scores(kind: str) -> None:
    """Guidance of predictions is guidance of denoised samples, and of Gaussians with one covariance of their means."""
    process, n = teacher_contract(kind).process, 30
    x, level = latents(WHITE.drawn(n, 3)), torch.full((n,), 0.4, dtype=torch.float64)
    timestep = process.timestep(level)
    a, b = coefficients(kind, timestep)
    u, c, pruned = (torch.tensor(one).double() for one in ([0.0, 1.0], [0.5, -0.5], [0.2, 0.3]))
    unconditional, conditional, without = (exact(kind)(x, timestep, prompted(n, one)) for one in (u, c, pruned))
    for made, mean in (
        (guide(unconditional, conditional, 2.5), u + 2.5 * (c - u)),
        (well_guided(unconditional, conditional, without, 2.5, 0.25), u + 2.5 * (c - u) + 0.25 * (c - pruned)),
    ):
        expected = Normal(mean, COVARIANCE).denoised(x.flatten(1), a, b)
        torch.testing.assert_close(process.tweedie(x, made, level).flatten(1), expected, rtol=1e-4, atol=1e-4)


def walked(kind: str, contract: SamplingContract, mean: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, covariance) that a sampler reaches from white noise with the exact network of N(mean, S), step by step."""
    unit = torch.eye(2).double()
    m, S = torch.zeros(2).double(), unit
    levels = [*coefficients_of(kind, contract), (1.0, 0.0)]
    for (a, b), (to_a, to_b) in pairwise(levels):
        gain = a * COVARIANCE @ torch.linalg.inv(a**2 * COVARIANCE + b**2 * unit)  # x0_hat = mean + gain (x - a mean)
        if contract.stochastic:
            m, S = mean + gain @ (m - a * mean), to_a**2 * gain @ S @ gain.T + to_b**2 * unit
            m = to_a * m
        else:
            # x' = a' x0_hat + b' (x - a x0_hat) / b
            step = (to_a - to_b * a / b) * gain + to_b / b * unit
            m = (to_a - to_b * a / b) * (mean - a * gain @ mean) + step @ m
            S = step @ S @ step.T
    return m, S


def coefficients_of(kind: str, contract: SamplingContract) -> list[tuple[float, float]]:
    a, b = coefficients(kind, torch.tensor(contract.timesteps).double())
    return list(zip(a.tolist(), b.tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_a_sampler_reaches(kind: str, few: bool, guidance: float) -> None:
    """The exact affine recursion of Euler, DDIM and re-noising; many steps reach the data."""
    contract = teacher_contract(kind, steps=40, guidance=guidance)
    if few:
        contract = student_contract(contract, 4)
    n = 4000
    noise = latents(WHITE.drawn(n, 4))
    negative = {PROMPT: torch.zeros(1, 1, 2).double()}
    mean = guidance * MEAN if contract.guidance_scale != 1.0 else MEAN
    calls: list[int] = []

    def counted(x: Tensor, timestep: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        calls.append(len(x))
        return exact(kind)(x, timestep, given)

    found = moments(sample(counted, contract, noise, prompted(n), negative, torch.Generator().manual_seed(0)))
    assert calls == [n] * contract.evaluations == [n] * contract.own_evaluations
    assert contract.evaluations == (4 if few else 40 * int(guidance))
    expected = walked(kind, contract, mean)
    # Noise that is drawn again is a sample; the rest follows from the start exactly.
    exactly = 0.08 if contract.stochastic else 2e-3
    torch.testing.assert_close(found, expected, atol=exactly, rtol=exactly)
    assert contract.stochastic == (few and kind == "flow")
    if not few:
        torch.testing.assert_close(found[0], mean, atol=0.1, rtol=0)  # what 40 steps leave
        torch.testing.assert_close(found[1], COVARIANCE, atol=0.1, rtol=0)


def test_a_contract_that_guides_needs_the_empty_prompt() -> None:
    contract = teacher_contract("flow", steps=2, guidance=2.0)
    with pytest.raises(ValueError, match="negative: None given"):
        sample(exact("flow"), contract, latents(WHITE.drawn(4, 0)), prompted(4))


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_matching_gradient_leads_from_the_fake_to_the_real(side: float) -> None:
    """A step against g moves a generator's samples towards the real score's mean, from either side of it."""
    real, fake = Normal(MEAN, COVARIANCE), Normal(MEAN + side * torch.tensor([1.0, 2.0]).double(), COVARIANCE)
    n = 200
    x = fake.drawn(n, 5)
    s = torch.full((n,), 0.5, dtype=torch.float64)
    noised = 0.5 * x + 0.5 * WHITE.drawn(n, 6)
    x_fake, x_real = (one.denoised(noised, 1.0 - s, s) for one in (fake, real))
    g = matching.gradient(latents(x), latents(x_fake), latents(x_real)).flatten(1).double()
    expected = (x_fake - x_real) / ((x - x_real).abs().mean(1, keepdim=True) + matching.EPSILON)
    torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-5)
    distance = fake.mean - MEAN
    assert float(g.mean(0) @ distance) > 0.0
    moved = x.float().clone().requires_grad_()
    matching.loss(moved, g.float()).backward()  # type: ignore[no-untyped-call]
    assert moved.grad is not None
    nearer = (x - 100.0 * moved.grad.double()).mean(0) - MEAN
    assert float(nearer.norm()) < float(distance.norm())


def test_the_matching_gradient_by_hand() -> None:
    """Two samples, each with a normaliser of its own; in fp32 whatever comes."""
    x, fake, real = torch.tensor(
        [[[2.0, 0.0], [0.0, 8.0]], [[3.0, 5.0], [1.0, 1.0]], [[1.0, 1.0], [2.0, 4.0]]], dtype=torch.float64
    ).unbind(0)
    g = matching.gradient(x, fake, real)
    assert g.dtype == torch.float32
    torch.testing.assert_close(g, torch.tensor([[2.0, 4.0], [-1.0 / 3.0, -1.0]]), rtol=1e-5, atol=0)
    assert matching.normaliser(x, real).tolist() == [1.0, 3.0]
    assert float(matching.loss(x, g)) == pytest.approx(0.5 * float(g.square().mean()))
    # Where generator and real score agree, the fake score's distance is divided by 1e-6, and keeps its sign.
    torch.testing.assert_close(matching.gradient(real, real + 0.5, real), torch.full((2, 2), 0.5e6))


def test_conditioning_is_taken_dropped_and_replaced_sample_by_sample() -> None:
    given: dict[str, Any] = {PROMPT: torch.arange(12.0).reshape(3, 2, 2), "first_frame": torch.arange(3.0)[:, None]}
    negative = {PROMPT: -torch.ones(1, 2, 2)}
    plain = with_negative_prompt(given, negative)
    assert torch.equal(plain[PROMPT], -torch.ones(3, 2, 2))
    assert torch.equal(plain["first_frame"], given["first_frame"])
    where = torch.tensor([True, False, True])
    some = drop_captions(given, {PROMPT: negative[PROMPT].double()}, where)
    assert torch.equal(some[PROMPT][where], -torch.ones(2, 2, 2))
    assert torch.equal(some[PROMPT][1], given[PROMPT][1])
    assert some[PROMPT].dtype == torch.float32
    assert torch.equal(some["first_frame"], given["first_frame"])
    assert torch.equal(
        drop_captions({"mask": torch.ones(3)}, {"mask": torch.zeros(1)}, where)["mask"], (~where).float()
    )
    assert torch.equal(select(given, slice(1, 3))[PROMPT], given[PROMPT][1:])
    assert torch.equal(select(given, torch.tensor([2, 0]))["first_frame"], torch.tensor([[2.0], [0.0]]))
    assert to_device(given, "meta")[PROMPT].device.type == "meta"
    assert to_device(given, "cpu").keys() == given.keys()
    # A network reads lengths of prompts from the mask without waiting for the device.
    masked = to_device(given | {PROMPT_MASK: torch.ones(3, 2)}, "meta")
    assert masked[PROMPT_MASK].device.type == "cpu"
    assert beside(torch.empty(0, device="meta"), masked)[PROMPT_MASK].device.type == "meta"
