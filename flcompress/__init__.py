"""flcompress: a compiler for video diffusion transformers. Fewer blocks, fewer steps, one recipe.

The public door: `trace`, `skip`, `remove`, `NotRemovable`, `load_recipe`, `apply`. Each is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flcompress.driver.manager import apply as apply
    from flcompress.errors import NotRemovable as NotRemovable
    from flcompress.frontend.loading import load_recipe as load_recipe
    from flcompress.tracing.removal.remove import remove as remove
    from flcompress.tracing.skip import skip as skip
    from flcompress.tracing.tracer import trace as trace

__version__ = "0.1.0"

__all__ = ["NotRemovable", "apply", "load_recipe", "remove", "skip", "trace"]

_DOOR = {
    "NotRemovable": "flcompress.errors",
    "apply": "flcompress.driver.manager",
    "load_recipe": "flcompress.frontend.loading",
    "remove": "flcompress.tracing.removal.remove",
    "skip": "flcompress.tracing.skip",
    "trace": "flcompress.tracing.tracer",
}


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"module 'flcompress' has no attribute '{name}'")
    return getattr(import_module(_DOOR[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
