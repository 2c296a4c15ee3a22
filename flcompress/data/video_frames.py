"""Decoded frames as a player shows them: upright, in square pixels and the intended colours, or a reason why not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from flcompress.errors import FlcompressError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""[height, width, 3], RGB."""


class BrokenVideo(FlcompressError):  # noqa: N818 (what it is, not what went wrong here)
    """A file that cannot be shown as intended; the message is the reason alone."""


# Numbers of ITU-T H.273, which FFmpeg uses as they are.
_BT709, _BT601, _BT2020 = 1, 5, 9
_CONVERTED = frozenset({_BT709, 4, _BT601, 6, 7, _BT2020})
"""Matrices that FFmpeg's scaler turns into RGB: also those of FCC, SMPTE 170M (BT.601 too) and SMPTE 240M."""
_UNKNOWN = frozenset({0, 2, 3})
"""Matrices that do not describe a YUV picture: identity, unspecified, reserved."""
_UNSPECIFIED = 2
_HDR = {16: "PQ", 18: "HLG"}
_OFF_SCREEN = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE 428"}
"""Transfer characteristics that are neither HDR nor those of a standard-range screen."""
_WIDE = {8: "film", _BT2020: "BT.2020", 10: "XYZ", 11: "DCI-P3", 12: "Display P3"}
"""Primaries far from those of BT.709; converting from any other changes little."""

_LARGEST_PIXEL_ASPECT = 10
"""Largest believable ratio of a pixel's sides; no camera or disc comes near it."""


@dataclass(frozen=True, slots=True)
class Colours:
    """Colour description of a container or a frame.

    Attributes:
        matrix: conversion from YUV to RGB.
        primaries: chromaticities of full red, green and blue.
        transfer: transfer function from number to light.
        range: 0 unknown, 1 limited (black is 16), 2 full; FFmpeg's numbers.
    """

    matrix: int
    primaries: int
    transfer: int
    range: int

    @classmethod
    def of(cls, source: Any) -> Colours:
        """Return the colours of a frame or a codec context."""
        return cls(source.colorspace, source.color_primaries, source.color_trc, source.color_range)

    def fill_from(self, other: Colours) -> Colours:
        """Return these colours with unspecified fields filled from `other`."""
        return Colours(
            other.matrix if self.matrix == _UNSPECIFIED else self.matrix,
            other.primaries if self.primaries == _UNSPECIFIED else self.primaries,
            other.transfer if self.transfer == _UNSPECIFIED else self.transfer,
            self.range or other.range,
        )

    def check(self) -> None:
        """Raise BrokenVideo unless a standard-range screen shows these colours unconverted."""
        if self.transfer in _HDR:
            raise BrokenVideo(f"HDR ({_HDR[self.transfer]}); convert it to standard range (BT.709) first")
        if self.transfer in _OFF_SCREEN:
            raise BrokenVideo(f"{_OFF_SCREEN[self.transfer]} transfer; convert it to standard range (BT.709) first")
        primaries = self.matrix if self.primaries == _UNSPECIFIED and self.matrix == _BT2020 else self.primaries
        if primaries in _WIDE:
            raise BrokenVideo(f"a wide gamut ({_WIDE[primaries]}); convert it to BT.709 first")
        if self.matrix not in _CONVERTED | _UNKNOWN:
            raise BrokenVideo(f"a colour matrix that is not converted (number {self.matrix} of H.273)")

    def in_yuv(self, height: int, width: int) -> int:
        """Return the matrix of a YUV picture; if unspecified, the one that players assume for its size."""
        if self.matrix not in _UNKNOWN:
            return self.matrix
        return _BT709 if height > 576 or width >= 1280 else _BT601


@dataclass(frozen=True, slots=True)
class Geometry:
    """Mapping from the stored picture to the shown one.

    Attributes:
        stored: (height, width) in the file.
        square: (height, width) in square pixels: one side is enlarged, as the HTML standard asks of browsers.
        mirrored: whether left and right are exchanged.
        turns: quarter turns counterclockwise, after mirroring.
    """

    stored: tuple[int, int]
    square: tuple[int, int]
    mirrored: bool = False
    turns: int = 0

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) as shown."""
        return self.rotate(self.square)

    def rotate(self, size: tuple[int, int]) -> tuple[int, int]:
        """Convert (height, width) between the stored and the shown picture; it is its own inverse."""
        return size[::-1] if self.turns % 2 else size


@dataclass(frozen=True, slots=True)
class ShownFrame:
    """A frame, decoded but not yet converted.

    Attributes:
        frame: PyAV's frame.
        geometry: how its picture is shown.
        time: presentation time in seconds; None if the file does not say.
    """

    frame: Any
    geometry: Geometry
    time: float | None = 0.0

    def pixels(self, height: int, width: int, *, resize: bool) -> Pixels:
        """Return the picture's centre [height, width, 3], with `resize` after scaling it to just cover that size."""
        wanted = self.geometry.square
        if resize:
            h, w = self.geometry.rotate((height, width))
            scale = max(h / wanted[0], w / wanted[1])
            wanted = max(h, math.floor(wanted[0] * scale)), max(w, math.floor(wanted[1] * scale))
        frame = self.frame
        if resize or wanted != self.geometry.stored:
            frame = frame.reformat(width=wanted[1], height=wanted[0], format="rgb24", interpolation="BICUBIC")
        picture = frame.to_ndarray(format="rgb24")
        picture = np.rot90(picture[:, ::-1] if self.geometry.mirrored else picture, self.geometry.turns)
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
        if top < 0 or left < 0:
            raise BrokenVideo("smaller than it was when it was measured")
        centre: Pixels = picture[top : top + height, left : left + width]
        return centre


def in_square_pixels(height: int, width: int, pixel: Fraction | None) -> tuple[int, int]:
    """Return (height, width) in square pixels, from pixels `pixel` times as wide as high; None or 0 mean square."""
    if not pixel or pixel < 0:
        return height, width
    if not 1 / _LARGEST_PIXEL_ASPECT <= pixel <= _LARGEST_PIXEL_ASPECT:
        raise BrokenVideo(f"pixels of {pixel.numerator}:{pixel.denominator}")
    return (height, round(width * pixel)) if pixel > 1 else (round(height / pixel), width)


def orientation(matrix: Any) -> tuple[bool, int]:
    """Return (mirrored, quarter turns) of a display matrix: nine numbers, of which a b, c d are the scaled rotation.

    Raises:
        BrokenVideo: another angle, or shear.
    """
    a, b, u, c, d, v = map(int, matrix[:6])
    largest = max(abs(a), abs(b), abs(c), abs(d))
    if not largest:
        return False, 0  # players ignore a matrix without numbers
    signs = tuple(0 if abs(entry) * 100 < largest else (entry > 0) - (entry < 0) for entry in (a, b, c, d))
    even = abs(abs(b) - abs(c)) * 100 <= largest
    if u or v or signs not in _ORIENTATIONS or not (even or signs[0]):
        raise BrokenVideo(f"turned by {math.degrees(math.atan2(b, a)):.4g} degrees or sheared; turn it upright first")
    return _ORIENTATIONS[signs]


_ORIENTATIONS = {
    (1, 0, 0, 1): (False, 0),
    (0, -1, 1, 0): (False, 1),
    (-1, 0, 0, -1): (False, 2),
    (0, 1, -1, 0): (False, 3),
    (-1, 0, 0, 1): (True, 0),
    (0, 1, 1, 0): (True, 1),
    (1, 0, 0, -1): (True, 2),
    (0, -1, -1, 0): (True, 3),
}
"""By the signs of a, b, c, d: a stored pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift."""


def display_matrix(frame: Any) -> Any:
    """Return the nine numbers of a frame's display matrix, or None."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return np.frombuffer(data, np.int32)
    return None


def check_opaque(frame: Any) -> None:
    """Raise BrokenVideo if a frame is transparent anywhere: players differ in the background they show."""
    format = frame.format
    if not (format.has_palette or any(component.is_alpha for component in format.components)):
        return
    if frame.reformat(format="rgba").to_ndarray()[..., 3].min() < 255:
        raise BrokenVideo("transparent in parts; put it over a background first")


def name_colours(frame: Any, container: Colours) -> None:
    """Set a frame's colour properties explicitly, so that no version of PyAV or FFmpeg has to guess.

    Raises:
        BrokenVideo: a standard-range screen would show wrong colours.
    """
    colours = Colours.of(frame).fill_from(container)
    colours.check()
    format = frame.format
    if not format.is_rgb and len(format.components) >= 3:
        frame.colorspace = colours.in_yuv(frame.height, frame.width)
    frame.color_range = colours.range
