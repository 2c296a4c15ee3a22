"""Luck on one draw of noises stops nothing; a training that has got worse on every draw is stopped."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.core.settings import Health, highest
from flcompress.core.steps import PassContext
from flcompress.diffusion.contract import contract_of
from flcompress.diffusion.network import Conditioning, Network
from flcompress.diffusion.process import FLOW
from flcompress.distributed.world import World
from flcompress.draws import generator
from flcompress.errors import TrainingError
from flcompress.training.distillation import samples
from flcompress.training.distillation.samples import TEACHER_REDRAWS, Prompts, Samples
from flcompress.training.watching.held_out import GROUPS, HeldOutELBO, HeldOutEvaluation
from flcompress.training.watching.monitor import BREACHES_FILE, NO_REDRAWS, REDRAWS, REDRAWS_FILE, Limit, Redraws, Watch
from tests.training.test_loop import no_data, silent

LIMITS = {"lag": Limit(setting="max_critic_lag", high=1.0)}


def work(folder: Path, said: list[str] | None = None, world: World | None = None, **health: Any) -> PassContext:
    return PassContext(
        directory=folder,
        seed=0,
        data=no_data,
        progress=silent,
        say=(said if said is not None else []).append,
        world=world or World(),
        health=Health(every=2, **health),
    )


def watch(given: PassContext) -> Watch:
    return Watch(given, name="test", evaluate=lambda step: {}, held_out="distance", limits=LIMITS)


TEACHER = [0.0024, 0.0008]
"""Distances of the teacher's own samples with other noises, on moving digits with 8 samples."""


def distances(values: Sequence[float], teacher: Sequence[float] = ()) -> tuple[dict[str, float], Redraws]:
    """Figures on the fixed draw, which comes first, and on the others."""
    others = [[{"distance": value} for value in some] for some in (values[1:], teacher)]
    return {"distance": values[0]}, Redraws(*others)


class Distances:
    """Squared distances |mu + n - m|^2 of samples with noise n from a teacher's, which have noise m.

    In three directions (those of moving digits are as good as two and a half), with E|n|^2 = E|m|^2 = 0.001. The noise
    of every look is independent of the last one's: no training moves faster.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.reference = self.noise()
        self.teacher = [self.distance(0.0) for _ in range(2)]

    def noise(self) -> list[float]:
        return [self.draw.gauss(0.0, math.sqrt(0.001 / 3)) for _ in range(3)]

    def distance(self, truth: float) -> float:
        mean = [math.sqrt(truth), 0.0, 0.0]
        away = math.dist([mu + n for mu, n in zip(mean, self.noise(), strict=True)], self.reference)
        return away * away

    def look(self, truth: float) -> tuple[dict[str, float], Redraws]:
        return distances([self.distance(truth) for _ in range(1 + REDRAWS)], self.teacher)


def stopped_at(seed: int, folder: Path, truth: Callable[[int], float], *, redraws: bool = True) -> int | None:
    """The look at which a training whose true distance is a function of the look is stopped."""
    made, one = Distances(seed), watch(work(folder))
    for look in range(40):
        figures, again = made.look(truth(look))
        try:
            one.judge(2 * look, figures, again if redraws else NO_REDRAWS)
        except TrainingError:
            return look
    return None


def descending(look: int) -> float:
    """From 0.15, half of it at every look, down to a student that is as the teacher is."""
    return 0.15 * 0.5**look


def wandering(look: int) -> float:
    """The same, but then as far from the teacher and back as 8 of its samples can tell."""
    return max(descending(look), 0.001 * math.sin(look) ** 2)


@pytest.mark.parametrize("truth", [descending, wandering])
def test_a_student_at_the_noise_floor_is_not_stopped(truth: Callable[[int], float], tmp_path: Path) -> None:
    """Of 300 trainings with 40 looks each. Judged by one draw nearly all of them are stopped."""
    runs = [stopped_at(seed, tmp_path, truth) for seed in range(300)]
    assert [at for at in runs if at is not None] == []
    by_one_draw = [stopped_at(seed, tmp_path, truth, redraws=False) for seed in range(50)]
    assert sum(at is not None for at in by_one_draw) > 45


@pytest.mark.parametrize(("truth", "at_once", "in_time"), [(1.0, 100, 100), (0.15, 99, 100), (0.05, 75, 85)])
def test_a_student_that_runs_away_is_stopped(truth: float, at_once: int, in_time: int, tmp_path: Path) -> None:
    """From the 21st look on it is beyond where it began, as far as there, at a third of that.

    Of 100 trainings, how many are stopped at that look, and at one of the first four.
    """
    runs = [stopped_at(seed, tmp_path, lambda look: descending(look) if look < 20 else truth) for seed in range(100)]
    assert sum(at == 20 for at in runs) >= at_once
    assert sum(at is not None and 20 <= at < 24 for at in runs) >= in_time


SEEN = {
    0: [0.1498, 0.1427, 0.1309, 0.1668, 0.1379, 0.1311, 0.1457, 0.1482, 0.1484],
    50: [0.0039, 0.0018, 0.0023, 0.0022, 0.0024, 0.0022, 0.0035, 0.0038, 0.0028],
    100: [0.0017, 0.0015, 0.0020, 0.0022, 0.0013, 0.0017, 0.0021, 0.0012, 0.0010],
    150: [0.0029, 0.0035, 0.0041, 0.0018, 0.0036, 0.0020, 0.0031, 0.0032, 0.0024],
    200: [0.0078, 0.0093, 0.0069, 0.0023, 0.0072, 0.0051, 0.0067, 0.0062, 0.0062],
}
"""`sample_distance` of moving digits with one critic update a step, on the fixed draw and on the others."""


def test_what_was_seen_is_no_breach(tmp_path: Path) -> None:
    """A student as good as any ended so; one that is again as far away as half of the start is stopped."""
    one = watch(work(tmp_path))
    for step, values in SEEN.items():
        one.judge(step, *distances(values, TEACHER))
    assert one.best == (100, 0.0017)
    assert not (tmp_path / BREACHES_FILE).exists()
    halfway = [value / 2 for value in SEEN[0]]
    with pytest.raises(TrainingError) as error:
        one.judge(300, *distances(halfway, TEACHER))
    assert str(error.value) == (
        "test: step 300: distance 0.0749 (0.06545 to 0.0834 on 8 other draws), expected at most 0.02211 "
        "(training.health.max_worsening); the best evaluation, step 100, had 0.0017: train for fewer steps, or lower "
        "learning_rate; see docs/health.md; stopped, the last good checkpoint is kept"
    )
    (breach,) = [json.loads(line) for line in (tmp_path / BREACHES_FILE).read_text().splitlines()]
    assert breach["redrawn"] == halfway[1:]


def test_without_the_teachers_spread_every_draw_is_compared_with_itself(tmp_path: Path) -> None:
    one = watch(work(tmp_path))
    one.judge(2, *distances([1.0, 0.5, 2.0]))
    one.judge(4, *distances([4.0, 1.6, 5.9]))  # the last one is within 3 x 2
    with pytest.raises(TrainingError, match=r"distance 3\.1 \(1\.6 to 6\.1 on 2 other draws\), expected at most 3 "):
        one.judge(6, *distances([3.1, 1.6, 6.1]))


def test_the_limit_allows_for_the_error_of_the_reference_at_both_looks() -> None:
    """|mu| <= sqrt(D) + e at the best evaluation and |mu| >= sqrt(D') - e now: worse by w for sure only beyond that."""
    assert highest(0.04, 2.0) == pytest.approx(0.12, rel=1e-15)
    assert math.sqrt(highest(0.04, 3.0, 0.02)) - 0.1 == pytest.approx(2 * (0.2 + 0.1), rel=1e-12)


def test_no_limit_is_narrower_than_the_teacher_itself(tmp_path: Path) -> None:
    teacher = Redraws([{"lag": 1.3}] * 8, [{"lag": 1.25}, {"lag": 0.5}])
    one = watch(work(tmp_path))
    one.judge(2, {"lag": 1.2}, teacher)
    with pytest.raises(TrainingError, match=r"expected at most 1\.25 "):
        one.judge(4, {"lag": 1.3}, teacher)


def test_an_absolute_limit_is_broken_on_every_draw_too(tmp_path: Path) -> None:
    said: list[str] = []
    one = watch(work(tmp_path, said, on_breach="warn"))
    one.judge(2, {"lag": 1.4}, Redraws([{"lag": 1.2}] * 7 + [{"lag": 0.9}]))
    assert said == []
    one.judge(4, {"lag": 1.4}, Redraws([{"lag": 1.2}] * 8))
    one.judge(6, {"lag": 1.4}, Redraws([{"other": 1.2}] * 8))  # still beyond, which is said once
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
        one.judge(4, {figure: value}, Redraws([{figure: 0.5}] * 8))


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
    lines = [{"step": step, **asdict(distances(values)[1])} for step, values in enumerate(log)]
    (folder / REDRAWS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines[:broken_at]))
    again.resume([{"step": step, **distances(values)[0]} for step, values in enumerate(log[:broken_at])])
    for step, values in enumerate(log[broken_at:], start=broken_at):
        again.judge(step, *distances(values))
    assert again.best == whole.best
    if broken_at < len(log):
        assert said == whole_said[before:]


def test_a_training_begun_before_there_were_redraws_is_not_stopped_by_luck(tmp_path: Path) -> None:
    """Its best evaluation was lucky, and nothing says how much: the first one on all draws replaces it."""
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

    def sample(draw: int, rank: int = 0, size: int = 1) -> torch.Tensor:
        prompts = Prompts(
            work(tmp_path, world=World(rank, size)), {}, {}, (4 // size, 2, 2, 3, 3), 2, 4, lambda noise, given: noise
        )
        return prompts.sample(flow(0.3), contract, draw)[0]

    found = [sample(draw) for draw in range(3)]
    assert len({float(one.sum()) for one in found}) == 3
    for draw, whole in enumerate(found):
        torch.testing.assert_close(torch.cat([sample(draw, rank, 2) for rank in range(2)]), whole, rtol=0, atol=0)


def test_the_teachers_redraws_are_made_once_and_added_to_an_older_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "draw_strip", lambda *given: [])
    contract = contract_of({"shift": 3.0}, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=16)
    calls: list[float] = []

    def teacher(x: torch.Tensor, timestep: torch.Tensor, given: Conditioning) -> torch.Tensor:
        calls.append(float(timestep[0]))
        return 0.5 * x

    def begun() -> Samples:
        prompts = Prompts(work(tmp_path), {}, {}, (3, 2, 2, 4, 4), 3, 3, lambda noise, given: noise)
        program: Any = None
        one = Samples(prompts, program, teacher, contract)
        one.figures(0, flow(0.4), contract)
        return one

    found = begun().teacher_figures()
    assert len(found) == TEACHER_REDRAWS
    assert len(calls) == 3 * (1 + TEACHER_REDRAWS)
    assert all(0.0 < one["sample_distance"] < 0.1 for one in found)
    assert len({one["sample_distance"] for one in found}) == TEACHER_REDRAWS
    assert begun().teacher_figures() == found
    assert len(calls) == 3 * (1 + TEACHER_REDRAWS)
    (tmp_path / "checkpoints/teacher-redraws.json").unlink()
    for one, other in zip(begun().teacher_figures(), found, strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    assert len(calls) == 3 * (1 + 2 * TEACHER_REDRAWS)


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

    def all_mean(self, values: Any) -> dict[str, float]:
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
    health = HeldOutEvaluation(
        elbo, {"now": flow(0.4)}, lambda loss: {**loss, "drift": loss["now"] / loss["first"] - 1.0},
        fixed={"first": first},
    )  # fmt: skip
    figures, again = health.evaluate(2), health.redraw(2)
    now = elbo(flow(0.4))
    assert figures == {"now": now.loss, "first": first.loss, "drift": now.loss / first.loss - 1.0}
    assert again.draws == [
        {"now": one, "first": other, "drift": one / other - 1.0}
        for one, other in zip(now.groups, first.groups, strict=True)
    ]
