"""Reading real video files."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flcompress.data.video_frames import BrokenVideo
from flcompress.data.videos import at_rate, check_rate, read_clip, video_size
from tests.fixtures.video_files import write_video

QUARTER_TURN = (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
UPRIGHT = (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


def matrix(numbers: tuple[int, ...]) -> bytes:
    return b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
def test_sizes_and_frames_in_every_container(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}", frames=7, height=32, width=48)
    assert video_size(path) == (7, 32, 48)
    clip = read_clip(path, (5, 32, 48), resize=False)
    assert clip.shape == (3, 5, 32, 48)
    assert clip.min() >= -1.0
    assert clip.max() <= 1.0
    # The bright square is where it was drawn, one pixel further right in each frame.
    bright = clip.mean(dim=0) > 0.5
    assert [int(frame.nonzero()[:, 1].float().mean().round()) for frame in bright] == pytest.approx(range(6, 11), abs=1)


def test_an_animated_picture_is_a_video(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (32, 40, 3), dtype=np.uint8)) for _ in range(6)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100, loop=0)
    assert video_size(tmp_path / "a.gif") == (6, 32, 40)
    assert read_clip(tmp_path / "a.gif", (5, 32, 40), resize=False).shape == (3, 5, 32, 40)


def test_cropping_keeps_the_centre(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=1, height=48, width=64)
    whole = read_clip(path, (1, 48, 64), resize=False)
    assert torch.equal(read_clip(path, (1, 32, 32), resize=False), whole[:, :, 8:40, 16:48])


@pytest.mark.parametrize("bucket", [(1, 24, 24), (1, 24, 40), (1, 96, 96)])
def test_resizing_covers_the_size_and_keeps_the_shape_of_things(tmp_path: Path, bucket: tuple[int, int, int]) -> None:
    path = write_video(tmp_path / "a.mp4", frames=1, height=48, width=64)
    clip = read_clip(path, bucket, resize=True)
    assert clip.shape == (3, *bucket)
    rows, columns = (clip[:, 0].mean(dim=0) > 0.4).nonzero().T
    if bucket == (1, 24, 40):  # 5/8 of the width covers it: the square of 8 becomes one of 5
        assert int(columns.max() - columns.min()) == pytest.approx(4, abs=1)
        assert int(columns.min()) == pytest.approx(2 * 5 / 8, abs=1)
    if bucket == (1, 96, 96):  # twice as large, 16 columns cut on each side
        assert int(rows.max() - rows.min()) == pytest.approx(15, abs=2)
        assert int(rows.min()) == pytest.approx(8, abs=2)


def test_a_video_that_a_phone_marked_as_turned_is_set_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=1, height=32, width=48)
    upright = read_clip(path, (1, 32, 48), resize=False)
    data = path.read_bytes()
    header = data.index(b"tkhd")
    place = data.index(matrix(UPRIGHT), header)
    path.write_bytes(data[:place] + matrix(QUARTER_TURN) + data[place + 36 :])
    assert video_size(path) == (1, 48, 32)
    turned = read_clip(path, (1, 48, 32), resize=False)
    # Shown turned clockwise by a quarter: what was the left edge is on top.
    assert torch.equal(turned, torch.rot90(upright, -1, dims=(2, 3)))
    assert read_clip(path, (1, 24, 16), resize=True).shape == (3, 1, 24, 16)


def broken(tmp_path: Path) -> dict[str, Path]:
    whole = write_video(tmp_path / "whole.mp4", frames=20, height=48, width=64).read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "text": b"this is no video\n", "empty": b""}
    for name, data in contents.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
    return {name: tmp_path / f"{name}.mp4" for name in contents}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut", r"cannot be decoded \(Invalid data found when processing input\)"),
        ("text", r"cannot be decoded \(Invalid data found when processing input\)"),
        ("empty", "an empty file"),
    ],
)
def test_a_broken_file_says_why(tmp_path: Path, name: str, reason: str) -> None:
    path = broken(tmp_path)[name]
    with pytest.raises(BrokenVideo, match=f"^{reason}$"):
        video_size(path)
    with pytest.raises(BrokenVideo, match=f"^{reason}$"):
        read_clip(path, (5, 32, 32), resize=False)


def test_a_file_whose_header_promises_more_than_there_is(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", frames=40, height=48, width=64)
    data = path.read_bytes()
    assert video_size(path)[0] == 40
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BrokenVideo, match=r"^\d+ frames can be decoded, 37 expected from its header$"):
        read_clip(path, (37, 48, 64), resize=False)


def test_a_title_that_is_no_text_does_not_matter(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", frames=5, title="TITLETITLE")
    path.write_bytes(path.read_bytes().replace(b"TITLETITLE", b"\xff\xfe\xfd\xfc\xff\xfe\xfd\xfc\xff\xfe"))
    assert video_size(path) == (5, 32, 32)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(BrokenVideo, match=r"^no video in it$"):
        video_size(tmp_path / "a.wav")


def test_damage_in_the_middle_is_not_hidden(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=60, height=96, width=128)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    size = int.from_bytes(data[start - 4 : start], "big")
    data[start + size // 4 : start + size // 2] = bytes(size // 2 - size // 4)
    path.write_bytes(data)
    with pytest.raises(BrokenVideo):  # a decoder fills such frames in from their neighbours
        read_clip(path, (57, 96, 128), resize=False)


def columns(clip: torch.Tensor) -> list[int]:
    """Which frame of `write_video` each frame of a clip is, by where its square is."""
    bright = clip.mean(dim=0) > 0.5
    return [int(frame.nonzero()[:, 1].float().mean()) - 5 for frame in bright]


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (24, 24.0, [0, 1, 2, 3, 4]),
        (Fraction(24000, 1001), 24.0, [0, 1, 2, 3, 4]),
        (48, 24.0, [0, 2, 4, 6, 8]),
        (24, 16.0, [0, 1, 3, 4, 6]),  # 0, 1.5, 3, 4.5 and 6 frames; halves are the earlier one's
        (Fraction(30000, 1001), 16.0, [0, 2, 4, 6, 7]),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_are_taken_at_a_rate(
    tmp_path: Path, suffix: str, rate: Fraction | int, fps: float, expected: list[int]
) -> None:
    path = write_video(tmp_path / f"a{suffix}", frames=16, rate=rate)
    frames, *_ = video_size(path, fps)
    assert frames == 1 + int((15 / rate + Fraction(1, 1000)) * Fraction(fps))
    assert columns(read_clip(path, (5, 32, 32), resize=False, fps=fps)) == pytest.approx(expected, abs=0)
    assert len(columns(read_clip(path, (frames, 32, 32), resize=False, fps=fps))) == frames


def test_uneven_frames_are_taken_when_they_are_shown(tmp_path: Path) -> None:
    """As phones record: the moments of 10 frames a second are those of frames 0, 1, 4, 5, not every other frame."""
    path = write_video(tmp_path / "a.mkv", frames=6, rate=100, ticks=[0, 10, 13, 16, 20, 30])
    assert video_size(path, 10.0) == (4, 32, 32)
    assert columns(read_clip(path, (4, 32, 32), resize=False, fps=10.0)) == [0, 1, 4, 5]


def test_a_video_of_fewer_frames_a_second_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=9, rate=8)
    for ask in (lambda: video_size(path, 16.0), lambda: read_clip(path, (9, 32, 32), resize=False, fps=16.0)):
        with pytest.raises(BrokenVideo, match=r"^8 frames a second, expected at least 16$"):
            ask()
    assert video_size(write_video(tmp_path / "one.mp4", frames=1), 16.0) == (1, 32, 32)  # a picture has no rate


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 0.2), min_size=1, max_size=60), st.floats(1.0, 60.0))
def test_each_moment_gets_its_nearest_frame(gaps: list[float], fps: float) -> None:
    times = [3.0, *(3.0 + total for total in accumulate(gaps))]
    try:
        check_rate(times, fps)
    except BrokenVideo:
        assert len(gaps) / sum(gaps) < fps
        return
    chosen = list(at_rate(zip(times, range(len(times)), strict=True), fps))
    assert chosen[0] == 0
    assert chosen == sorted(chosen)
    assert len(chosen) == pytest.approx((times[-1] - times[0]) * fps + 1, abs=1.0)
    for number, place in enumerate(chosen):
        apart = [abs(time - 3.0 - number / fps) for time in times]
        assert apart[place] == pytest.approx(min(apart), abs=1e-3)
