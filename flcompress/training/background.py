"""Checkpoints that are written while the training continues."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from typing_extensions import override

from flcompress.tracing.prefix import host_like
from flcompress.training.checkpoint import Attempt, Checkpoints
from flcompress.training.parts import Part, own_parts

POLL = 0.5
"""Seconds between two heartbeats of a process that waits for its own writing."""


class _Writing(threading.Thread):
    """Writes this process's part of a checkpoint; `attempt` is how it ended."""

    attempt: Attempt

    def __init__(self, checkpoints: Checkpoints, step: int, path: Path, parts: Mapping[str, Part]) -> None:
        super().__init__(name=f"checkpoint of step {step}", daemon=True)
        self._checkpoints, self._parts, self.step, self.path = checkpoints, parts, step, path

    @override
    def run(self) -> None:
        # Without heartbeats: they are those of the training.
        self.attempt = self._checkpoints.attempt(self.path, self._parts, beat=lambda: None)


class Background:
    """Writes the checkpoints of a training from copies in host memory, in a thread, at most one at a time.

    Until `finish` a checkpoint is a temporary folder: a training that ends before that has the one before it.

    Args:
        checkpoints: those of the training.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._copies: dict[str, torch.Tensor] = {}
        self._writing: _Writing | None = None

    @property
    def written(self) -> bool:
        """Whether this process has written its part of a checkpoint that is not in place yet."""
        return self._writing is not None and not self._writing.is_alive()

    def begin(self, step: int, parts: Mapping[str, Part]) -> None:
        """Copy this process's parts and begin to write them; all processes together. Waits for the one before."""
        self.finish()
        world = self._checkpoints.world
        path = self._checkpoints.begin(step)
        copies = {}
        for name, part in own_parts(parts, main=world.main).items():
            if name not in self._copies:
                self._copies[name] = host_like(part.tensor)
            copies[name] = replace(part, tensor=self._copies[name].copy_(part.tensor))
            world.heartbeat()
        self._writing = _Writing(self._checkpoints, step, path, copies)
        self._writing.start()

    def finish(self) -> None:
        """Put the checkpoint in place that was begun, if any; all processes together.

        Raises:
            OSError: this process could not write its part; earlier checkpoints are kept.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        while writing.is_alive():
            writing.join(POLL)
            self._checkpoints.world.heartbeat()
        self._checkpoints.complete(writing.step, "step", writing.path, writing.attempt)
