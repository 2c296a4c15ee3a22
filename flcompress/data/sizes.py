"""The requested clip size, and the bucket that each video falls in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flcompress.errors import DataError
from flcompress.models.latent_size import Grid

Size = tuple[int, int, int]
"""(frames, height, width), the last two in pixels."""


@dataclass(frozen=True, slots=True)
class Target:
    """Requested clip size; None keeps a clip's own. Height and width are given together or not at all."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None

    def check(self, grid: Grid) -> None:
        """Raise RequestError for a size that the model does not accept, naming the nearest that it does."""
        if (self.height is None) != (self.width is None):
            raise DataError("height and width: one of them given, expected both or neither")
        grid.check(self.frames, self.height, self.width)

    def fixed_to(self, grid: Grid) -> Target:
        """Return the target with the model's height and width, if it accepts only one."""
        if grid.fixed is None:
            return self
        return replace(self, height=grid.fixed[0], width=grid.fixed[1])

    def bucket(self, size: Size, grid: Grid) -> Size | None:
        """Return the size at which a video of `size` is encoded; None if it is below the smallest.

        Long clips are trimmed, short ones get fewer frames. With a requested height and width every clip is resized to
        cover them and cropped; otherwise it is cropped to the grid.
        """
        frames, height, width = size
        frames = grid.fit_frames(min(frames, self.frames or frames))
        if not frames:
            return None
        if self.height is not None and self.width is not None:
            return frames, self.height, self.width
        height, width = grid.fit_pixels(height), grid.fit_pixels(width)
        return (frames, height, width) if height and width else None


OWN_SIZE = Target()
"""Each clip at its own size, cropped to the grid."""
