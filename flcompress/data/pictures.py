"""Picture files as a viewer shows them: upright, in the colours of a screen (sRGB)."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from flcompress.data.video_frames import BrokenVideo, Colours
from flcompress.errors import FlcompressError

_STILLS = ("AVIF", "BMP", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
"""Formats that hold one picture, or a video if they hold several."""

_ORIENTATION = 0x0112
"""EXIF tag of the camera's orientation."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
    OverflowError,
)
"""Errors that Pillow's decoders raise for damaged files."""

_SAME = 2
"""Largest change of a colour, of 255, by a profile that counts as sRGB: rounding alone."""


class BrokenPicture(FlcompressError):  # noqa: N818 (what it is, not what went wrong here)
    """A file that cannot be shown; the message is the reason alone."""


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore what Pillow warns of.

    Python's filters belong to the whole process, so a thread other than the main one leaves them alone: what starts it
    enters this around it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def is_still(path: Path) -> bool:
    """Return whether a file is one picture; phones append a depth map or a second exposure, which viewers ignore."""
    Image.init()
    known = [name for name in _STILLS if name in Image.OPEN]
    try:
        with without_warnings(), Image.open(path, formats=known) as file:
            return file.format in ("JPEG", "MPO", "TIFF") or getattr(file, "n_frames", 1) == 1
    except Image.DecompressionBombError:
        return True
    except _UNREADABLE:
        return False


def open_picture(path: Path) -> Image.Image:
    """Return the picture in a file, the first of an animation, as RGB.

    Raises:
        BrokenPicture: the file is unreadable, partly transparent, or has 32 bits per colour.
    """
    try:
        with without_warnings(), Image.open(path) as file:
            file.load()
            if file.format == "AVIF":
                _check_range(path)
            turn = _UPRIGHT.get(_orientation(file))
            shown = _to_srgb(_to_eight_bits(_without_alpha(file)), file.info.get("icc_profile"))
    except Image.DecompressionBombError as error:
        raise BrokenPicture("more than 178 million pixels; make it smaller") from error
    except UnidentifiedImageError as error:
        raise BrokenPicture("not a picture that can be read; give a PNG or JPEG file") from error
    except _UNREADABLE as error:
        raise BrokenPicture(f"not a picture that can be read ({error}); give a PNG or JPEG file") from error
    return shown if turn is None else shown.transpose(turn)


def _check_range(path: Path) -> None:
    """Raise BrokenPicture for HDR or a wide gamut; Pillow decodes AVIF without saying so."""
    import av

    try:
        with av.open(str(path.absolute())) as container:
            Colours.of(container.streams.video[0].codec_context).check()
    except BrokenVideo as error:
        raise BrokenPicture(str(error)) from error


def _orientation(file: Image.Image) -> Any:
    """Return the EXIF orientation; None if the EXIF data is damaged, which viewers ignore."""
    try:
        return file.getexif().get(_ORIENTATION)
    except _UNREADABLE:
        return None


def _without_alpha(picture: Image.Image) -> Image.Image:
    """Return an opaque picture; refuse visible transparency, since viewers differ in the background they show."""
    if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise BrokenPicture("transparent in parts; put it over a background first")
    return picture


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Scale grey of 16 bits to 8; Pillow's own conversion clips it at 255."""
    if picture.mode in ("I", "F"):
        raise BrokenPicture(f"pixels of kind {picture.mode} (32 bits); save it with 8 bits a colour")
    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(picture, dtype=np.float64) / 257).astype(np.uint8))
    return picture


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB; a profile that is damaged or for another colour space is ignored, as in viewers."""
    if not profile:
        return picture.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        kind = source.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(kind)
        grey = picture.mode in ("1", "L", "LA")
        if mode is None or (mode == "CMYK") != (picture.mode == "CMYK") or (mode == "L" and not grey):
            return picture.convert("RGB")
        screen = ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        convert = ImageCms.buildTransform(source, screen, mode, "RGB", intent)
        if mode != "CMYK" and _changes_nothing(convert, mode):
            return picture.convert("RGB")
        return ImageCms.applyTransform(picture.convert(mode), convert) or picture.convert("RGB")
    except (ImageCms.PyCMSError, *_UNREADABLE):
        return picture.convert("RGB")


def _changes_nothing(convert: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform leaves sRGB as it is, judged by a grid of colours, or of greys."""
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    probe = Image.fromarray(colours if mode == "RGB" else colours[..., 0])
    changed = np.asarray(ImageCms.applyTransform(probe, convert), dtype=int)
    return bool(np.abs(changed - np.asarray(probe.convert("RGB"))).max() <= _SAME)
