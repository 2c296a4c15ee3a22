"""MagicDistillation's real score, which takes a share of the fake one's LoRA: limits, closed formula, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from flcompress.draws import Draws
from flcompress.frontend.recipe import arguments
from flcompress.passes.dmd import DistributionMatching
from flcompress.training.distillation.roles import Roles
from tests.fixtures.gaussian import COVARIANCE, LATENTS, PROMPT, SHIFTS, Exact, Normal, Stand
from tests.passes.test_gaussian_roles import Calls, draws
from tests.passes.test_gaussian_students import ABOVE, CAPTION, TEACHER, roles_of


@pytest.fixture(autouse=True)
def no_folder_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Exact("flow", COVARIANCE, SHIFTS)
    monkeypatch.setattr("flcompress.training.distillation.roles.meta_transformer", lambda folder: exact)


def leaning(folder: Path, share: float, **settings: Any) -> tuple[Roles, Stand]:
    """Roles whose real score takes this share of the fake one, also where a recipe may not ask for it."""
    roles, _, engine = roles_of(folder, "flow", ABOVE, fake_score="lora", real_lean=0.5, **settings)
    roles._settings = replace(roles._settings, real_lean=share)
    return roles, engine


def trained(roles: Roles, steps: int = 3) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """The figures of each step, and the weights after them."""
    figures = [dict(roles.step(number, Draws(0, "known", number, batch=32))) for number in range(steps)]
    return figures, [weight.detach().clone() for role in roles.trained for weight in role.model.parameters()]


def test_without_a_share_it_is_plain_distribution_matching_bit_for_bit(tmp_path: Path) -> None:
    plain, *_ = roles_of(tmp_path, "flow", ABOVE, fake_score="lora")
    roles, _ = leaning(tmp_path, 0.0)
    (figures, weights), (expected_figures, expected) = trained(roles), trained(plain)
    assert figures == expected_figures
    assert all(map(torch.equal, weights, expected))


def test_with_all_of_it_and_no_guidance_nothing_is_left_to_learn(tmp_path: Path) -> None:
    """F - R = 0, so that g = 0 and the generator stays where it is."""
    roles, _ = leaning(tmp_path, 1.0)
    before = [weight.detach().clone() for weight in roles.generator.model.parameters()]
    figures, _ = trained(roles)
    assert [step["score_gap"] for step in figures] == [0.0] * 3
    assert all(map(torch.equal, before, roles.generator.model.parameters()))


def test_it_predicts_for_a_mean_and_a_spread_between_the_two(tmp_path: Path) -> None:
    """In closed form: N(m + a (m_fake - m), F F') with F between the factors; the frozen teacher predicts as before."""
    roles, _ = leaning(tmp_path, 0.25)
    fake = roles.trained[1].model
    x, timestep = torch.randn(8, *LATENTS, generator=torch.Generator().manual_seed(0)), torch.full((8,), 600.0)
    prompt = CAPTION.expand(8, 1, 2)

    def of_teacher() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = roles.teacher(x, timestep, prompt)[0]
            return output

    before = of_teacher()
    trained(roles)
    assert torch.equal(of_teacher(), before)
    teacher = roles.teacher
    shifts = [own.detach() for key, own in fake.own.items() if key.startswith("blocks")]
    shift = sum((own - block.by for own, block in zip(shifts, teacher.blocks, strict=True)), torch.zeros(2))
    assert float(shift.abs().max()) > 0.01
    factor = teacher.factor.lerp(fake.own["factor"].detach(), 0.25).double()
    between = Normal(TEACHER.double() + 0.25 * shift.double(), factor @ factor.T)
    s = torch.full((8,), 0.6).double()
    x0 = between.denoised(x.flatten(1).double(), 1.0 - s, s).float()
    with torch.no_grad():
        found = x - 0.6 * roles._leaning(x, timestep, {PROMPT: prompt})
    torch.testing.assert_close(found.flatten(1), x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gan", [0.0, 0.5])
def test_all_roles_compute_on_one_copy_of_the_base(tmp_path: Path, gan: float) -> None:
    """It is loaded once, beside the generator; a discriminator reads the frozen weights in a forward of its own."""
    roles, engine = leaning(tmp_path, 0.25, gan_weight=gan)
    assert [name for name, _ in engine.loaded] == ["original", "transformer"]
    assert vars(roles.trained[1].model)["inner"] is roles.teacher
    teacher = Calls(roles.teacher)
    roles.update_generator(draws())
    assert teacher.graded == [False, False, *([True] if gan else [])]  # fake, leaning, features
    frozen = [weight.clone() for weight in roles.teacher.parameters()]
    trained(roles)
    assert all(map(torch.equal, frozen, roles.teacher.parameters()))
    assert float((roles.teacher.covariance.double() - COVARIANCE).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"real_lean": 0.25},
         "real_lean: 0.25 given with fake_score: full, expected fake_score: lora: the real score takes a share of its "
         "LoRA; set fake_score: lora or real_lean: 0"),
        ({"real_lean": 1.0, "fake_score": "lora"}, "less than 1"),
        ({"real_lean": -0.1, "fake_score": "lora"}, "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_what_cannot_lean_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        DistributionMatching(steps=1, **settings)
    assert message in str(refused.value)


def test_a_recipe_without_the_new_terms_keeps_its_cache_key() -> None:
    """And one with the adversarial term of version 0.1, which read the fake score, has a key of its own."""
    assert not {"real_lean", "gan_r1"} & arguments(DistributionMatching(steps=1)).keys()
    assert arguments(DistributionMatching(steps=1, gan_weight=0.1))["gan_r1"] == 100.0
    leaning = arguments(DistributionMatching(steps=1, fake_score="lora", real_lean=0.1))
    assert leaning["real_lean"] == 0.1
    assert "gan_r1" not in leaning


def test_the_plan_counts_what_each_term_calls() -> None:
    """Forward 1, backward 1 more to the sample and 2 with weights; 10 samples of a step, 5 critic updates."""

    def calls(**settings: Any) -> float:
        step = DistributionMatching(steps=1, batch=10, critic_updates=5, student_steps=1, **settings)
        return step.cost(100.0, 10, 100.0).forwards / 10

    assert calls() == 3.0 + 1.0 + 2.0 + 5 * (1.0 + 3.0)
    assert calls(inter_cfg=(1.0, 1.0)) == calls() - 1.0
    lora = {"fake_score": "lora"}
    assert calls(**lora, real_lean=0.25) == calls(**lora) == calls() - 5 * 1.0
    assert calls(gan_weight=0.03) == calls() + 1.0 + 5 * 3.0
    assert calls(gan_weight=0.03, gan_r1=0.0) == calls() + 1.0 + 5 * 2.0
    assert calls(**lora, gan_weight=0.03, real_lean=0.25) == calls(**lora) + 2.0 + 5 * 3.0
    heads = DistributionMatching(steps=1, gan_weight=0.03).cost(100.0, 10, 100.0).roles[2]
    assert (heads.name, heads.trained) == ("discriminator", True)
