"""A tiny model, its encoded clips and recipes on them, for trainings on one process or several."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flcompress.driver.clips import Clips
from flcompress.driver.manager import apply
from flcompress.frontend.loading import load_recipe
from flcompress.progress import QuietDisplay
from tests.fixtures.tiny import tiny_pipeline

HEAD = """version: 1
model: {model}
sampling: {{max_sequence_length: 16}}
data: {{{data}}}
training: {{health: {{on_breach: warn, samples: 0}}, log_to: []}}
passes:
"""


@dataclass(frozen=True)
class Home:
    """A folder with a tiny pipeline and a dataset of its latents."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, clips: int = 24) -> Home:
        tiny_pipeline(folder / "model")
        encoding = folder / "encoding.yaml"
        data = f"moving-digits: {{clips: {clips}}}"
        encoding.write_text(HEAD.format(model=folder / "model", data=data) + "  []\n", encoding="utf-8")
        run = apply(encoding, folder / "start", display=QuietDisplay())
        Clips(load_recipe(encoding), folder / "data", QuietDisplay(), "cpu")(run.start())
        return cls(folder)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        (found,) = (self.folder / "data").iterdir()
        return found

    def begun(self, folder: Path) -> Path:
        """A new run directory in which the model is read and traced already, which takes longer than a training."""
        shutil.copytree(self.folder / "start/passes", folder / "passes")
        return folder

    def recipe(self, name: str, passes: Sequence[str], data: Path | None = None) -> Path:
        """Write a recipe of these passes."""
        path = self.folder / f"{name}.yaml"
        head = HEAD.format(model=self.model, data=f"latents: {data or self.data}")
        path.write_text(head + "".join(f"  - {one}\n" for one in passes), encoding="utf-8")
        return path
