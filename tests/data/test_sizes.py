"""Buckets: what size a clip is encoded at."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.data.captions import CaptionedVideo
from flcompress.data.encoder import ClipTask, PromptTask, Skipped
from flcompress.data.planning import plan_clips, plan_prompts
from flcompress.data.sizes import Target
from flcompress.errors import RequestError
from flcompress.models.latent_size import Grid

VIDEO, IMAGE = (Grid(over_time=time, over_space=8, patch=(1, 2), image=time == 1) for time in (4, 1))
PATCHED = Grid(over_time=4, over_space=8, patch=(2, 2))
"""CogVideoX 1.5: a token is two latent frames."""
FIXED = Grid(over_time=4, over_space=8, patch=(1, 2), fixed=(480, 720))
grids = st.builds(
    Grid,
    over_time=st.sampled_from([4, 6, 8]),
    over_space=st.sampled_from([8, 16]),
    patch=st.tuples(st.integers(1, 3), st.sampled_from([1, 2])),
) | st.just(IMAGE)
sizes = st.tuples(st.integers(1, 200), st.integers(1, 2000), st.integers(1, 2000))


@settings(deadline=None)
@given(sizes, grids, st.none() | st.integers(1, 200))
def test_without_a_wanted_size_a_clip_only_loses(size: tuple[int, int, int], grid: Grid, most: int | None) -> None:
    bucket = Target(frames=most).bucket(size, grid)
    frames = min(size[0], most or size[0])
    if bucket is None:
        assert min(size[1:]) < grid.pixels
        return
    assert all(kept_side <= own_side for kept_side, own_side in zip(bucket, size, strict=True))
    grid.check(*bucket)
    shape = grid.latents(*bucket)
    assert grid.clip(shape) == bucket
    assert (shape[0] % grid.patch[0], shape[1] % grid.patch[1], shape[2] % grid.patch[1]) == (0, 0, 0)
    # As large as can be: one step more would not fit.
    assert all(bucket[place] + grid.pixels > size[place] for place in (1, 2))
    assert bucket[0] == 1 if grid.image else frames - grid.step < bucket[0] <= frames
    assert Target(frames=most).bucket(bucket, grid) == bucket


@settings(deadline=None)
@given(sizes, grids, st.integers(1, 20), st.integers(1, 20))
def test_with_a_wanted_size_every_clip_gets_it(size: tuple[int, int, int], grid: Grid, h: int, w: int) -> None:
    target = Target(height=h * grid.pixels, width=w * grid.pixels)
    target.check(grid)
    assert target.bucket(size, grid) == (grid.fit_frames(size[0]), h * grid.pixels, w * grid.pixels)


@pytest.mark.parametrize(
    ("target", "grid", "message"),
    [
        (Target(frames=80), VIDEO,
         "frames: 80 given, expected 1 plus a multiple of 4 for this model, such as 77 or 81"),
        (Target(frames=85), PATCHED,
         "frames: 85 given, expected 1 plus a multiple of 8 for this model, such as 81 or 89"),
        (Target(height=480, width=832), FIXED,
         "width: 832 given, expected 720: the positions of this model are learned for 480 x 720"),
        (Target(frames=9), IMAGE, "frames: 9 given, expected 1, as this model makes images"),
        (Target(height=500, width=832), VIDEO,
         "height: 500 given, expected a multiple of 16 for this model, such as 496 or 512"),
        (Target(height=480, width=8), VIDEO,
         "width: 8 given, expected a multiple of 16 for this model, such as 16 or 32"),
        (Target(height=480), VIDEO, "height and width: one of them given, expected both or neither"),
    ],
)  # fmt: skip
def test_a_size_the_model_does_not_take_is_refused(target: Target, grid: Grid, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        target.check(grid)
    assert str(refused.value) == message


def test_latents_are_padded_to_whole_tokens() -> None:
    """As CogVideoX 1.5's pipeline does it, which samples 81 frames (21 of latents) as 22 and throws the first away."""
    assert PATCHED.latents(81, 768, 1360) == (22, 96, 170)
    assert PATCHED.clip((22, 96, 170)) == (81, 768, 1360)


def test_a_model_of_one_size_gets_every_clip_at_it() -> None:
    assert Target(frames=9).fixed_to(FIXED).bucket((30, 1080, 1920), FIXED) == (9, 480, 720)
    assert Target(frames=9).fixed_to(VIDEO) == Target(frames=9)


clips = st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.sampled_from([(9, 32, 32), (5, 32, 48), (9, 4, 4)])))


@settings(deadline=None)
@given(clips)
def test_every_video_is_in_one_shard_of_its_size_or_skipped(
    given_clips: list[tuple[str, tuple[int, int, int] | None]],
) -> None:
    captioned = [CaptionedVideo(f"{n}.mp4", text) for n, (text, _) in enumerate(given_clips)]
    measured = {
        f"{n}.mp4": Skipped(f"{n}.mp4", "broken") if size is None else size for n, (_, size) in enumerate(given_clips)
    }
    plan = plan_clips(captioned, measured, ["more.mp4"], Target(), Grid(over_time=4, over_space=8))
    tasks = [task for task in plan.tasks if isinstance(task, ClipTask)]
    placed = [clip.file for task in tasks for clip in task.clips]
    assert sorted([*placed, *(video.file for video in plan.skipped)]) == sorted([*measured, "more.mp4"])
    assert all(measured[clip.file] == task.bucket for task in tasks for clip in task.clips)
    texts = {video.file: video.caption for video in captioned}
    assert all(plan.prompts[clip.prompt] == texts[clip.file] for task in tasks for clip in task.clips)
    assert plan.prompts[0] == ""
    assert len(set(plan.prompts)) == len(plan.prompts)
    assert len({task.file for task in plan.tasks}) == len(plan.tasks)


@settings(deadline=None)
@given(st.lists(st.text()))
def test_each_prompt_is_in_one_shard(texts: list[str]) -> None:
    plan = plan_prompts(texts)
    assert set(plan.prompts) == {"", *texts}
    assert all(isinstance(task, PromptTask) for task in plan.tasks)
    assert tuple(text for task in plan.tasks if isinstance(task, PromptTask) for text in task.texts) == plan.prompts


def test_shards_are_limited_by_pixels() -> None:
    measured: dict[str, tuple[int, int, int] | Skipped] = {f"{n}.mp4": (81, 480, 832) for n in range(20)}
    plan = plan_clips([CaptionedVideo(file, "x") for file in measured], measured, [], Target(), VIDEO)
    assert [task.size for task in plan.tasks if isinstance(task, ClipTask)] == [8, 8, 4]
