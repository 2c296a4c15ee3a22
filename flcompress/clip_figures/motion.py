"""Motion of a clip by dense optical flow (OpenCV's DIS), with VBench's own counting rule.

Frames are uint8 [frames, height, width, 3], RGB. VBench (Huang et al. 2024) asks RAFT, a trained network, for the flow;
everything after the flow is its rule (`vbench/dynamic_degree.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np

from flcompress.clip_figures import Frames

Flow = np.ndarray[Any, np.dtype[np.float32]]
"""[height, width, 2]: (x, y) in pixels from a frame to the next."""

JUDGED_RATE = 8.0
"""Frames a second that VBench looks at, at most."""

MIN_FRAMES = 8
"""Sampled frames below which VBench's rule is no rule: with two of them, every clip counts as dynamic."""

THRESHOLD, REFERENCE_SIDE = 6.0, 256.0
"""A pair of frames moves if its fastest pixels go further than 6 pixels at a shorter side of 256."""

FASTEST = 0.05
"""Share of the pixels that count as the fastest."""

SMALLEST_SIDE = 64
"""Pixels of the shorter side that flow needs; smaller clips are enlarged for it."""


@dataclass(frozen=True, slots=True)
class Motion:
    """The motion of a clip.

    Attributes:
        dynamic: whether VBench's rule calls it dynamic; None below `MIN_FRAMES` sampled frames.
        flow: mean length of the flow from one sampled frame to the next, in pixels at a shorter side of 256.
    """

    dynamic: bool | None
    flow: float


def motion(frames: Frames, frame_rate: float) -> Motion | None:
    """Return the motion of a clip; None for a single frame, which has none."""
    sampled = frames[:: max(1, round(frame_rate / JUDGED_RATE))]
    if len(sampled) < 2:
        return None
    height, width = sampled.shape[1:3]
    scale = min(height, width)
    lengths = [np.linalg.norm(optical_flow(a, b), axis=-1) for a, b in pairwise(sampled)]
    fastest = [_mean_of_fastest(length) for length in lengths]
    return Motion(
        dynamic=is_dynamic(fastest, len(sampled), scale) if len(sampled) >= MIN_FRAMES else None,
        flow=float(np.mean([length.mean() for length in lengths])) * REFERENCE_SIDE / scale,
    )


def is_dynamic(fastest: list[float], sampled: int, scale: int) -> bool:
    """Return whether enough pairs move: at least round(4 n / 16) of n sampled frames' pairs.

    Args:
        fastest: mean length of the fastest pixels' flow, for each pair, in pixels.
        sampled: frames that were looked at.
        scale: the shorter side in pixels.
    """
    moving = sum(value > THRESHOLD * scale / REFERENCE_SIDE for value in fastest)
    return moving >= round(4 * sampled / 16.0)


def smoothness(frames: Frames) -> float | None:
    """(255 - mean error)/255 of odd frames predicted from their neighbours, each warped half-way by the flow.

    Stands for VBench's motion smoothness, which predicts them by a trained network (AMT). None below three frames.
    """
    if len(frames) < 3:
        return None
    errors = []
    for before, middle, after in zip(frames[:-2:2], frames[1:-1:2], frames[2::2], strict=True):
        forward, backward = optical_flow(before, after), optical_flow(after, before)
        predicted = 0.5 * (warp(before, -0.5 * forward) + warp(after, -0.5 * backward))
        errors.append(float(np.abs(predicted - middle.astype(np.float32)).mean()))
    return (255.0 - float(np.mean(errors))) / 255.0


def optical_flow(first: Frames, second: Frames) -> Flow:
    """Return the dense flow from one frame [height, width, 3] to another."""
    height, width = first.shape[:2]
    factor = max(1, -(-SMALLEST_SIDE // min(height, width)))
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    if factor > 1:
        size = (width * factor, height * factor)
        grey = [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in grey]
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = np.asarray(method.calc(grey[0], grey[1], np.zeros((*grey[0].shape, 2), np.float32)), dtype=np.float32)
    if factor > 1:
        flow = np.asarray(cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA), dtype=np.float32) / factor
    return flow


def warp(frame: Frames, flow: Flow) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the frame sampled at each pixel's position plus the flow; the edge goes on beyond it."""
    height, width = frame.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    moved = cv2.remap(
        np.ascontiguousarray(frame).astype(np.float32),
        x + flow[..., 0],
        y + flow[..., 1],
        interpolation=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(moved, dtype=np.float32)


def _mean_of_fastest(lengths: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    count = max(1, int(lengths.size * FASTEST))
    return float(np.partition(lengths.ravel(), -count)[-count:].mean())
