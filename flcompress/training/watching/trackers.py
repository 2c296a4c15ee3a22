"""Where a training's figures and sample strips go in addition to the report: TensorBoard, Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from flcompress.core.steps import PassContext
from flcompress.core.wandb_access import wandb_error
from flcompress.files import write_text
from flcompress.training.watching.strips import STRIPS, strip_of

FOLDER = "tensorboard"
ID_FILE = "wandb-run-id.txt"


def figures_of(record: Mapping[str, float]) -> dict[str, float]:
    """Return a line of `metrics.jsonl` without its step."""
    return {name: value for name, value in record.items() if name != "step"}


class Tracker(Protocol):
    """A metrics destination."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures of a step."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Add a picture file."""


class TensorBoard:
    """Event files in the pass's own folder: `tensorboard --logdir RUN/passes`."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run logged after its last checkpoint will be trained, and logged, again.
        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write a point of every curve."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Write a picture file as an image of the step."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as shown:
            self.writer.add_image(name, np.asarray(shown.convert("RGB")), step, dataformats="HWC")


class WeightsAndBiases:
    """A run per pass; the environment says where it goes (WANDB_PROJECT, WANDB_MODE, ...).

    A killed training resumes in the same run: the pass's folder keeps its id, which no other folder has. Earlier steps
    that the server lacks are sent again, and offline all of them: a killed command may have lost some.

    Args:
        folder: the pass's folder.
        name: the pass.
        logged: the lines of `metrics.jsonl` up to the step that the training resumes from.
    """

    def __init__(self, folder: Path, name: str, logged: Iterable[Mapping[str, float]]) -> None:
        import wandb

        file = folder / ID_FILE
        if not file.exists():
            write_text(file, secrets.token_hex(8) + "\n")
        try:
            self.run: Any = wandb.init(
                dir=str(folder),
                name=name,
                id=file.read_text(encoding="utf-8").strip(),
                resume="allow",
                # Without its summary of every curve, and without taking in what the command prints.
                settings=wandb.Settings(quiet=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise wandb_error(error) from error
        before: dict[int, dict[str, float]] = {}
        for record in logged:
            before.setdefault(int(record["step"]), {}).update(figures_of(record))
        for step, figures in before.items():
            self.log(step, figures)
            if (strip := strip_of(folder, step)).exists():
                self.picture(step, STRIPS, strip)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        self._log(step, dict(figures))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Log a picture file with the figures of its step."""
        import wandb

        self._log(step, {name: wandb.Image(str(path))})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self.run.step:  # the server has those before
            self.run.log(values, step=step)

    def close(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the run, as failed if the training ended early."""
        self.run.finish(exit_code=int(kind is not None))


@contextmanager
def trackers(
    context: PassContext, name: str, start: int = 0, logged: Iterable[Mapping[str, float]] = ()
) -> Iterator[Sequence[Tracker]]:
    """Open the trackers that the recipe asks for, in the main process; none in the others.

    Args:
        context: the pass's.
        name: the pass.
        start: the step that the training resumes from.
        logged: the figures of the steps up to that one.
    """
    opened: list[Tracker] = []
    with ExitStack() as stack:
        if context.world.main and "tensorboard" in context.log_to and find_spec("tensorboard") is not None:
            board = TensorBoard(context.directory / FOLDER, start)
            stack.callback(board.writer.close)
            opened.append(board)
        if context.world.main and "wandb" in context.log_to:
            bias = WeightsAndBiases(context.directory, name, logged)
            stack.push(bias.close)
            opened.append(bias)
        yield opened
