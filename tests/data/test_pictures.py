"""Picture files are what a viewer shows: as a model's first frame, and as a dataset's clips of one frame."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from flcompress.data import pictures
from flcompress.data.pictures import BrokenPicture, open_picture
from flcompress.data.video_frames import BrokenVideo
from flcompress.data.videos import read_clip, video_size
from flcompress.errors import RequestError
from flcompress.runtime.clip_files import read_picture

COLOURS = np.zeros((32, 48, 3), np.uint8)
COLOURS[:16, :24], COLOURS[:16, 24:], COLOURS[16:, :24] = (200, 40, 40), (40, 180, 60), (30, 60, 220)
LYING = Image.fromarray(COLOURS)
"""A colour in each corner."""

Image.init()
AVIF = "AVIF" in Image.OPEN
"""Pillow reads it from 11.3 on."""

SAVED: dict[str, dict[str, Any]] = {
    ".png": {},
    ".tif": {},
    ".webp": {"lossless": True},
    ".jpg": {"quality": 100, "subsampling": 0},
    ".avif": {"quality": 100, "subsampling": "4:4:4"},
}


def corners(picture: Image.Image | torch.Tensor) -> np.ndarray:
    """The colours of the four corners, a few pixels in."""
    array = picture.numpy() * 127.5 + 127.5 if isinstance(picture, torch.Tensor) else np.asarray(picture).astype(float)
    return array[np.ix_([4, -5], [4, -5])]


def as_clip(path: Path) -> torch.Tensor:
    """[height, width, 3]: the file's one frame in a dataset."""
    frames, height, width = video_size(path)
    assert frames == 1
    return read_clip(path, (1, height, width), resize=False)[:, 0].permute(1, 2, 0)


@pytest.mark.parametrize("suffix", list(SAVED))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_however_the_camera_was_held(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix == ".avif" and not AVIF:
        pytest.skip("this Pillow does not read AVIF")
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a maker of phones"
    LYING.save(path, exif=exif, **SAVED[suffix])
    tagged = LYING.copy()
    tagged.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(tagged)
    shown = open_picture(path)
    assert shown.size == upright.size
    assert corners(shown) == pytest.approx(corners(upright), abs=4)
    assert corners(as_clip(path)) == pytest.approx(corners(upright), abs=4)


def test_the_first_frame_of_a_model_is_the_picture_that_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    LYING.save(tmp_path / "phone.png", exif=exif)
    LYING.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    phone, upright = (read_picture(tmp_path / f"{name}.png", 24, 16) for name in ("phone", "upright"))
    assert torch.equal(phone, upright)


def swapped_profile() -> bytes:
    """A profile in which full red is the green of sRGB, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_colours_are_those_of_the_profile(tmp_path: Path, suffix: str) -> None:
    LYING.save(tmp_path / f"a{suffix}", icc_profile=swapped_profile(), **SAVED[suffix])
    expected = corners(LYING)[..., [1, 0, 2]]
    assert corners(open_picture(tmp_path / f"a{suffix}")) == pytest.approx(expected, abs=6)
    assert corners(as_clip(tmp_path / f"a{suffix}")) == pytest.approx(expected, abs=6)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
@pytest.mark.parametrize("profile", ["sRGB", "damaged"])
def test_a_profile_that_changes_nothing_changes_nothing(tmp_path: Path, mode: str, profile: str) -> None:
    """Rounding included: these pictures are what they were before profiles were read."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() if profile == "sRGB" else b"no profile"
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    LYING.convert(mode).save(path, icc_profile=icc)
    with Image.open(path) as plain:
        assert np.array_equal(np.asarray(open_picture(path)), np.asarray(plain.convert("RGB")))


def test_grey_of_sixteen_bits_keeps_its_steps(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 32 * 48).astype(np.uint16).reshape(32, 48)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    shown = np.asarray(open_picture(tmp_path / "a.png"))
    assert np.array_equal(shown, np.rint(ramp[..., None] / 257).astype(np.uint8).repeat(3, axis=-1))


def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path) -> None:
    second = LYING.transpose(Image.Transpose.ROTATE_180)
    for name in ("a.gif", "a.webp", "a.png"):
        LYING.save(tmp_path / name, save_all=True, append_images=[second], duration=100, lossless=True)
        assert corners(open_picture(tmp_path / name)) == pytest.approx(corners(LYING), abs=40)
    assert video_size(tmp_path / "a.gif") == (2, 32, 48)
    assert video_size(tmp_path / "a.png") == (2, 32, 48)


def test_a_second_picture_after_a_photograph_is_not_shown(tmp_path: Path) -> None:
    """Phones put depth and brightness there; Pillow calls such a JPEG file MPO."""
    LYING.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[LYING.resize((24, 16))])
    assert video_size(tmp_path / "a.jpg") == (1, 32, 48)
    assert corners(as_clip(tmp_path / "a.jpg")) == pytest.approx(corners(LYING), abs=40)


def refused(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    glass = LYING.convert("RGBA")
    glass.putalpha(Image.fromarray(np.arange(32 * 48, dtype=np.uint8).reshape(32, 48)))
    glass.save(tmp_path / "glass.png")
    hole = LYING.convert("P")
    hole.save(tmp_path / "hole.png", transparency=hole.getpixel((4, 4)))
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "deep.tif")
    LYING.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) - 30])
    (tmp_path / "bits.png").write_bytes(whole[:60] + b"????" + whole[64:])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    header = bytearray(whole)
    header[16:24] = (20000).to_bytes(4, "big") * 2
    header[29:33] = __import__("zlib").crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(header)
    reasons = {
        "glass.png": "transparent in parts; put it over a background first",
        "hole.png": "transparent in parts; put it over a background first",
        "deep.tif": "pixels of kind F (32 bits); save it with 8 bits a colour",
        "cut.png": "not a picture that can be read (",
        "bits.png": "not a picture that can be read",
        "text.png": "not a picture that can be read; give a PNG or JPEG file",
        "folder.png": "not a picture that can be read (",
        "none.png": "not a picture that can be read (",
        "bomb.png": "more than 178 million pixels; make it smaller",
    }
    return {name: (tmp_path / name, reason) for name, reason in reasons.items()}


def test_what_cannot_be_shown_says_why(tmp_path: Path) -> None:
    for name, (path, reason) in refused(tmp_path).items():
        with pytest.raises(BrokenPicture) as refusal:
            open_picture(path)
        assert str(refusal.value).startswith(reason), name
        with pytest.raises(RequestError) as told_too:
            read_picture(path, 16, 16)
        assert str(told_too.value).startswith(f"{path}: {reason}"), name
        with pytest.raises(BrokenVideo):
            video_size(path)


def test_damage_in_what_describes_a_picture_does_not_matter(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    LYING.save(buffer, "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff damaged")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert corners(open_picture(tmp_path / "a.jpg")) == pytest.approx(corners(LYING), abs=4)
    assert corners(as_clip(tmp_path / "a.jpg")) == pytest.approx(corners(LYING), abs=4)


def test_a_picture_in_hdr_is_left_out(tmp_path: Path) -> None:
    if not AVIF:
        pytest.skip("this Pillow does not read AVIF")
    LYING.save(tmp_path / "a.avif")
    data = (tmp_path / "a.avif").read_bytes()
    place = data.index(b"colrnclx") + 8
    (tmp_path / "a.avif").write_bytes(data[:place] + bytes([0, 9, 0, 16, 0, 9]) + data[place + 6 :])
    with pytest.raises(BrokenPicture, match=r"^HDR \(PQ\)"):
        open_picture(tmp_path / "a.avif")


def test_a_thread_leaves_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    """They belong to the whole process, whose main thread may be changing them."""
    LYING.save(tmp_path / "a.jpg")
    before, now = warnings.filters, []  # a context of warnings replaces the list
    with ThreadPoolExecutor(1) as thread, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_orientation", lambda file: now.append(warnings.filters))
        thread.submit(open_picture, tmp_path / "a.jpg").result()
        assert now == [before]
        assert now.pop() is before
        with pictures.without_warnings():
            silent = warnings.filters
            thread.submit(open_picture, tmp_path / "a.jpg").result()
            assert now.pop() is silent
    assert warnings.filters is before
