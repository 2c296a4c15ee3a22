"""Colour matrices and ranges, HDR, alpha, interlacing: a clip is what a player shows, or is left out."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from flcompress.data.video_frames import BrokenVideo
from flcompress.data.videos import read_clip, video_size
from tests.fixtures.mp4_boxes import H264, box, put
from tests.fixtures.video_files import Tags, write_colour, write_video

RED = (200, 40, 40)
OTHER = (30, 90, 210)


def shown(path: Path) -> list[int]:
    """The colour in the middle of the first frame: three numbers up to 255."""
    frames, height, width = video_size(path)
    clip = read_clip(path, (frames, height, width), resize=False)
    return [round((float(value) + 1) * 127.5) for value in clip[:, 0, height // 2, width // 2]]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("colour", [RED, OTHER])
def test_a_colour_is_what_the_video_says(tmp_path: Path, matrix: int, full: bool, colour: tuple[int, int, int]) -> None:
    tags = Tags(matrix, primaries=1, range=2 if full else 1)
    assert shown(write_colour(tmp_path / "a.mp4", colour, tags)) == pytest.approx(colour, abs=3)


@pytest.mark.parametrize(
    ("height", "width", "matrix"),
    [(32, 32, 5), (576, 16, 5), (16, 1264, 5), (592, 16, 1), (16, 1280, 1)],
)
def test_of_a_video_that_does_not_say_the_size_decides(tmp_path: Path, height: int, width: int, matrix: int) -> None:
    path = write_colour(tmp_path / "a.mp4", RED, Tags(), stored_by=matrix, height=height, width=width, said=False)
    assert shown(path) == pytest.approx(RED, abs=3)


def test_what_only_the_container_says(tmp_path: Path) -> None:
    """A VP9 stream has no place for some of it, and its decoder forgets what the container told it."""
    plain = write_colour(tmp_path / "a.webm", RED, Tags(1), codec="libvpx-vp9", said=False)
    path = tmp_path / "b.mkv"
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        copy.codec_context.colorspace = 1
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
    assert shown(path) == pytest.approx(RED, abs=3)
    assert shown(plain) != pytest.approx(RED, abs=3)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        (Tags(9, 9, 16), r"HDR \(PQ\); convert it to standard range \(BT\.709\) first"),
        (Tags(9, 9, 18), r"HDR \(HLG\); convert"),
        (Tags(1, 1, 16), r"HDR \(PQ\); convert"),
        (Tags(1, 1, 8), r"linear transfer; convert"),
        (Tags(9, 9, 14), r"a wide gamut \(BT\.2020\); convert it to BT\.709 first"),
        (Tags(9), r"a wide gamut \(BT\.2020\)"),
        (Tags(1, 12), r"a wide gamut \(Display P3\)"),
        (Tags(1, 11), r"a wide gamut \(DCI-P3\)"),
        (Tags(8, 1, 1), r"a colour matrix that is not converted \(number 8 of H\.273\)"),
        (Tags(10, 1, 1), r"a colour matrix that is not converted \(number 10 of H\.273\)"),
    ],
)
def test_what_no_ordinary_screen_shows_is_left_out(tmp_path: Path, tags: Tags, reason: str) -> None:
    path = write_colour(tmp_path / "a.mp4", RED, tags, stored_by=1)
    with pytest.raises(BrokenVideo, match=rf"^{reason}"):
        video_size(path)
    with pytest.raises(BrokenVideo, match=rf"^{reason}"):
        read_clip(path, (1, 16, 16), resize=True)


@pytest.mark.parametrize("primaries", [2, 4, 5, 6, 7])
def test_primaries_near_those_of_bt709_are_taken_as_they_are(tmp_path: Path, primaries: int) -> None:
    assert shown(write_colour(tmp_path / "a.mp4", RED, Tags(6, primaries, 6))) == pytest.approx(RED, abs=3)


def test_dolby_vision_is_left_out(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=1)
    record = box(b"dvcC", bytes([1, 0, 5 << 1, 0b1101]) + bytes(20))
    with pytest.raises(BrokenVideo, match=r"^Dolby Vision; convert it to standard range \(BT\.709\) first$"):
        video_size(put(path, H264, record))
    path = write_video(tmp_path / "b.mp4", frames=1)
    path.write_bytes(path.read_bytes().replace(b"avc1\0\0\0\0", b"dva1\0\0\0\0"))
    with pytest.raises(BrokenVideo, match=r"^Dolby Vision"):
        video_size(path)


def test_interlaced_video_is_left_out(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", height=48, options={"x264-params": "tff=1"})
    with pytest.raises(BrokenVideo, match=r"^interlaced; deinterlace it first"):
        video_size(path)


@pytest.mark.parametrize("name", ["a.mov", "b.mov", "c.gif", "d.png"])
@pytest.mark.parametrize("hidden", [0, 255])
def test_only_what_is_opaque_everywhere_is_shown(tmp_path: Path, name: str, hidden: int) -> None:
    from PIL import Image

    picture = np.full((32, 48, 4), 255, np.uint8)
    picture[..., :3] = RED
    picture[:8, :8, 3] = hidden
    path = tmp_path / name
    if path.suffix == ".mov":
        with av.open(str(path), "w") as container:
            stream = container.add_stream({"a.mov": "qtrle", "b.mov": "png"}[name], rate=8)
            stream.width, stream.height, stream.pix_fmt = 48, 32, {"a.mov": "argb", "b.mov": "rgba"}[name]
            for _ in range(2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
            container.mux(stream.encode())
    else:
        Image.fromarray(picture).save(path)
    if hidden:
        assert shown(path) == pytest.approx(RED, abs=1)
        return
    with pytest.raises(BrokenVideo, match=r"^transparent in parts; put it over a background first$"):
        video_size(path)


def test_transparency_beside_the_stream(tmp_path: Path) -> None:
    """VP8 and VP9 have it as a second picture, which FFmpeg does not decode."""
    path = write_video(tmp_path / "a.webm", frames=2, codec="libvpx-vp9", form="yuva420p", metadata={"alpha_mode": "1"})
    with pytest.raises(BrokenVideo, match=r"^transparent in parts"):
        video_size(path)


@pytest.mark.parametrize(
    ("codec", "form"), [("libx264", "yuv420p"), ("libx264", "yuvj420p"), ("libx264rgb", "rgb24"), ("ffv1", "gray")]
)
def test_ordinary_frames_are_converted_as_ever(tmp_path: Path, codec: str, form: str) -> None:
    """Datasets that exist were made so."""
    path = write_video(tmp_path / "a.mkv", frames=3, codec=codec, form=form)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert torch.equal(
        read_clip(path, (3, 32, 32), resize=False),
        torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1.0,
    )
