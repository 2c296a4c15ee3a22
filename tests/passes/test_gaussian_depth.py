"""Stage I's scores and Stage II's losses on Gaussian data against closed formulas, and what Stage II lands on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flcompress.distributed.world import World
from flcompress.models.network import as_network
from flcompress.passes.importance import Importance
from flcompress.passes.pretrain import Pretrain
from flcompress.passes.stochastic_depth import StochasticDepth
from flcompress.training.loop import METRICS_FILE
from flcompress.training.role import TrainedRole
from flcompress.training.watching.held_out import HeldOutELBO
from tests.fixtures.gaussian import (
    COVARIANCE,
    SHIFTS,
    SIZE,
    Clips,
    Exact,
    Normal,
    Stand,
    as_predicted,
    coefficients,
    graph_of,
    program_of,
    teacher_contract,
    work_in,
)

CAPTION = torch.tensor([[[0.4, 0.2]]])
TEACHER = torch.tensor([0.8, 0.4], dtype=torch.float64)
DATA = torch.tensor([-0.5, 1.2], dtype=torch.float64)


class Kept:
    """At every backward of a training: the loss, its gradient, the weights, and what the networks met last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[dict[str, Any]] = []
        self._last: dict[str, Tensor] = {}
        backward, forward, batch = TrainedRole._backward, Exact.forward, Clips.batch

        def kept_backward(role: TrainedRole, loss: Tensor, part: Any) -> None:
            row: dict[str, Any] = {"loss": loss.detach().clone(), **self._last}
            row["weights"] = {name: one.detach().clone() for name, one in role.model.named_parameters()}
            backward(role, loss, part)
            row["gradient"] = {name: one.grad for name, one in role.model.named_parameters() if one.grad is not None}
            row["gradient"] = {name: one.clone() for name, one in row["gradient"].items()}
            self.rows.append(row)

        def kept_forward(model: Exact, hidden_states: Tensor, timestep: Tensor, *rest: Any, **more: Any) -> Any:
            self._last |= {"x": hidden_states.flatten(1), "timestep": timestep, "prompt": more["encoder_hidden_states"]}
            return forward(model, hidden_states, timestep, *rest, **more)

        def kept_batch(clips: Clips, *args: Any, **kwargs: Any) -> Any:
            found = batch(clips, *args, **kwargs)
            self._last["x0"] = found[0].flatten(1)
            return found

        monkeypatch.setattr(TrainedRole, "_backward", kept_backward)
        monkeypatch.setattr(Exact, "forward", kept_forward)
        monkeypatch.setattr(Clips, "batch", kept_batch)


def trained(folder: Path, kind: str, **settings: Any) -> dict[str, Tensor]:
    """Stage II of a model that takes the data's mean for `TEACHER`; its second block is the prune set."""
    model = Exact(kind, COVARIANCE, SHIFTS)
    engine = Stand(work_in(folder, Clips(Normal(DATA, COVARIANCE), CAPTION)), {"transformer": model})
    program = program_of(teacher_contract(kind), graph_of(model), ["blocks.1"])
    given = {"remove": 0.3, "skip_probability": 1.0, "caption_dropout": 0.0, "batch": 32, "steps": 3}
    return StochasticDepth(**{**given, **settings}).training.weights(engine, program)


def predicted(kind: str, weights: dict[str, Tensor], row: dict[str, Any], blocks: int) -> Tensor:
    """By the first blocks of an exact model with these weights, fp64."""
    x, (a, b) = row["x"].double(), coefficients(kind, row["timestep"])
    mean = row["prompt"][:, 0].double() + sum(weights[f"blocks.{place}.by"] for place in range(blocks))
    factor = weights["factor"]
    return as_predicted(kind, x, Normal(mean, factor @ factor.T).denoised(x, a, b), a, b)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("target", ["self", "ema", "frozen"])
@pytest.mark.parametrize("kind", ["flow", "v_prediction"])
def test_the_loss_and_its_gradient(
    tmp_path: Path, kind: str, target: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """alpha |f_pruned - target|^2 + (1 - alpha) |f_pruned - v|^2, at steps that tell the three targets apart."""
    kept = Kept(monkeypatch)
    trained(tmp_path, kind, alpha=alpha, target=target, learning_rate=0.3, steps=4)
    assert len(kept.rows) == 4
    average = kept.rows[0]["weights"]
    for number, row in enumerate(kept.rows):
        live = {name: one.double().requires_grad_() for name, one in row["weights"].items()}
        if number:
            decay = min(0.99, (1.0 + number) / (10.0 + number))
            average = {name: decay * one + (1.0 - decay) * row["weights"][name] for name, one in average.items()}
        teacher = {"self": row["weights"], "ema": average, "frozen": kept.rows[0]["weights"]}[target]
        full = predicted(kind, {name: one.double() for name, one in teacher.items()}, row, 2)
        pruned = predicted(kind, live, row, 1)
        a, b = coefficients(kind, row["timestep"])
        known = as_predicted(kind, row["x"].double(), row["x0"].double(), a, b)
        loss = alpha * (pruned - full).square().mean() + (1.0 - alpha) * (pruned - known).square().mean()
        assert float(row["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        slopes = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
        for (name, _), slope in zip(live.items(), slopes, strict=True):
            found = row["gradient"].get(name, torch.zeros_like(row["weights"][name])).double()
            expected = torch.zeros_like(found) if slope is None else slope
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_average_is_kept_where_it_is_asked_for_and_not_as_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(steps: int, **settings: Any) -> dict[str, Tensor]:
        constant = {"learning_rate": 0.3, "schedule": "constant", "warmup": 0}
        return trained(tmp_path / str(steps), "flow", steps=steps, **constant, **settings)

    kept = Kept(monkeypatch)
    ended(4, target="ema")
    live = kept.rows[3]["weights"]
    assert {name: one.tolist() for name, one in ended(3, target="ema").items() if name in live} == {
        name: one.tolist() for name, one in live.items()
    }
    kept.rows.clear()
    ended(5, ema_decay=0.2)
    average = kept.rows[0]["weights"]
    for number in (1, 2):
        decay = min(0.2, (1.0 + number) / (10.0 + number))
        average = {n: decay * one + (1.0 - decay) * kept.rows[number]["weights"][n] for n, one in average.items()}
    found = ended(2, ema_decay=0.2)
    for name, one in average.items():
        torch.testing.assert_close(found[name], one)
    assert not torch.equal(found["blocks.0.by"], kept.rows[2]["weights"]["blocks.0.by"])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_stage_two_lands_between_the_data_and_the_full_model(tmp_path: Path, alpha: float) -> None:
    """The pruned path ends at alpha m_full + (1 - alpha) m_data, the optimum of the two terms' sum."""
    weights = trained(tmp_path, "flow", alpha=alpha, steps=100, batch=64, learning_rate=0.06)
    found = CAPTION[0, 0].double() + weights["blocks.0.by"].double()
    torch.testing.assert_close(found, alpha * TEACHER + (1.0 - alpha) * DATA, atol=0.1, rtol=0)
    factor = weights["factor"].double()
    torch.testing.assert_close(factor @ factor.T, COVARIANCE, atol=0.15, rtol=0)
    assert weights["blocks.1.by"].tolist() == pytest.approx(SHIFTS[1])


@pytest.mark.parametrize("target", ["self", "frozen"])
def test_the_held_out_figures_of_both_paths(tmp_path: Path, target: str) -> None:
    """Full and pruned path against the original: the mean of both, and by what share the full one is worse."""
    trained(tmp_path, "flow", target=target, steps=20, learning_rate=0.1)
    first, last = (
        record
        for record in map(json.loads, (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines())
        if "elbo_full" in record
    )
    assert (first["step"], last["step"]) == (0, 20)
    assert first["elbo_original"] == last["elbo_original"] == first["elbo_full"]
    assert first["drift"] == 0.0
    engine = Stand(work_in(tmp_path), {})
    clips: Any = Clips(Normal(DATA, COVARIANCE), CAPTION)
    elbo = HeldOutELBO(clips, teacher_contract("flow"), len(clips), 0, "cpu", 32, engine.context.world)
    full, pruned = (elbo(as_network(Exact("flow", COVARIANCE, SHIFTS[:count]))).loss for count in (2, 1))
    assert (first["elbo_full"], first["elbo_pruned"]) == pytest.approx((full, pruned), rel=1e-5)
    assert last["elbo_full"] != first["elbo_full"]
    for record in (first, last):
        assert record["elbo_mean"] == pytest.approx((record["elbo_full"] + record["elbo_pruned"]) / 2)
        assert record["drift"] == pytest.approx(record["elbo_full"] / record["elbo_original"] - 1.0)


def test_each_block_is_skipped_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that was skipped has no gradient; with probability 0.25 that is a quarter of the steps."""
    kept = Kept(monkeypatch)
    trained(tmp_path, "flow", alpha=0.0, skip_probability=0.25, steps=120, batch=2, learning_rate=1e-4)
    skipped = sum("blocks.1.by" not in row["gradient"] for row in kept.rows) / 120
    assert skipped == pytest.approx(0.25, abs=0.1)


def test_captions_are_dropped_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty prompt takes the place of a quarter of the captions, in Stage II and in training from clips."""
    kept = Kept(monkeypatch)
    trained(tmp_path, "flow", caption_dropout=0.25, steps=5, batch=200)
    model = Exact("flow", COVARIANCE, SHIFTS)
    engine = Stand(work_in(tmp_path / "pretrain", Clips(Normal(DATA, COVARIANCE), CAPTION)), {"transformer": model})
    settings = Pretrain(steps=5, batch=200, caption_dropout=0.25)
    settings.training.weights(engine, program_of(teacher_contract("flow"), graph_of(model)))
    for rows in (kept.rows[:5], kept.rows[5:]):
        prompts = torch.cat([row["prompt"][:, 0] for row in rows])
        empty = (prompts == 0.0).all(dim=1)
        assert torch.equal(prompts[~empty], CAPTION[0].expand(int((~empty).sum()), SIZE))
        assert float(empty.double().mean()) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("kind", ["flow", "v_prediction"])
def test_training_from_clips_lands_on_the_data(tmp_path: Path, kind: str) -> None:
    """Flow matching (or the v loss) has its minimum at the data's own mean and covariance."""
    model = Exact(kind, 1.7 * torch.eye(2), [[0.0, 0.0]])
    engine = Stand(work_in(tmp_path, Clips(Normal(DATA, COVARIANCE), CAPTION)), {"transformer": model})
    settings = Pretrain(steps=120, batch=64, learning_rate=0.1, caption_dropout=0.0, ema_decay=0.9)
    weights = settings.training.weights(engine, program_of(teacher_contract(kind), graph_of(model)))
    found = CAPTION[0, 0].double() + weights["blocks.0.by"].double()
    torch.testing.assert_close(found, DATA, atol=0.1, rtol=0)
    factor = weights["factor"].double()
    torch.testing.assert_close(factor @ factor.T, COVARIANCE, atol=0.15, rtol=0)


@pytest.mark.parametrize("strata", ["even", "log"])
@pytest.mark.parametrize("weighting", ["elbo", "uniform"])
@pytest.mark.parametrize("kind", ["flow", "v_prediction"])
def test_the_importance_of_a_block_that_moves_the_mean(tmp_path: Path, kind: str, weighting: str, strata: str) -> None:
    """Skipping moves x0_hat by J d, J = 1 - a G: I_k = E[w (|x0 - x0_hat + J d|^2 - |x0 - x0_hat|^2)] per element.

    That is E[w |J d|^2] of a block that takes the mean to the data's, and is negative of one that leads away from it.
    """
    shifts = [[0.3, -0.2], [0.1, 0.4], [-0.6, 0.3]]
    model = Exact(kind, COVARIANCE, shifts)
    mean = CAPTION[0, 0].double() + torch.tensor([0.4, 0.2])  # the third block leads away from the data
    off = torch.tensor([-0.6, 0.3]).double()
    contract = teacher_contract(kind)
    step = Importance(draws=6000, noise_levels=3, weighting=weighting, sigma_min=0.3, sigma_max=0.9, batch=2000,
                      strata=strata)  # fmt: skip
    clips: Any = Clips(Normal(mean, COVARIANCE), CAPTION)
    found = step.scores.score(model, graph_of(model), contract, clips, 0, lambda *_: None, World()).estimates()
    ranges = [(0.3, 0.5), (0.5, 0.7), (0.7, 0.9)]
    if strata == "log":
        ranges = [(0.3 * 3 ** (level / 3), 0.3 * 3 ** ((level + 1) / 3)) for level in range(3)]
    for place, shift in enumerate(shifts):
        d, expected = torch.tensor(shift).double(), []
        for low, high in ranges:
            level = low + (high - low) * (torch.arange(2000).double() + 0.5) / 2000
            timestep = contract.process.timestep(level)
            a, b = coefficients(kind, timestep)
            weight = weight_of(kind, level, timestep) if weighting == "elbo" else torch.ones_like(level)
            # The error's mean is -J off with all blocks, and -J (off - d) without this one; its spread is the same.
            noised = a[:, None, None] ** 2 * COVARIANCE + b[:, None, None] ** 2 * torch.eye(SIZE)
            J = torch.eye(SIZE) - a[:, None, None] ** 2 * COVARIANCE @ torch.linalg.inv(noised)
            without, whole = ((J @ one).square().mean(1) for one in (off - d, off))
            expected.append(float((weight * (without - whole)).mean()))
        estimate = found[f"blocks.{place}"]
        assert len(estimate.per_level) == 3
        for (low, high, value, error), (first, last), wanted in zip(estimate.per_level, ranges, expected, strict=True):
            assert (low, high) == pytest.approx((first, last))
            assert abs(value - wanted) < 4.0 * error
            assert error < 0.25 * max(map(abs, expected))
        widths = [(high - low) / 0.6 for low, high in ranges]  # the expectation is over s uniform, whatever the strata
        levels = list(zip(widths, estimate.per_level, strict=True))
        assert estimate.mean == pytest.approx(sum(width * level[2] for width, level in levels))
        assert estimate.standard_error == pytest.approx(sum((width * level[3]) ** 2 for width, level in levels) ** 0.5)
    assert found["blocks.2"].mean < 0.0 < found["blocks.0"].mean


def weight_of(kind: str, level: Tensor, timestep: Tensor) -> Tensor:
    """-1/2 dSNR/dlevel: (1 - s) / s^3 of a flow, half the fall over a timestep of a discrete process."""
    if kind == "flow":
        return (1.0 - level) / level**3
    (a, b), (before, behind) = (coefficients(kind, one) for one in (timestep, timestep - 1))
    return 0.5 * 1000.0 * ((before / behind) ** 2 - (a / b) ** 2)
