"""What an exporter is. The exporters themselves live in `exporters/`, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from flcompress.core.passes import ProgressSink
from flcompress.core.program import Program


class Exporter(BaseModel, ABC):
    """Turns the last program of a recipe into something that runs; its fields are its recipe arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    version: ClassVar[int] = 1
    after: ClassVar[tuple[str, ...]] = ()
    """Exporters whose output this one reads; they must stand before it in the recipe."""

    def check(self) -> None:
        """Raise UnavailableError if this machine lacks what the export needs. Called before any work of a recipe."""

    def fingerprint(self) -> str:
        """Whatever beside program, arguments and version decides the output (a builder's version); for the cache."""
        return ""

    @abstractmethod
    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        """Write the export.

        Args:
            program: the last program of the recipe.
            folder: empty folder to write to; it is moved to `exports / name` on success.
            exports: `RUN/exports`, where the exports named by `after` lie.

        Returns:
            A summary for the terminal and the report (file sizes, measured differences, ...).

        Raises:
            PostconditionError: the export fails its own check.
        """
