"""Keep other libraries' progress bars off the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Stock loading draws bars on stderr, over those of the command."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = [one for one in (of_diffusers, of_transformers) if one.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Stock loading also reports what does not fit, in tables on stderr; for callers that report it themselves."""
    from transformers.utils import logging as of_transformers

    level = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        of_transformers.set_verbosity(level)
