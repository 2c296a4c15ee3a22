"""Students of one affine layer, distilled by the real pass on Gaussian data, land on their teacher's distribution."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flcompress.diffusion.student import student_contract
from flcompress.passes.dmd import DistributionMatching
from flcompress.training.distillation.roles import Roles
from flcompress.training.loop import train
from tests.fixtures.gaussian import (
    COVARIANCE,
    LATENTS,
    SHIFTS,
    Affine,
    Clips,
    Exact,
    Normal,
    Stand,
    coefficients,
    graph_of,
    program_of,
    teacher_contract,
    work_in,
)

pytestmark = pytest.mark.e2e

CAPTION = torch.tensor([[[0.4, 0.2]]])
UNPROMPTED = torch.tensor([0.4, 0.2])
TEACHER = UNPROMPTED + CAPTION[0, 0]
PRUNED = TEACHER - torch.tensor(SHIFTS[1])
BELOW, ABOVE = (0.3, (-0.5, 1.5)), (1.8, (2.0, -1.0))


def roles_of(
    folder: Path,
    kind: str,
    start: tuple[float, tuple[float, float]],
    *,
    student_steps: int = 1,
    shape: tuple[int, int, int, int] = LATENTS,
    **settings: Any,
) -> tuple[Roles, DistributionMatching, Stand]:
    """The roles of a distillation whose student starts as x0 = scale x + mean at each level."""
    teacher = teacher_contract(kind)
    contract = student_contract(teacher, student_steps)
    scale, mean = start
    student = Affine(kind, contract, scale * torch.eye(2), torch.tensor(mean))
    real = Exact(kind, COVARIANCE, SHIFTS)
    models: dict[str, nn.Module] = {"original": real, "elastic": real, "transformer": student}
    clips = Clips(Normal(TEACHER.double(), COVARIANCE), CAPTION)
    engine = Stand(work_in(folder, clips), models)
    given = {
        "steps": 100,
        "batch": 64,
        "critic_updates": 2,
        "learning_rate": 0.03,
        "critic_learning_rate": 0.05,
        "ema_decay": 0.9,
        "inter_cfg": (1.0, 1.0),
    }
    step = DistributionMatching(student_steps=student_steps, **{**given, **settings})
    program = program_of(teacher, graph_of(real), ["blocks.1"], shape)
    return Roles(step.settings, program, contract, engine), step, engine


@pytest.mark.parametrize(
    ("kind", "start", "settings", "mean"),
    [
        ("flow", BELOW, {}, TEACHER),
        ("flow", ABOVE, {}, TEACHER),
        ("v_prediction", BELOW, {}, TEACHER),
        ("epsilon", ABOVE, {}, TEACHER),
        ("flow", BELOW, {"inter_cfg": (2.0, 2.0)}, UNPROMPTED + 2.0 * (TEACHER - UNPROMPTED)),
        ("flow", ABOVE, {"inter_cfg": (2.0, 2.0)}, UNPROMPTED + 2.0 * (TEACHER - UNPROMPTED)),
        ("flow", BELOW, {"intra_cfg": (1.5, 1.5)}, TEACHER + 1.5 * (TEACHER - PRUNED)),
        ("flow", ABOVE, {"intra_cfg": (1.5, 1.5)}, TEACHER + 1.5 * (TEACHER - PRUNED)),
        ("flow", ABOVE, {"student_steps": 2}, TEACHER),
    ],
)  # fmt: skip
def test_an_affine_student_lands_on_its_teacher(
    tmp_path: Path, kind: str, start: tuple[float, tuple[float, float]], settings: dict[str, Any], mean: Tensor
) -> None:
    """Guidance moves the mean: u + b1 (c - u) + b2 (c - c_pruned) holds of the means where the covariances are one.

    Of a student of several levels it is the mixture of what it gives at each: a critic is not told the level.
    """
    roles, step, engine = roles_of(tmp_path, kind, start, **settings)
    train(roles.step, roles.trained, engine=engine, name="dmd", steps=step.steps, batch=step.batch)
    weights = roles.generator.averaged_state()
    means, covariances = outputs(roles.generator.model, weights, kind)
    mixture = means.mean(0)
    torch.testing.assert_close(mixture, mean.double(), atol=0.12, rtol=0)
    spread = means - mixture
    torch.testing.assert_close(
        covariances.mean(0) + spread.T @ spread / len(means), COVARIANCE, atol=0.12, rtol=0
    )  # fmt: skip


def outputs(student: Affine, weights: Mapping[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Means [levels, d] and covariances [levels, d, d] of what a student gives at its levels, each from the last."""
    mean, covariance, unit = torch.zeros(2).double(), torch.zeros(2, 2).double(), torch.eye(2).double()
    found = []
    for place, timestep in enumerate(student.timesteps):
        a, b = coefficients(kind, timestep)
        if place == 0:
            a, b = torch.zeros(()), torch.ones(())  # sampling starts from nothing but noise
        weight, bias = (weights[f"layers.{place}.{name}"].double() for name in ("weight", "bias"))
        mean = weight @ (a * mean) + bias
        covariance = weight @ (a**2 * covariance + b**2 * unit) @ weight.T
        found.append((mean, covariance))
    return torch.stack([one for one, _ in found]), torch.stack([one for _, one in found])
