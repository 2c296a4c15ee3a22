"""Figures of clips that need no trained network: motion, colour, sharpness, fixed random features."""

from typing import Any

import numpy as np

Frames = np.ndarray[Any, np.dtype[np.uint8]]
"""[frames, height, width, 3], RGB, as players show them."""
