"""Consistency distillation on Gaussian data, where the teacher's path and its end are closed formulas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from flcompress.core.settings import Sampling
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.process import Process
from flcompress.diffusion.student import student_contract
from flcompress.draws import Draws
from flcompress.passes.consistency import Consistency
from flcompress.training.loop import train
from flcompress.training.methods import consistency
from flcompress.training.methods.consistency import ConsistencyRoles, grid, huber
from tests.fixtures.gaussian import (
    COVARIANCE,
    KINDS,
    SHIFTS,
    SIZE,
    Clips,
    Exact,
    Normal,
    Stand,
    as_predicted,
    coefficients,
    graph_of,
    latents,
    program_of,
    teacher_contract,
    work_in,
)

CAPTION = torch.tensor([[[0.4, 0.2]]])
UNPROMPTED = torch.tensor([0.4, 0.2])
PROMPTED = UNPROMPTED + CAPTION[0, 0]
BATCH = 32


class Jumps(WanTransformer3DModel):  # type: ignore[misc]
    """A student of one affine map at each level of a grid: x0 = A x + c."""

    def __init__(self, kind: str, process: Process, levels: Tensor) -> None:
        nn.Module.__init__(self)
        self.register_to_config(patch_size=(1, 1, 1))
        self.kind, self.timesteps = kind, process.timestep(levels)
        self.weight = nn.Parameter(0.5 * torch.eye(SIZE).repeat(len(levels), 1, 1))
        self.bias = nn.Parameter(torch.zeros(len(levels), SIZE))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        distance = (timestep[:, None] - self.timesteps).abs()
        assert float(distance.min(dim=1).values.max()) < 1e-3, "not a level of the grid"
        place, x = distance.argmin(dim=1), hidden_states.flatten(1)
        x0 = (self.weight[place] @ x[:, :, None]).squeeze(-1) + self.bias[place]
        a, b = (one.to(x.dtype) for one in coefficients(self.kind, timestep))
        return (as_predicted(self.kind, x, x0, a, b).reshape(hidden_states.shape),)


def roles_of(
    folder: Path, kind: str, *, teacher: SamplingContract | None = None, exact: bool = False, **settings: Any
) -> tuple[ConsistencyRoles, Consistency, Stand]:
    """The roles of a distillation; the student is a `Jumps`, or its teacher itself."""
    step = Consistency(**{"steps": 100, "batch": BATCH, "levels": 8, "guidance": 1.0, **settings})
    teacher = teacher or teacher_contract(kind)
    contract = student_contract(teacher, 1)
    real = Exact(kind, COVARIANCE, SHIFTS)
    levels = grid(step.levels, teacher.shift)[:-1]
    student = real if exact else Jumps(kind, contract.process, levels)
    clips = Clips(Normal(PROMPTED.double(), COVARIANCE), CAPTION)
    engine = Stand(work_in(folder, clips), {"original": real, "transformer": student})
    return ConsistencyRoles(step.training, program_of(teacher, graph_of(real)), contract, engine), step, engine


def draws(number: int = 1) -> Draws:
    return Draws(0, "consistency", number, batch=BATCH)


def walk(kind: str, levels: Tensor, start: int, x: Tensor, mean: Tensor, *, steps: int | None = None) -> Tensor:
    """Where steps of the exact ODE from x [n, d] at level number `start` end, fp64; by default the end of the path."""
    process = teacher_contract(kind).process
    stop = len(levels) - 1 if steps is None else start + steps
    for here, following in zip(levels[start:stop], levels[start + 1 : stop + 1], strict=True):
        s, after = here.expand(len(x)), following.expand(len(x))
        a, b = coefficients(kind, process.timestep(s))
        x0 = Normal(mean.double(), COVARIANCE).denoised(x, a, b)
        x = process.step(latents(x), latents(as_predicted(kind, x, x0, a, b)), s, after).flatten(1).double()
    return x


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    half: Tensor = vectors @ values.sqrt().diag() @ vectors.T
    return half


def test_the_grid_is_even_and_then_shifted() -> None:
    levels = grid(4, 3.0)
    torch.testing.assert_close(levels, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    timesteps = teacher_contract("epsilon").process.timestep(grid(50, 1.0)[:-1])
    assert timesteps.tolist() == list(range(999, 0, -20))


@pytest.mark.parametrize("kind", KINDS)
def test_the_boundary(kind: str) -> None:
    """f(x, 0) = x whatever the network says; of a discrete process c_skip x + c_out x0_hat by the integer timestep."""
    process, draw = teacher_contract(kind).process, torch.Generator().manual_seed(0)
    x, prediction = (latents(torch.randn(3, SIZE, generator=draw)) for _ in range(2))
    assert torch.equal(process.consistency(x, prediction, torch.zeros(3)), x)
    level = torch.tensor([0.002, 0.02, 1.0])
    t, x0 = process.timestep(level).reshape(-1, 1, 1, 1, 1), process.tweedie(x, prediction, level)
    skip, out = 0.25 / ((10.0 * t) ** 2 + 0.25), 10.0 * t / ((10.0 * t) ** 2 + 0.25).sqrt()
    expected = x0 if kind == "flow" else skip * x + out * x0
    torch.testing.assert_close(process.consistency(x, prediction, level), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [1, 3])
def test_the_target_is_what_the_average_gives_after_one_step_of_the_teacher(
    tmp_path: Path, kind: str, skip: int
) -> None:
    """And at the end of the path the teacher's step itself, for which no network is called."""
    roles, *_ = roles_of(tmp_path, kind, skip=skip)
    levels, start = roles._grid.double(), torch.arange(8 - skip + 1)
    white = torch.randn(len(start), SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    calls: list[int] = []
    roles.student.model.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    target = roles._target(
        latents(white).float(),
        Clips(Normal(PROMPTED, COVARIANCE), CAPTION).given(len(start)),
        roles._grid[start],
        start,
    ).flatten(1)
    assert calls == [len(start) - 1]
    process = teacher_contract(kind).process
    for place in start.tolist():
        jump = levels[[place, place + skip]]
        after = walk(kind, jump, 0, white[place : place + 1], PROMPTED)
        if place + skip < 8:  # the student of the start halves what it sees
            s = jump[1:].float()
            x0 = 0.5 * after
            a, b = coefficients(kind, process.timestep(s))
            prediction = as_predicted(kind, after, x0, a, b)
            after = process.consistency(latents(after), latents(prediction), s).flatten(1)
        torch.testing.assert_close(target[place].double(), after[0].double(), atol=1e-4, rtol=1e-4)


def test_guidance_of_one_needs_no_negative_prompt() -> None:
    guides = {scale: Consistency(steps=1, guidance=scale).guides for scale in (None, 0.0, 1.0, 2.0)}
    assert guides == {None: False, 0.0: True, 1.0: False, 2.0: True}


def test_a_path_of_one_step_calls_the_student_once(tmp_path: Path) -> None:
    roles, *_ = roles_of(tmp_path, "flow", levels=1)
    graded: list[bool] = []
    roles.student.model.register_forward_hook(lambda module, args, output: graded.append(output[0].requires_grad))
    roles.update(draws())
    assert graded == [True]


def test_starts_are_spread_evenly(tmp_path: Path) -> None:
    roles, *_ = roles_of(tmp_path, "flow", levels=9, skip=2)
    starts = roles._draw_starts(draws())
    assert torch.bincount(starts).tolist() == [4] * 8
    assert starts.tolist() != sorted(starts.tolist())


def test_two_conventions_of_guidance(tmp_path: Path) -> None:
    """LCM writes c + w (c - u): a recipe that says so, or the pass with one more, has the same teacher."""
    scale = Sampling(guidance_scale=3.0, guidance_convention="conditional").scale
    contract = teacher_contract("flow", guidance=scale)
    x, conditioning = latents(torch.zeros(1, SIZE)), Clips(Normal(PROMPTED, COVARIANCE), CAPTION).given(1)
    mean = PROMPTED + 3.0 * (PROMPTED - UNPROMPTED)
    level = grid(8, 3.0)[[7, 8]].double()
    expected = walk("flow", level, 0, torch.zeros(1, SIZE).double(), mean)
    for teacher, guidance in ((contract, None), (teacher_contract("flow"), 4.0)):
        roles, *_ = roles_of(tmp_path, "flow", teacher=teacher, guidance=guidance)
        target = roles._target(x, conditioning, roles._grid[[7]], torch.tensor([7])).flatten(1)
        torch.testing.assert_close(target.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_no_guidance_is_one_call_of_the_teacher(tmp_path: Path, scale: float) -> None:
    roles, _, engine = roles_of(tmp_path, "flow", guidance=scale)
    (teacher,) = [model for name, model in engine.loaded if name == "original"]
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    roles.update(draws())
    assert len(calls) == scale


def test_the_loss_of_a_student_that_is_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two points of a path whose ends it takes for almost the same: squared, a quarter at half the step."""
    monkeypatch.setattr(consistency, "HUBER", 10.0)  # where the loss is a square
    losses = [
        float(roles_of(tmp_path, "flow", exact=True, levels=levels)[0]._loss(draws()).detach())
        for levels in (100, 200, 400)
    ]
    assert losses[0] / losses[1] == pytest.approx(4.0, rel=0.1)
    assert losses[1] / losses[2] == pytest.approx(4.0, rel=0.1)


def test_the_loss_is_a_square_below_and_a_line_above() -> None:
    tiny, large = torch.tensor([1e-6]), torch.tensor([5.0])
    assert float(huber(tiny)) == pytest.approx(1e-12 / 2e-3, rel=1e-4)
    assert float(huber(large)) == pytest.approx(5.0 - 1e-3, rel=1e-4)


@pytest.mark.e2e
@pytest.mark.parametrize(("kind", "guidance"), [("flow", 3.0), ("v_prediction", 1.0)])
def test_a_student_lands_on_its_teachers_map(tmp_path: Path, kind: str, guidance: float) -> None:
    """At every level it jumps to where the teacher's steps end, and from noise to near m + S^1/2 e, the exact end."""
    roles, step, engine = roles_of(
        tmp_path, kind, guidance=guidance, levels=5, steps=200, learning_rate=0.05, schedule="cosine", final_ratio=0.0
    )
    train(
        lambda _, drawn: roles.update(drawn),
        [roles.student],
        engine=engine,
        name="consistency",
        steps=step.steps,
        batch=step.batch,
    )
    weights: Mapping[str, Tensor] = roles.student.averaged_state()
    mean = UNPROMPTED + guidance * (PROMPTED - UNPROMPTED)
    x = torch.randn(16, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for place in range(5):
        ours = x @ weights["weight"][place].double().T + weights["bias"][place].double()
        torch.testing.assert_close(ours, walk(kind, roles._grid.double(), place, x, mean), atol=0.05, rtol=0.05)
    if kind == "flow":
        torch.testing.assert_close(walk(kind, grid(400, 3.0).double(), 0, x, mean), mean + x @ root(COVARIANCE),
                                   atol=0.02, rtol=0.02)  # fmt: skip


def test_a_resumed_training_has_the_same_average_bit_for_bit(tmp_path: Path) -> None:
    """The average of the unbroken training, and of one that was ended after two of four steps."""
    averages = []
    for name, stops in (("whole", [4]), ("broken", [2, 4])):
        for steps in stops:
            roles, step, engine = roles_of(tmp_path / name, "flow", learning_rate=0.05)
            train(
                lambda _, drawn, roles=roles: roles.update(drawn),  # type: ignore[misc]
                [roles.student],
                engine=engine,
                name="consistency",
                steps=steps,
                batch=step.batch,
            )
        averages.append((roles.student.averaged_state(), roles.student.full_state()))
    (whole, live), (broken, broken_live) = averages
    for name in whole:
        assert torch.equal(whole[name], broken[name])
        assert torch.equal(live[name], broken_live[name])
        assert not torch.equal(whole[name], live[name])
