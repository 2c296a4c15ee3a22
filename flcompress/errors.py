"""Every error a user can meet, and the exit status it ends the command with.

A message is one line: the file, the key or module path, what was given, what was expected, the fix.
"""

from __future__ import annotations

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class FlcompressError(Exception):
    """The work failed (exit status 1).

    Attributes:
        reported: whether another process has already reported this error; None where the processes have not met: then
            those of one machine meet the same error.
    """

    exit_status = 1
    reported: bool | None = None


class RequestError(FlcompressError):
    """The request was wrong: a recipe, a path, an argument (exit status 2)."""

    exit_status = 2


class RecipeError(RequestError):
    """A recipe file that cannot be carried out as written."""


class ModelError(RequestError):
    """A model folder that is missing, unsafe or damaged."""


class DataError(RequestError):
    """A dataset that cannot be trained on."""


class UnavailableError(RequestError):
    """Something that this machine or installation lacks; the message names what to install or where to run."""


class PreconditionError(RequestError):
    """A pass was asked for whose needs the program does not meet."""


class PostconditionError(FlcompressError):
    """A pass or an exporter produced something that fails its own check."""


class NotRemovable(FlcompressError):  # noqa: N818 (the name that users catch)
    """Blocks whose removal could not be certified; names the block and the cause."""


class RecordError(FlcompressError):
    """A JSON file of a run that is damaged, or that a newer flcompress wrote."""


class TrainingError(FlcompressError):
    """Training was stopped: a non-finite loss or a monitor's limit. The last good checkpoint is kept."""


class Preempted(FlcompressError):  # noqa: N818 (no failure: what was asked for by SIGTERM)
    """The process was asked to end (SIGTERM); a checkpoint was written and the same command resumes from it."""

    exit_status = 75
