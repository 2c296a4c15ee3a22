"""Where a training's figures and sample strips go beside the report: TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from flcompress.pipeline.passes import Work

FOLDER = "tensorboard"


class Tracker(Protocol):
    """One of them."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures of a step."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Add a picture file."""


class TensorBoard:
    """Event files in the pass's own folder: `tensorboard --logdir RUN/passes`."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run logged after its last checkpoint will be done, and logged, again.
        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as shown:
            self.writer.add_image(name, np.asarray(shown.convert("RGB")), step, dataformats="HWC")


class WeightsAndBiases:
    """One run a pass; where it goes is the environment's to say (WANDB_PROJECT, WANDB_MODE, ...)."""

    def __init__(self, folder: Path, name: str) -> None:
        import wandb

        self.run: Any = wandb.init(dir=str(folder), name=name, id=folder.name.strip("."), resume="allow")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))}, step=step)


@contextmanager
def trackers(work: Work, name: str, start: int) -> Iterator[Sequence[Tracker]]:
    """Those that the recipe asks for, in the main process; none in the others.

    Args:
        work: of the pass.
        name: of the pass.
        start: the step that the training goes on from.
    """
    found: list[Tracker] = []
    with ExitStack() as open_ones:
        if work.world.main and "tensorboard" in work.log_to and find_spec("tensorboard") is not None:
            board = TensorBoard(work.directory / FOLDER, start)
            open_ones.callback(board.writer.close)
            found.append(board)
        if work.world.main and "wandb" in work.log_to:
            bias = WeightsAndBiases(work.directory, name)
            open_ones.callback(bias.run.finish)
            found.append(bias)
        yield found
