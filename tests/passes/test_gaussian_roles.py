"""The roles of distribution matching on Gaussian data, each against its closed formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flcompress.draws import Draws
from flcompress.training.distillation.roles import Roles
from tests.fixtures.gaussian import COVARIANCE, SIZE, Clips, Normal, coefficients, moments
from tests.passes.test_gaussian_students import ABOVE, BELOW, CAPTION, PRUNED, TEACHER, roles_of

BATCH = 32


class Calls:
    """What a model was called with, and what it gave."""

    def __init__(self, model: Any) -> None:
        self.x: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.graded: list[bool] = []
        model.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: Any, kwargs: Mapping[str, Tensor], output: tuple[Tensor]) -> None:
        self.x.append(kwargs["hidden_states"].detach().clone())
        self.timesteps.append(kwargs["timestep"].clone())
        self.outputs.append(output[0].detach().clone())
        self.graded.append(output[0].requires_grad)


def draws(number: int = 1, batch: int = BATCH) -> Draws:
    return Draws(0, "known", number, batch=batch)


def model_of(roles: Roles, name: str, which: str) -> Any:
    """The last or first model that the engine loaded by a name: the teacher, or the fake score."""
    found: Any = {"teacher": roles.teacher, "generator": roles.generator.model, "fake": roles.trained[1].model}[which]
    return getattr(found, name) if name else found


@pytest.mark.parametrize("kind", ["flow", "v_prediction", "epsilon"])
def test_the_critic_ends_at_the_generators_own_distribution(tmp_path: Path, kind: str) -> None:
    """Its fixed point is the exact score of what the generator gives, not of the data, at all of the noise."""
    roles, *_ = roles_of(tmp_path, kind, BELOW, critic_learning_rate=0.05)
    fake, means, covariances = roles.trained[1].model, [], []
    for number in range(100):
        roles.update_critic(draws(number, batch=64))
        if number >= 50:  # its steps do not die down: their mean is at the fixed point
            means.append(mean_of(fake))
            covariances.append(fake.covariance.detach().double())
    scale, mean = BELOW
    torch.testing.assert_close(torch.stack(means).mean(0), torch.tensor(mean).double(), atol=0.05, rtol=0)
    expected = scale**2 * torch.eye(SIZE).double()
    torch.testing.assert_close(torch.stack(covariances).mean(0), expected, atol=0.03, rtol=0)
    assert all(map(torch.equal, roles.generator.model.parameters(), before(BELOW)))


def mean_of(model: Any) -> Tensor:
    """What an `Exact` takes for the data's mean under the prompt, fp64."""
    mean: Tensor = CAPTION[0, 0] + sum(block.by.detach() for block in model.blocks)
    return mean.double()


def before(start: tuple[float, tuple[float, float]]) -> list[Tensor]:
    return [start[0] * torch.eye(SIZE), torch.tensor(start[1])]


@pytest.mark.parametrize("update", ["critic", "generator"])
def test_levels_are_spread_evenly_over_the_score_range_and_then_shifted(tmp_path: Path, update: str) -> None:
    """Unshifted they lie one in each of as many strata of [0.1, 0.8] as there are samples: F(s) is exact to 1 / n."""
    roles, *_ = roles_of(tmp_path, "flow", BELOW, score_range=(0.1, 0.8))
    fake, teacher = Calls(roles.trained[1].model), Calls(roles.teacher)
    getattr(roles, f"update_{update}")(draws())
    seen = [fake, teacher] if update == "generator" else [fake]
    for calls in seen:
        (timesteps,) = calls.timesteps
        level = timesteps.double() / 1000.0
        unshifted = level / (3.0 - 2.0 * level)
        places = (unshifted - 0.1) / 0.7 * BATCH
        assert sorted(places.floor().long().tolist()) == list(range(BATCH))
        assert places.floor().long().tolist() != list(range(BATCH))
    if update == "generator":
        assert torch.equal(fake.timesteps[0], teacher.timesteps[0])
        assert torch.equal(fake.x[0], teacher.x[0])


def test_what_the_critic_meets_has_the_noise_of_its_level(tmp_path: Path) -> None:
    """Of a generator that gives a constant: (x_s - (1 - s) c) / s is standard normal, and the target is that less c."""
    roles, *_ = roles_of(tmp_path, "flow", (0.0, (0.5, -0.25)))
    calls, losses = Calls(roles.trained[1].model), spied(roles, 1)
    roles.update_critic(draws(batch=512))
    s = (calls.timesteps[0] / 1000.0).reshape(-1, 1, 1, 1, 1)
    constant = torch.tensor([0.5, -0.25]).reshape(1, 1, 2, 1, 1)
    noise = (calls.x[0] - (1.0 - s) * constant) / s
    mean, covariance = moments(noise)
    torch.testing.assert_close(mean, torch.zeros(2).double(), atol=0.15, rtol=0)
    torch.testing.assert_close(covariance, torch.eye(2).double(), atol=0.2, rtol=0)
    expected = (calls.outputs[0] - (noise - constant)).square().mean()
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-5)


def spied(roles: Roles, place: int) -> list[Tensor]:
    """The losses that a role is given from now on."""
    losses: list[Tensor] = []
    role = roles.trained[place]
    backward = role._backward

    def keep(loss: Tensor, part: Draws) -> None:
        losses.append(loss.detach().clone())
        backward(loss, part)

    role._backward = keep  # type: ignore[method-assign]
    return losses


def gradients(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Those of the generator just before its next step, filled in by that step."""
    found: dict[str, Tensor] = {}
    step = roles.generator._step

    def keep(loss: float) -> dict[str, float]:
        found.update({name: one.grad.clone() for name, one in roles.generator.model.named_parameters()})
        return step(loss)

    monkeypatch.setattr(roles.generator, "_step", keep)
    return found


@pytest.mark.parametrize("kind", ["flow", "v_prediction", "epsilon"])
@pytest.mark.parametrize("gan", [0.0, 0.5])
def test_the_generators_gradient(tmp_path: Path, kind: str, gan: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """g = (x_fake - x_real) / mean|x_g - x_real| back through x_g, and the adversarial term's through the teacher."""
    roles, *_ = roles_of(tmp_path, kind, ABOVE, gan_weight=gan, inter_cfg=(2.0, 2.0), intra_cfg=(0.5, 0.5))
    roles.generator.updates = 10  # the tenth of the steps in which the term's weight rises is over
    fake: Any = roles.trained[1].model
    with torch.no_grad():  # elsewhere than the teacher
        fake.factor.mul_(1.3)
        fake.blocks[0].by.add_(0.3)
    generated, met = Calls(roles.generator.model), Calls(fake)
    found = gradients(roles, monkeypatch)
    logged = roles.update_generator(draws())
    # What the student's one level gave: x0 = A e + c of the noise that it met.
    noise = generated.x[0].flatten(1).double()
    weight, bias = (one.detach().double().requires_grad_() for one in before(ABOVE))
    x = noise @ weight.T + bias
    noised, timestep = met.x[0].flatten(1).double(), met.timesteps[0]
    a, b = (one[:, None] for one in coefficients(kind, timestep))
    scored = Normal(
        mean_of(fake),
        (fake.factor @ fake.factor.T).detach().double(),
    )
    x_fake = scored.denoised(noised, a[:, 0], b[:, 0])
    unprompted, full, pruned = (
        Normal(mean.double(), COVARIANCE).denoised(noised, a[:, 0], b[:, 0])
        for mean in (TEACHER - CAPTION[0, 0], TEACHER, PRUNED)
    )
    x_real = unprompted + 2.0 * (full - unprompted) + 0.5 * (full - pruned)
    scale = (x - x_real).abs().mean(1, keepdim=True).detach()
    gap = ((x_fake - x_real) / scale).detach()
    loss, value = (x * gap).mean(), 0.5 * gap.square().mean()
    if gan:
        added = (noised - a * x).detach() + a * x  # the noise is the same, whatever x
        adversarial = gan * F.softplus(-logits_of(roles, added)).mean()
        loss, value = loss + adversarial, value + adversarial.detach()
    assert logged["generator_loss"] == pytest.approx(float(value), rel=2e-3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert bias.grad is not None
    # The epsilon of this process is close to the sample, so that x0 is rounded a hundred times as coarsely.
    torch.testing.assert_close(found["layers.0.weight"].double(), weight.grad, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(found["layers.0.bias"].double(), bias.grad, rtol=2e-3, atol=2e-4)


def test_the_adversarial_terms_value_is_its_formula(tmp_path: Path) -> None:
    """Softplus(-D), also where the logits' gradient is not at right angles to the sample, as behind a norm it is."""
    roles, *_ = roles_of(tmp_path, "flow", ABOVE, gan_weight=0.5)
    adversary = roles._adversary
    assert adversary is not None
    met = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    adversary._grids = [torch.stack([met + 2.0, met - 1.0], dim=2).reshape(3, SIZE, 2, 1, 1)]
    (logits,) = roles.trained[2].model(adversary._grids)
    noised = met.detach() * torch.ones((), requires_grad=True)
    loss = adversary.generator_loss(noised, met, 10)
    assert float(loss.detach()) == pytest.approx(0.5 * float(F.softplus(-logits.detach()).mean()), rel=1e-5)


def logits_of(roles: Roles, noised: Tensor) -> Tensor:
    """The discriminator's logits [n, 1] of noised samples [n, d]; its one feature is the output of the last block."""
    tokens = torch.stack([TEACHER.expand_as(noised), noised], dim=2)
    (logits,) = roles.trained[2].model([tokens.reshape(*tokens.shape, 1, 1)])
    found: Tensor = logits
    return found


@pytest.mark.parametrize("gan", [0.0, 0.5])
def test_the_generators_step_leaves_nothing_in_other_roles(tmp_path: Path, gan: float) -> None:
    """No weight of theirs is moved, and no gradient is left for their next update."""
    roles, *_ = roles_of(tmp_path, "flow", BELOW, gan_weight=gan, critic_updates=1)
    others = roles.trained[1:]
    assert [role.name for role in others] == ["fake_score", *(["discriminator"] if gan else [])]
    weights = [parameter for role in others for parameter in role.model.parameters()]
    roles.step(1, draws(1))
    assert all(weight.grad is None or not weight.grad.any() for weight in weights)
    kept = [weight.detach().clone() for weight in weights]
    roles.update_generator(draws(2))
    assert all(weight.grad is None or not weight.grad.any() for weight in weights)
    assert all(map(torch.equal, kept, weights))
    assert all(not weight.requires_grad for weight in roles.teacher.parameters())


def test_the_adversarial_term_begins_with_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tenth of the steps it rises: at 0 the gradient is that without it, bit for bit, and half way it is half."""
    found = []
    for gan, update in ((0.0, 0), (0.5, 0), (0.5, 5), (0.25, 10)):
        roles, *_ = roles_of(tmp_path, "flow", ABOVE, gan_weight=gan)
        roles.generator.updates = update
        kept = gradients(roles, monkeypatch)
        roles.update_generator(draws())
        found.append(torch.cat([gradient.flatten() for gradient in kept.values()]))
    without, begun, half, whole = found
    assert torch.equal(without, begun)
    assert torch.equal(half, whole)
    assert not torch.allclose(half, without)


def test_the_discriminator_learns_to_tell_data_from_samples(tmp_path: Path) -> None:
    """Logits are positive for data and negative for what the generator gives, which is elsewhere; the gap is logged."""
    roles, *_ = roles_of(tmp_path, "flow", (0.1, (-0.5, 0.5)), gan_weight=0.5, critic_learning_rate=0.02)
    data: Any = Clips(Normal(torch.tensor([3.0, -3.0]).double(), 0.01 * torch.eye(2).double()), CAPTION)
    roles._data = data
    gaps = [roles.update_critic(draws(number))["logit_gap"] for number in range(40)]
    assert gaps[-1] > gaps[0] + 1.0
    real, generated = (float(logits_of(roles, torch.tensor([mean])).detach()) for mean in ((3.0, -3.0), (-0.5, 0.5)))
    assert real > 0.3
    assert generated < -0.3


@pytest.mark.parametrize("penalty", [0.0, 50.0])
def test_the_discriminators_loss(tmp_path: Path, penalty: float) -> None:
    """Softplus(-D(x)) + softplus(D(x_g)) of data and samples noised alike, and the difference to data nearby."""
    roles, *_ = roles_of(tmp_path, "flow", (0.0, (0.5, -0.25)), gan_weight=0.7, gan_r1=penalty)
    teacher, losses = Calls(roles.teacher), spied(roles, 2)
    logged = roles.update_critic(draws())
    met, real, *near = teacher.x
    assert len(near) == (1 if penalty else 0)
    roles, *_ = roles_of(tmp_path, "flow", (0.0, (0.5, -0.25)), gan_weight=0.7)  # the same heads, before their step
    generated, logits, *others = (logits_of(roles, x.flatten(1)).detach() for x in teacher.x)
    expected = (F.softplus(generated) + F.softplus(-logits)).mean()
    if penalty:
        expected = expected + penalty * (others[0] - logits).square().mean()
        nudge = (near[0] - real) / 0.01
        assert float(nudge.mean()) == pytest.approx(0.0, abs=0.3)
        assert float(nudge.std()) == pytest.approx(1.0, abs=0.2)
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-5)
    assert logged["discriminator_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert logged["real_logit"] == pytest.approx(float(logits.mean()), rel=1e-4, abs=1e-5)
    assert logged["logit_gap"] == pytest.approx(float(logits.mean() - generated.mean()), rel=1e-3, abs=1e-5)
    # Samples are those that the fake score met, and data, too, are noised at levels of the score range.
    s = (teacher.timesteps[0] / 1000.0).reshape(-1, 1, 1, 1, 1)
    constant = torch.tensor([0.5, -0.25]).reshape(1, 1, 2, 1, 1)
    noise = (met - (1.0 - s) * constant) / s
    torch.testing.assert_close(moments(noise)[1], torch.eye(2).double(), atol=0.6, rtol=0)
    level = teacher.timesteps[1].double() / 1000.0
    unshifted = level / (3.0 - 2.0 * level)
    assert sorted(((unshifted - 0.02) / 0.96 * BATCH).floor().long().tolist()) == list(range(BATCH))


def test_one_forward_of_the_teacher_serves_guidance_and_features(tmp_path: Path) -> None:
    """The generator's step calls it as often with the adversarial term as without; the conditional call has a graph."""
    graded = []
    for gan in (0.0, 0.5):
        roles, *_ = roles_of(tmp_path, "flow", ABOVE, gan_weight=gan, inter_cfg=(2.0, 2.0), intra_cfg=(0.5, 0.5))
        teacher = Calls(roles.teacher)
        roles.update_generator(draws())
        graded.append(teacher.graded)
    assert graded == [[False, False, False], [True, False, False]]


def test_the_figures_of_a_step(tmp_path: Path) -> None:
    """Means over samples of what the generator gave and of how far the scores are apart."""
    roles, *_ = roles_of(tmp_path, "flow", ABOVE)
    with torch.no_grad():
        roles.trained[1].model.blocks[0].by.add_(0.4)
    generated, teacher, fake = Calls(roles.generator.model), Calls(roles.teacher), Calls(roles.trained[1].model)
    found = roles.update_generator(draws())
    s = (teacher.timesteps[0] / 1000.0).reshape(-1, 1, 1, 1, 1)
    x = generated.x[0] - generated.outputs[0]
    real, fake_x0 = (calls.x[0] - s * calls.outputs[0] for calls in (teacher, fake))
    scales = (x - real).abs().flatten(1).mean(1)
    assert found["score_gap"] == pytest.approx(float((fake_x0 - real).abs().mean()), rel=1e-4)
    assert found["generated_std"] == pytest.approx(float(x.flatten(1).std(1).mean()), rel=1e-5)
    assert found["generated_motion"] == pytest.approx(float(x.diff(dim=2).abs().mean()), rel=1e-5)
    assert found["normaliser_mean"] == pytest.approx(float(scales.mean()), rel=1e-4)
    assert found["normaliser_min"] == pytest.approx(float(scales.min()), rel=1e-4)
    assert found["normaliser_max"] == pytest.approx(float(scales.max()), rel=1e-4)


def test_an_image_has_no_motion(tmp_path: Path) -> None:
    """Of one frame there is no change from frame to frame, and no figure that is not a number."""
    roles, *_ = roles_of(tmp_path, "flow", ABOVE, shape=(2, 1, 1, 1), critic_updates=1)
    found = roles.step(1, draws())
    assert "generated_motion" not in found
    assert all(math.isfinite(value) for value in found.values())
