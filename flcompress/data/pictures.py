"""Picture files as a viewer shows them: upright, in the colours of a screen (sRGB)."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from flcompress.data.video_frames import BrokenVideo, Colours
from flcompress.errors import FlcompressError

_STILLS = ("AVIF", "BMP", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
"""Formats that hold a picture, or are a video where they hold several."""

_ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""

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
"""What Pillow's decoders raise for damaged files."""

_SAME = 2
"""Steps of 255 that a colour profile may change a colour by and count as sRGB: as far as rounding goes."""


class BrokenPicture(FlcompressError):  # noqa: N818 (what it is, not what went wrong here)
    """A file that cannot be shown; the message is the reason alone."""


def is_still(path: Path) -> bool:
    """Whether a file is one picture; phones put a depth map or a second exposure after it, which nothing shows."""
    Image.init()
    known = [name for name in _STILLS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=known) as file:
                return file.format in ("JPEG", "MPO", "TIFF") or getattr(file, "n_frames", 1) == 1
    except Image.DecompressionBombError:
        return True
    except _UNREADABLE:
        return False


def open_picture(path: Path) -> Image.Image:
    """The picture in a file, of an animation its first, as RGB.

    Raises:
        BrokenPicture: it cannot be read, is transparent in parts, or has more than 8 or 16 bits a colour.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                file.load()
                if file.format == "AVIF":
                    _check_range(path)
                turn = _UPRIGHT.get(_orientation(file))
                shown = _on_screen(_eight_bits(_opaque(file)), file.info.get("icc_profile"))
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
    """The EXIF orientation; None where the EXIF data is damaged, which viewers ignore."""
    try:
        return file.getexif().get(_ORIENTATION)
    except _UNREADABLE:
        return None


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture without its alpha channel; refused where that hides something: viewers differ in what is behind."""
    if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise BrokenPicture("transparent in parts; put it over a background first")
    return picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8; Pillow's own conversion cuts it off at 255."""
    if picture.mode in ("I", "F"):
        raise BrokenPicture(f"pixels of kind {picture.mode} (32 bits); save it with 8 bits a colour")
    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(picture, dtype=np.float64) / 257).astype(np.uint8))
    return picture


def _on_screen(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB as sRGB; a profile that is damaged or of another kind of picture is ignored, as viewers do."""
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
    """Whether a transform is that of sRGB itself, by what it makes of colours all over the cube, or of greys."""
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    probe = Image.fromarray(colours if mode == "RGB" else colours[..., 0])
    changed = np.asarray(ImageCms.applyTransform(probe, convert), dtype=int)
    return bool(np.abs(changed - np.asarray(probe.convert("RGB"))).max() <= _SAME)
