"""What roles are made of, against closed formulas: guided teacher, levels, averages, adversarial terms, ELBO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flcompress.core.optimisation import Optimisation
from flcompress.distributed.world import World
from flcompress.draws import Draws
from flcompress.models.network import as_network
from flcompress.training.distillation.guided_teacher import GuidedTeacher
from flcompress.training.engines import Hyper
from flcompress.training.engines.replicated import Local
from flcompress.training.objectives import denoising_loss, draw_levels
from flcompress.training.role import TrainedRole
from flcompress.training.watching.held_out import HeldOutELBO
from tests.fixtures.gaussian import (
    COVARIANCE,
    KINDS,
    LATENTS,
    PROMPT,
    SHIFTS,
    Clips,
    Exact,
    Normal,
    Stand,
    as_predicted,
    coefficients,
    draws,
    graph_of,
    latents,
    teacher_contract,
    work_in,
)

CAPTION = torch.tensor([[[0.5, -0.5]]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [False, True])
def test_the_guided_teacher_is_its_formula(tmp_path: Path, kind: str, splits: bool) -> None:
    """u + b1 (c - u) + b2 (c - c_pruned), with b1 and b2 of each sample drawn evenly from their ranges."""
    model = Exact(kind, COVARIANCE, SHIFTS)
    engine = Stand(work_in(tmp_path), {})
    engine.splits_weights = splits
    teacher = GuidedTeacher(
        engine, model, as_network(model), graph_of(model), ["blocks.1"], inter_cfg=(2.0, 3.0), intra_cfg=(0.2, 0.6),
        negative={PROMPT: torch.zeros(1, 1, 2)},
    )  # fmt: skip
    n = 64
    x = torch.randn(n, *LATENTS, generator=torch.Generator().manual_seed(0))
    timestep = torch.linspace(50, 950, n).round()
    scales = teacher.draw(draws(batch=n))
    found = teacher(x, timestep, {PROMPT: CAPTION.expand(n, 1, 2)}, scales).flatten(1).double()
    a, b = coefficients(kind, timestep)
    flat = x.flatten(1).double()
    full = torch.tensor(SHIFTS).sum(0)
    u, c, pruned = (
        as_predicted(kind, flat, Normal(mean.double(), COVARIANCE).denoised(flat, a, b), a, b)
        for mean in (full, full + CAPTION[0, 0], torch.tensor(SHIFTS[0]) + CAPTION[0, 0])
    )
    # Two numbers a sample give its two scales.
    scales = torch.linalg.solve(torch.stack([c - u, c - pruned], dim=2), (found - u)[..., None])[..., 0]
    inter, intra = scales.unbind(1)
    for drawn, low, high in ((inter, 2.0, 3.0), (intra, 0.2, 0.6)):
        assert low - 0.02 < float(drawn.min()) < low + 0.1 * (high - low) + 0.02
        assert high + 0.02 > float(drawn.max()) > high - 0.1 * (high - low) - 0.02
        assert float(drawn.mean()) == pytest.approx((low + high) / 2, abs=0.15 * (high - low))
    assert abs(float(torch.corrcoef(scales.T)[0, 1])) < 0.3


def test_a_teacher_without_guidance_is_called_once(tmp_path: Path) -> None:
    """b1 = 1 and b2 = 0 cost no forward of their own."""
    model = Exact("flow", COVARIANCE, SHIFTS)
    calls: list[int] = []
    network = as_network(model)

    def counted(x: Tensor, timestep: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        calls.append(len(x))
        return network(x, timestep, given)

    x, timestep = torch.randn(4, *LATENTS), torch.full((4,), 500.0)
    given = {PROMPT: CAPTION.expand(4, 1, 2)}
    for inter, intra, count in (((1.0, 1.0), (0.0, 0.0), 1), ((2.0, 2.0), (0.0, 0.0), 2), ((1.0, 1.0), (0.5, 0.5), 2)):
        calls.clear()
        teacher = GuidedTeacher(
            Stand(work_in(tmp_path), {}), model, counted, graph_of(model), ["blocks.1"], inter_cfg=inter,
            intra_cfg=intra, negative={PROMPT: torch.zeros(1, 1, 2)},
        )  # fmt: skip
        found = teacher(x, timestep, given, teacher.draw(draws(batch=4)))
        assert len(calls) == count
        assert not found.requires_grad
        if count == 1:
            torch.testing.assert_close(found, network(x, timestep, given), rtol=0, atol=1e-6)


@pytest.mark.parametrize("by", [1.0, 3.0, 7.0])
def test_drawn_levels_follow_the_shifted_uniform(by: float) -> None:
    """P(level < s) = u(s) = s / (k - (k - 1) s), to within one sample of a batch, whichever processes share it."""
    n = 500
    level = draw_levels(draws(batch=n), by, low=0.1, high=0.9).double().sort().values
    cumulated = (level / (by - (by - 1.0) * level) - 0.1) / 0.8
    assert float((cumulated - (torch.arange(n) + 0.5) / n).abs().max()) <= 0.5 / n + 1e-6
    parts = [
        draw_levels(Draws(0, "training", 1, batch=n, rank=rank, processes=2), by, low=0.1, high=0.9) for rank in (0, 1)
    ]
    assert torch.equal(torch.cat(parts), draw_levels(draws(batch=n), by, low=0.1, high=0.9))
    u = draw_levels(draws(batch=n), 1.0)
    assert 0.0 <= float(u.min()) < 1.0 / n
    assert 1.0 > float(u.max()) > 1.0 - 1.0 / n


@pytest.mark.parametrize("kind", KINDS)
def test_no_network_has_a_lower_denoising_loss_than_the_exact_one(kind: str) -> None:
    """Its loss is the variance that the sample does not explain; another's is that and its squared distance."""
    process = teacher_contract(kind).process
    normal, n = Normal(torch.tensor([0.5, -1.0]).double(), COVARIANCE), 4000
    x0 = latents(normal.drawn(n, 0))
    noise = latents(Normal(torch.zeros(2).double(), torch.eye(2).double()).drawn(n, 1))
    level = torch.full((n,), 0.5, dtype=torch.float64)

    def exact(off: float) -> Any:
        def call(x: Tensor, timestep: Tensor, given: object) -> Tensor:
            a, b = coefficients(kind, timestep)
            flat = x.flatten(1)
            return as_predicted(kind, flat, normal.denoised(flat, a, b), a, b).reshape(x.shape) + off

        return call

    a, b = (float(one) for one in coefficients(kind, process.timestep(level[:1])))
    # The posterior's covariance; what is predicted is a multiple of x0, given the sample.
    posterior = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + (a / b) ** 2 * torch.eye(2).double())
    factor = {"flow": 1.0 + a / b, "v_prediction": b + a * a / b, "epsilon": a / b}[kind]
    least = factor**2 * float(posterior.diagonal().mean())
    assert float(denoising_loss(exact(0.0), process, x0, {}, level, noise)) == pytest.approx(least, rel=0.05)
    for off in (0.3, -0.3):
        found = float(denoising_loss(exact(off), process, x0, {}, level, noise))
        assert found == pytest.approx(least + off**2, rel=0.06)


class Two(nn.Module):
    """One trained number, one that is not, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.held = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([7.0]), requires_grad=False)
        self.register_buffer("table", torch.tensor([5.0]))

    def forward(self) -> Tensor:
        return self.free.sum()


def free_of(role: TrainedRole) -> float:
    return float(role.model.free.detach())


def test_the_moving_average(tmp_path: Path) -> None:
    """e <- d e + (1 - d) p with d = min(decay, (1 + n) / (10 + n)), from the weights as they were given."""
    role = TrainedRole(Local(work_in(tmp_path)), "one", Two(), batch=1, hyper=Hyper(learning_rate=0.5), ema_decay=0.3)
    expected = 2.0
    assert float(role.averaged_state()["free"]) == 2.0
    for number in range(1, 6):
        role.update(draws(batch=1), lambda draws: role.module().square())
        live = free_of(role)
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * live
        state = role.averaged_state()
        assert float(state["free"]) == pytest.approx(expected, rel=1e-6)
        assert (float(state["held"]), float(state["table"])) == (7.0, 5.0)
        assert free_of(role) == live == float(role.full_state()["free"])
        with role.with_average():
            assert free_of(role) == pytest.approx(expected, rel=1e-6)
        assert role.updates == number
    assert expected != pytest.approx(live, abs=1e-3)


def test_steps_follow_the_gradient_at_the_rate_of_the_schedule(tmp_path: Path) -> None:
    """AdamW's first steps are as long as the rate, whatever the gradient, and lead downhill."""
    rates = (1.0, 0.5, 0.0)
    role = TrainedRole(
        Local(work_in(tmp_path)), "one", Two(), batch=1, hyper=Hyper(learning_rate=0.1), schedule=rates.__getitem__
    )
    for rate in rates:
        before = free_of(role)
        figures = role.update(draws(batch=1), lambda draws: 3.0 * role.module())
        assert before - free_of(role) == pytest.approx(0.1 * rate, rel=1e-4)
        assert figures == {"one_loss": pytest.approx(3.0 * before), "one_grad_norm": pytest.approx(3.0)}
    assert float(role.model.held) == 7.0
    role.module().backward()
    role.clear()
    assert role.model.free.grad is None


def test_a_moving_average_that_begins_later(tmp_path: Path) -> None:
    """Until its start it is the weights; then e <- d e + (1 - d) p, d warming up with the averaged updates alone."""
    role = TrainedRole(
        Local(work_in(tmp_path)), "one", Two(), batch=1, hyper=Hyper(learning_rate=0.5), ema_decay=0.3, ema_start=3
    )
    expected = 2.0
    for number in range(1, 7):
        role.update(draws(batch=1), lambda draws: role.module().square())
        live, averaged = free_of(role), number - 3
        if averaged > 0:
            decay = min(0.3, (1 + averaged) / (10 + averaged))
            expected = decay * expected + (1 - decay) * live
        else:
            expected = live
        assert float(role.averaged_state()["free"]) == pytest.approx(expected, rel=1e-6)
        if averaged <= 0:
            assert float(role.averaged_state()["free"]) == live
    assert expected != pytest.approx(live, abs=1e-3)


def test_a_role_of_a_passs_arguments(tmp_path: Path) -> None:
    """Rate, schedule, weight decay, clipping, betas and average are the pass's; a critic may have several updates."""
    settings = Optimisation(
        steps=2, batch=1, learning_rate=0.1, schedule="linear", final_ratio=0.5, weight_decay=0.25, betas=(0.0, 0.5)
    )
    role = TrainedRole.of(Local(work_in(tmp_path)), "one", Two(), settings, learning_rate=0.2, updates=2)
    for rate in (0.2, 0.2, 0.15, 0.15):  # a factor of 1, then of 0.75, for two updates each
        before = free_of(role)
        role.update(draws(batch=1), lambda draws: 3.0 * role.module())
        # Without momentum every step on the same gradient is as long as the rate; decay comes first.
        assert free_of(role) == pytest.approx(before * (1.0 - 0.25 * rate) - rate, rel=1e-6)
    assert role.averaged_state()["free"] == role.full_state()["free"]
    assert not any("/ema." in key for key in role.parts())
    averaged = settings.model_copy(update={"ema_decay": 0.9})
    assert "one/ema.free" in TrainedRole.of(Local(work_in(tmp_path)), "one", Two(), averaged).parts()
    assert "one/ema.free" not in TrainedRole.of(Local(work_in(tmp_path)), "one", Two(), averaged, ema_decay=0.0).parts()


def test_gradients_are_scaled_down_to_the_norm_that_the_pass_names(tmp_path: Path) -> None:
    """By AdamW with betas of 0 and an epsilon far below the gradient, only the moments tell: v is the clipped g^2."""
    settings = Optimisation(steps=1, batch=1, clip_grad_norm=0.5, betas=(0.0, 0.0))
    role = TrainedRole.of(Local(work_in(tmp_path)), "one", Two(), settings)
    figures = role.update(draws(batch=1), lambda draws: 3.0 * role.module())
    assert figures["one_grad_norm"] == pytest.approx(3.0)
    assert float(role.parts()["one/optimizer.exp_avg_sq.free"].tensor) == pytest.approx(0.25, rel=1e-5)


class Share(World):
    """One of two processes; keeps what it would have averaged with the other."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)
        self.given: Mapping[str, float] = {}

    def all_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        self.given = values
        return dict(values)


@pytest.mark.parametrize("kind", ["flow", "v_prediction"])
def test_the_held_out_elbo(kind: str) -> None:
    """The mean of w(s) |x0 - x0_hat|^2 per element, at levels spread evenly over [0.02, 0.98]; shared by processes."""
    contract = teacher_contract(kind)
    clips: Any = Clips(Normal(torch.tensor([0.5, 1.0]).double(), COVARIANCE), CAPTION)
    seen: list[tuple[Tensor, Tensor]] = []

    def nothing(x: Tensor, timestep: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        assert torch.equal(given[PROMPT], clips.given(len(x))[PROMPT])
        seen.append((x.flatten(1), timestep))
        return torch.zeros_like(x)

    scored = HeldOutELBO(clips, contract, 9, 3, "cpu", 4, World())(nothing)
    found = scored.loss
    assert [len(x) for x, _ in seen] == [4, 4, 1]
    x0 = clips.batch(9, torch.Generator().manual_seed(3))[0].flatten(1)
    x, timestep = (torch.cat(parts) for parts in zip(*seen, strict=True))
    level = 0.02 + 0.96 * (torch.arange(9.0) + 0.5) / 9
    torch.testing.assert_close(timestep, contract.process.timestep(level))
    a, b = (one[:, None] for one in coefficients(kind, timestep))
    noise = (x - a * x0) / b
    assert float(noise.std()) == pytest.approx(1.0, abs=0.4)
    assert abs(float(noise.mean())) < 0.5
    x0_hat = x if kind == "flow" else a * x
    expected = contract.process.elbo_weight(level) * (x0 - x0_hat).square().mean(1)
    assert found == pytest.approx(float(expected.mean()), rel=1e-5)
    assert scored.groups == pytest.approx([float(expected[group::8].mean()) for group in range(8)], rel=1e-5)
    # Two processes have as many draws each; the one too many is not counted.
    worlds = Share(0), Share(1)
    seen.clear()
    for world in worlds:
        HeldOutELBO(clips, contract, 9, 3, "cpu", 4, world)(nothing)
    assert [len(x) for x, _ in seen] == [4, 1, 4, 1]
    total, draws = (sum(world.given[name] for world in worlds) for name in ("total", "draws"))
    assert draws == 9.0
    assert total / draws == pytest.approx(found, rel=1e-6)
    assert HeldOutELBO(clips, contract, 9, 4, "cpu", 4, World())(nothing).loss != found
