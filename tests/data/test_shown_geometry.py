"""Pixel shapes, turned pictures, edit lists, cropping: a clip is what a player shows, or is left out."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flcompress.data import videos
from flcompress.data.video_frames import BrokenVideo
from flcompress.data.videos import read_clip, video_size
from tests.fixtures.mp4_boxes import H264, TRACK, box, edit_list, put, turn
from tests.fixtures.video_files import cut, write_video

ONE = 0x10000


def decoded(path: Path) -> torch.Tensor:
    """All frames as PyAV alone gives them: [3, frames, height, width] in [-1, 1]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def square(clip: torch.Tensor) -> tuple[float, float]:
    """(rows, columns) that the bright square of `write_video` takes."""
    bright = (clip[:, 0].mean(dim=0) > 0.3).nonzero()
    rows, columns = (bright.max(dim=0).values - bright.min(dim=0).values + 1).tolist()
    return rows, columns


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize(
    ("pixel", "size"),
    [
        ((4, 3), (32, 64)),
        ((3, 4), (43, 48)),  # one side is enlarged, none made smaller
        ((2, 1), (32, 96)),
        ((1, 1), (32, 48)),
        ((1000, 999), (32, 48)),  # less than a pixel from square
    ],
)
def test_pixels_that_are_not_square(tmp_path: Path, suffix: str, pixel: tuple[int, int], size: tuple[int, int]) -> None:
    path = write_video(tmp_path / f"a{suffix}", frames=2, height=32, width=48, pixel=pixel)
    assert video_size(path) == (2, *size)
    clip = read_clip(path, (2, *size), resize=False)
    assert square(clip) == pytest.approx((8 * size[0] / 32, 8 * size[1] / 48), abs=1)
    if size == (32, 48):
        assert torch.equal(clip, decoded(path))
    large = read_clip(path, (2, 2 * size[0], 2 * size[1]), resize=True)
    assert square(large) == pytest.approx((16 * size[0] / 32, 16 * size[1] / 48), abs=2)


def test_a_container_knows_the_shape_of_pixels_better_than_the_codec(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=2, height=32, width=48, pixel=(4, 3))
    assert video_size(put(path, H264, box(b"pasp", struct.pack(">II", 1, 1)))) == (2, 32, 48)
    assert video_size(put(path, H264, box(b"pasp", struct.pack(">II", 2, 1)))) == (2, 32, 96)
    with pytest.raises(BrokenVideo, match=r"^pixels of 100:1$"):
        video_size(put(path, H264, box(b"pasp", struct.pack(">II", 100, 1))))


@pytest.mark.parametrize("other", [{"pixel": (1, 1)}, {"width": 64}])
def test_a_picture_that_changes_shape_midway(tmp_path: Path, other: dict[str, object]) -> None:
    first = write_video(tmp_path / "a.h264", frames=12, width=48, pixel=(4, 3))
    second = write_video(tmp_path / "b.h264", frames=12, **({"width": 48} | other))  # type: ignore[arg-type]
    whole = tmp_path / "c.h264"
    whole.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(BrokenVideo, match=r"^its picture changes size or shape$"):
        video_size(whole)
    for resize in (False, True):
        with pytest.raises(BrokenVideo, match=r"^its picture changes size or shape$"):
            read_clip(whole, (24, 32, 32), resize=resize)
    assert video_size(whole, limit=2) == (2, 32, 64)


TURNS = {
    (ONE, 0, 0, ONE): lambda p: p,
    (0, ONE, -ONE, 0): lambda p: p.rot90(-1, (2, 3)),
    (-ONE, 0, 0, -ONE): lambda p: p.rot90(2, (2, 3)),
    (0, -ONE, ONE, 0): lambda p: p.rot90(1, (2, 3)),
    (-ONE, 0, 0, ONE): lambda p: p.flip(3),
    (ONE, 0, 0, -ONE): lambda p: p.flip(2),
    (0, ONE, ONE, 0): lambda p: p.transpose(2, 3),
    (0, -ONE, -ONE, 0): lambda p: p.flip(2, 3).transpose(2, 3),
    (0, 0, 0, 0): lambda p: p,
}
"""Display matrices, and what they make of a picture [3, frames, height, width]."""


def matrix(a: int, b: int, c: int, d: int) -> tuple[int, ...]:
    return a, b, 0, c, d, 0, 0, 0, 0x40000000


@pytest.mark.parametrize("numbers", list(TURNS))
def test_turned_and_mirrored_pictures_are_set_upright(tmp_path: Path, numbers: tuple[int, int, int, int]) -> None:
    path = write_video(tmp_path / "a.mp4", frames=2, height=32, width=48)
    upright = TURNS[numbers](decoded(path))
    turn(path, matrix(*numbers))
    size = video_size(path)
    assert size == tuple(upright.shape[1:])
    assert torch.equal(read_clip(path, size, resize=False), upright)
    assert read_clip(path, (2, 24, 16), resize=True).shape == (3, 2, 24, 16)


def test_a_turned_picture_of_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=1, height=32, width=48, pixel=(4, 3))
    lying = read_clip(path, (1, 32, 64), resize=False)
    turn(path, matrix(0, ONE, -ONE, 0))
    assert video_size(path) == (1, 64, 32)
    assert torch.equal(read_clip(path, (1, 64, 32), resize=False), lying.rot90(-1, (2, 3)))


@pytest.mark.parametrize(
    "numbers", [(56756, 32768, -32768, 56756), (ONE, ONE // 2, 0, ONE), (0, ONE, -2 * ONE, 0)], ids=repr
)
def test_a_picture_turned_by_another_angle_is_left_out(tmp_path: Path, numbers: tuple[int, int, int, int]) -> None:
    path = turn(write_video(tmp_path / "a.mp4", frames=1, height=32, width=48), matrix(*numbers))
    with pytest.raises(BrokenVideo, match=r"^turned by [\d.]+ degrees or sheared; turn it upright first$"):
        video_size(path)


def test_a_frame_with_data_that_pyav_does_not_know_is_turned_by_its_angle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(frame: object) -> None:
        raise ValueError("31 is not a valid Type")

    path = write_video(tmp_path / "a.mp4", frames=1, height=32, width=48)
    upright = decoded(path).rot90(-1, (2, 3))
    turn(path, matrix(0, ONE, -ONE, 0))
    monkeypatch.setattr(videos, "display_matrix", unknown)
    assert torch.equal(read_clip(path, (1, 48, 32), resize=False), upright)


def test_a_camera_that_turns_every_picture_by_exif(tmp_path: Path) -> None:
    """As old cameras do in AVI: each frame is a JPEG file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = io.BytesIO()
    Image.fromarray(np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)).save(pictures, "JPEG", exif=exif)
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for number in range(3):
            packet = av.Packet(pictures.getvalue())
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 8), number, number
            packet.is_keyframe = True
            container.mux(packet)
    assert video_size(path) == (3, 48, 32)


def test_a_picture_in_the_container_of_videos_is_left_out(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=1)
    path.write_bytes(path.read_bytes().replace(b"ftypisom", b"ftypheic"))
    with pytest.raises(BrokenVideo, match=r"^a HEIF picture; save it as PNG or JPEG$"):
        video_size(path)


def test_what_the_container_cuts_off_is_left_out(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=1, height=32, width=48)
    put(path, H264, box(b"clap", struct.pack(">8i", 40, 1, 24, 1, 0, 1, 0, 1)))
    with pytest.raises(BrokenVideo, match=r"^its container crops the picture"):
        video_size(path)
    named = write_video(tmp_path / "b.mp4", frames=1, title="frame cropping: 1/1/1/1\n frame cropping: 1")
    assert video_size(named) == (1, 32, 32)


def columns(clip: torch.Tensor) -> list[int]:
    """Which frame of `write_video` each frame of a clip is, by where its square is."""
    return [int(frame.nonzero()[:, 1].float().mean()) - 5 for frame in clip.mean(dim=0) > 0.5]


def shown(path: Path, fps: float | None = None) -> list[int]:
    size = video_size(path, fps)
    return columns(read_clip(path, size, resize=False, fps=fps))


@pytest.mark.parametrize("between", ["0", "2"])
@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([(2500, 4)], range(4, 24)),  # from the fifth frame on; decoding starts at the key before it
        ([(1500, 12)], range(12, 24)),
        ([(1000, 0)], range(8)),
        ([(1000, 5)], range(5, 13)),
        ([(500, -1), (1000, 0)], range(8)),  # nothing for half a second
        ([(500, 0), (1000, 10)], [*range(4), *range(10, 18)]),
        ([(500, 0), (500, 0)], [*range(4), *range(4)]),
    ],
)
def test_what_an_edit_list_hides_is_not_there(
    tmp_path: Path, between: str, edits: list[tuple[int, int]], expected: list[int]
) -> None:
    path = write_video(tmp_path / "a.mp4", frames=24, width=64, gop=8, options={"bf": between, "qp": "10"})
    with av.open(str(path)) as container:
        base = container.streams.video[0].time_base
    assert base is not None
    frame = int(Fraction(1, 8) / base)
    late = 2 * frame if between == "2" else 0  # the time of the first frame shown, where others are decoded before
    put(path, TRACK, edit_list([(length, -1 if start < 0 else late + start * frame) for length, start in edits]))
    assert shown(path) == list(expected)
    if len(edits) == 1:
        assert shown(path, 4.0) == list(expected)[::2]


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("between", ["0", "2"])
def test_a_video_cut_without_encoding_again(tmp_path: Path, suffix: str, between: str) -> None:
    source = write_video(tmp_path / "long.mp4", frames=40, width=64, gop=20, options={"bf": between, "qp": "10"})
    path = cut(source, tmp_path / f"a{suffix}", 30 / 8)
    assert shown(path) == list(range(30, 40))
    assert shown(path, 4.0) == list(range(30, 40, 2))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("between", ["0", "2"])
def test_frames_before_the_first_key_cannot_be_shown(tmp_path: Path, suffix: str, between: str) -> None:
    source = write_video(tmp_path / "long.mp4", frames=24, width=64, gop=8, options={"bf": between, "qp": "10"})
    path = cut(source, tmp_path / f"a{suffix}", 0.0, without=5)
    assert shown(path) == list(range(8, 24))
    assert shown(path, 4.0) == list(range(8, 24, 2))


def test_measuring_counts_no_further_than_asked(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=9)
    assert video_size(path, limit=5) == (5, 32, 32)
    assert video_size(path, 4.0, limit=3) == (3, 32, 32)
    assert video_size(path, limit=50) == (9, 32, 32)


def test_a_header_that_promises_more_than_can_be_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", frames=40, height=48, width=64, gop=5, options={"bf": "0"})
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"00dc", 0, len(data) * 2 // 3)])
    with pytest.raises(BrokenVideo, match=r"^\d+ frames can be decoded, 40 expected from its header$"):
        video_size(path)
    assert video_size(path, limit=9) == (9, 48, 64)


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        film = container.add_stream("libx264", rate=8)
        film.width, film.height, film.pix_fmt = 32, 48, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
        for _ in range(3):
            container.mux(film.encode(av.VideoFrame.from_ndarray(np.zeros((48, 32, 3), np.uint8), format="rgb24")))
        container.mux(film.encode())
    assert video_size(path) == (3, 48, 32)


def test_a_name_is_no_protocol_and_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "a%03d.mp4", "new\nline.mp4"):
        assert video_size(write_video(Path(name).absolute(), frames=1).relative_to(tmp_path)) == (1, 32, 32)
