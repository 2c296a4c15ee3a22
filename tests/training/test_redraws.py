"""Luck on one draw of noises stops nothing; a training that has got worse on every draw is stopped."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.diffusion.contract import contract_of
from flcompress.diffusion.process import FLOW
from flcompress.diffusion.sampling import Network
from flcompress.draws import generator
from flcompress.errors import TrainingError
from flcompress.pipeline.health import Health
from flcompress.pipeline.passes import Work
from flcompress.pipeline.world import World
from flcompress.training.health import BREACHES_FILE, REDRAWS, REDRAWS_FILE, Limit, Watch
from flcompress.training.monitors import GROUPS, HeldOutELBO, HeldOutHealth
from flcompress.training.samples import Prompts
from tests.training.test_health import no_data, silent

LIMITS = {"lag": Limit(setting="max_critic_lag", high=1.0)}


def work(folder: Path, said: list[str] | None = None, world: World | None = None, **health: Any) -> Work:
    return Work(
        directory=folder,
        seed=0,
        data=no_data,
        progress=silent,
        say=(said if said is not None else []).append,
        world=world or World(),
        health=Health(every=2, **health),
    )


def watch(given: Work) -> Watch:
    return Watch(given, name="test", look=lambda step: {}, held_out="distance", limits=LIMITS)


def distances(values: Sequence[float]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Figures on the fixed draw, which comes first, and on the others."""
    return {"distance": values[0]}, [{"distance": value} for value in values[1:]]


def measured(draw: random.Random, truth: float, directions: int = 6) -> list[float]:
    """Squared distances |mu + n|^2 on every draw: |mu|^2 is `truth`, E|n|^2 is 0.005.

    The noise of every look is independent of the last one's: no training moves faster.
    """
    width = math.sqrt(0.005 / directions)
    means = [math.sqrt(truth)] + [0.0] * (directions - 1)
    return [sum((mean + draw.gauss(0.0, width)) ** 2 for mean in means) for _ in range(1 + REDRAWS)]


def stopped_at(seed: int, folder: Path, truth: Callable[[int], float], *, redraws: bool = True) -> int | None:
    """The look at which a training whose true distance is a function of the look is stopped."""
    draw, one = random.Random(seed), watch(work(folder))
    for look in range(40):
        figures, again = distances(measured(draw, truth(look)))
        try:
            one.judge(2 * look, figures, again if redraws else ())
        except TrainingError:
            return look
    return None


def descending(look: int) -> float:
    """From 0.15, half of it at every look, down to a student that is as the teacher is."""
    return 0.15 / 2**look


def test_a_student_at_the_noise_floor_is_not_stopped(tmp_path: Path) -> None:
    """Of 400 trainings with 40 looks each. Judged by one draw nearly all of them are stopped."""
    runs = [stopped_at(seed, tmp_path, descending) for seed in range(400)]
    assert [at for at in runs if at is not None] == []
    by_one_draw = [stopped_at(seed, tmp_path, descending, redraws=False) for seed in range(100)]
    assert sum(at is not None for at in by_one_draw) > 95


@pytest.mark.parametrize(("truth", "looks"), [(0.15, 1), (0.05, 2), (0.025, 12)])
def test_a_student_that_runs_away_is_stopped(truth: float, looks: int, tmp_path: Path) -> None:
    """From the 21st look on it is as far away as at the start, a third of that, five times the noise."""
    runs = [stopped_at(seed, tmp_path, lambda look: descending(look) if look < 20 else truth) for seed in range(100)]
    assert all(at is not None and 20 <= at < 20 + looks for at in runs)


def test_what_was_seen_is_no_breach(tmp_path: Path) -> None:
    """0.15, by luck 0.0017, then 0.0078: on other noises no more than what it was."""
    one = watch(work(tmp_path))
    others = [0.006, 0.011, 0.008, 0.014, 0.007, 0.009, 0.012, 0.005]
    one.judge(0, *distances([0.15, *(0.15 + x for x in others)]))
    one.judge(100, *distances([0.0017, *others]))
    assert one.best == (100, 0.0017)
    one.judge(200, *distances([0.0078, *reversed(others)]))
    assert not (tmp_path / BREACHES_FILE).exists()
    with pytest.raises(TrainingError) as error:
        one.judge(300, *distances([0.09, *(0.08 + x for x in others)]))
    assert str(error.value) == (
        "test: step 300: distance 0.09 (0.085 to 0.094 on 8 other draws), expected at most 0.0051 "
        "(training.health.max_worsening); the best look, step 100, had 0.0017: train for fewer steps, or lower "
        "learning_rate; see docs/health.md; stopped, the last good checkpoint is kept"
    )
    (breach,) = [json.loads(line) for line in (tmp_path / BREACHES_FILE).read_text().splitlines()]
    assert breach["redrawn"] == [0.08 + x for x in others]


def test_an_absolute_limit_is_broken_on_every_draw_too(tmp_path: Path) -> None:
    said: list[str] = []
    one = watch(work(tmp_path, said, on_breach="warn"))
    one.judge(2, {"lag": 1.4}, [{"lag": 1.2}] * 7 + [{"lag": 0.9}])
    assert said == []
    one.judge(4, {"lag": 1.4}, [{"lag": 1.2}] * 8)
    one.judge(6, {"lag": 1.4}, [{"other": 1.2}] * 8)  # still beyond, which is said once
    assert [line.split(";")[0] for line in said] == [
        "warning: test: step 4: lag 1.4 (1.2 to 1.2 on 8 other draws), expected at most 1 "
        "(training.health.max_critic_lag)"
    ]


@pytest.mark.parametrize("figure", ["lag", "distance"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_luck(figure: str, value: float, tmp_path: Path) -> None:
    one = watch(work(tmp_path))
    one.judge(2, *distances([1.0] * 9))
    with pytest.raises(TrainingError, match=f"step 4: {figure} {value}"):
        one.judge(4, {figure: value}, [{figure: 0.5}] * 8)


def test_the_best_look_is_the_one_with_the_lowest_mean(tmp_path: Path) -> None:
    one = watch(work(tmp_path))
    one.judge(2, *distances([0.5, *[1.0] * 8]))
    one.judge(4, *distances([0.6, *[0.8] * 8]))
    assert one.best == (4, 0.6)
    one.judge(6, *distances([0.1, *[0.9] * 8]))
    assert one.best == (4, 0.6)


looks = st.lists(st.lists(st.floats(0.001, 1.0), min_size=4, max_size=4), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(looks, st.integers(0, 8))
def test_a_resumed_watch_judges_redraws_as_an_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, log: list[list[float]], broken_at: int
) -> None:
    folder = tmp_path_factory.mktemp("watch")
    whole_said: list[str] = []
    said: list[str] = []
    whole, again = (
        watch(work(folder, to, on_breach="warn", max_worsening=0.1)) for to in (whole_said, said)
    )  # fmt: skip
    before = 0
    for step, values in enumerate(log):
        before = len(whole_said) if step == broken_at else before
        whole.judge(step, *distances(values))
    lines = [{"step": step, "draws": distances(values)[1]} for step, values in enumerate(log)]
    (folder / REDRAWS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines[:broken_at]))
    again.resume([{"step": step, **distances(values)[0]} for step, values in enumerate(log[:broken_at])])
    for step, values in enumerate(log[broken_at:], start=broken_at):
        again.judge(step, *distances(values))
    assert again.best == whole.best
    if broken_at < len(log):
        assert said == whole_said[before:]


def test_a_training_begun_before_there_were_redraws_is_not_stopped_by_luck(tmp_path: Path) -> None:
    """Its best look was lucky, and nothing says how much: the first look on all draws takes its place."""
    one = watch(work(tmp_path))
    one.resume([{"step": 0, "distance": 0.15}, {"step": 50, "distance": 0.0017}])
    one.judge(100, *distances([0.0078] * 9))
    assert one.best == (100, 0.0078)
    with pytest.raises(TrainingError, match=r"step 100, had 0\.0078"):
        one.judge(150, *distances([0.08] * 9))


def flow(scale: float) -> Network:
    return lambda x, timestep, given: scale * x


def test_other_draws_have_other_noises_and_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    contract = contract_of({"shift": 3.0}, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=16)

    def sampled(draw: int, rank: int = 0, size: int = 1) -> torch.Tensor:
        prompts = Prompts(
            work(tmp_path, world=World(rank, size)), {}, {}, (4 // size, 2, 2, 3, 3), 2, 4, lambda noise, given: noise
        )
        return prompts.sampled(flow(0.3), contract, draw)[0]

    found = [sampled(draw) for draw in range(3)]
    assert len({float(one.sum()) for one in found}) == 3
    for draw, whole in enumerate(found):
        torch.testing.assert_close(torch.cat([sampled(draw, rank, 2) for rank in range(2)]), whole, rtol=0, atol=0)


class Clips:
    """Held-out clips of two sizes."""

    def by_size(self, draws: int, draw: torch.Generator) -> Any:
        for count, size in ((16, 4), (3, 2)):
            yield torch.randn(count, 2, 1, size, size, generator=generator("clips", size)), {}


class Summed(World):
    """One of several processes; what each gives is added up by whoever asks."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.given: dict[str, float] = {}

    def mean(self, values: Any) -> dict[str, float]:
        self.given = dict(values)
        return {name: max(value, 1e-300) for name, value in self.given.items()}


def test_groups_of_held_out_draws_make_up_the_whole(tmp_path: Path) -> None:
    contract = contract_of({"shift": 1.0}, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=16)
    clips: Any = Clips()

    def elbo(world: World) -> HeldOutELBO:
        return HeldOutELBO(clips, contract, 19, 0, "cpu", 4, world)

    found = elbo(World())(flow(0.5))
    assert len(found.groups) == GROUPS
    sizes = [3.0] * 3 + [2.0] * 5  # 16 clips and 3 in turn
    whole = sum(size * loss for size, loss in zip(sizes, found.groups, strict=True)) / sum(sizes)
    assert found.loss == pytest.approx(whole, rel=1e-12)
    assert len(set(found.groups)) == GROUPS
    parts = [Summed(rank, 2) for rank in range(2)]
    for part in parts:
        elbo(part)(flow(0.5))
    for group, size in enumerate(sizes):
        assert sum(part.given[f"1 {group}"] for part in parts) == size
        loss = sum(part.given[f"0 {group}"] for part in parts) / size
        assert loss == pytest.approx(found.groups[group], rel=1e-9)
    assert FLOW is contract.process


def test_held_out_figures_of_groups_are_made_as_those_of_the_whole() -> None:
    contract = contract_of({"shift": 1.0}, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=16)
    clips: Any = Clips()
    elbo = HeldOutELBO(clips, contract, 19, 0, "cpu", 4, World())
    first = elbo(flow(0.0))
    health = HeldOutHealth(
        elbo, {"now": flow(0.4)}, lambda loss: {**loss, "drift": loss["now"] / loss["first"] - 1.0},
        fixed={"first": first},
    )  # fmt: skip
    figures, again = health.look(2), health.again(2)
    now = elbo(flow(0.4))
    assert figures == {"now": now.loss, "first": first.loss, "drift": now.loss / first.loss - 1.0}
    assert again == [
        {"now": one, "first": other, "drift": one / other - 1.0}
        for one, other in zip(now.groups, first.groups, strict=True)
    ]
