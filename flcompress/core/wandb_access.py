"""Whether Weights & Biases can be written to: said before any work, not when the first training begins."""

from __future__ import annotations

from importlib.util import find_spec

from flcompress.errors import UnavailableError, first_line

_FIX = "log in with `wandb login`, set WANDB_MODE=offline, or leave it out"


def check_wandb_installed() -> None:
    """Raise UnavailableError where it is not."""
    if find_spec("wandb") is None:
        raise UnavailableError(
            "training.log_to: wandb given, but Weights & Biases is not installed; pip install 'flcompress[wandb]', "
            "or leave it out"
        )


def check_wandb_login() -> None:
    """Raise UnavailableError where the server does not take this user's runs; nothing is asked of it offline."""
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    try:
        accepted = wandb.login(prompt=False, verify=True)
    except wandb.errors.Error as error:
        raise wandb_error(error) from error
    if not accepted:
        raise UnavailableError(f"training.log_to: wandb given, but no one is logged in; {_FIX}")


def wandb_error(error: Exception) -> UnavailableError:
    """Return wandb's error as an UnavailableError."""
    first = first_line(error).rstrip(".")
    return UnavailableError(f"training.log_to: wandb given, but it cannot be used: {first}; {_FIX}")
