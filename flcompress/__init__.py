"""flcompress: a compiler for video diffusion transformers. Fewer blocks, fewer steps, one recipe.

The public door: `trace`, `skip`, `remove`, `NotRemovable`, `load_recipe`, `apply`. Each is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flcompress.errors import NotRemovable as NotRemovable
    from flcompress.pipeline.manager import apply as apply
    from flcompress.pipeline.recipe_loading import load_recipe as load_recipe
    from flcompress.trace.remove import remove as remove
    from flcompress.trace.skip import skip as skip
    from flcompress.trace.tracer import trace as trace

__version__ = "0.1.0"

__all__ = ["NotRemovable", "apply", "load_recipe", "remove", "skip", "trace"]

_DOOR = {
    "NotRemovable": "flcompress.errors",
    "apply": "flcompress.pipeline.manager",
    "load_recipe": "flcompress.pipeline.recipe_loading",
    "remove": "flcompress.trace.remove",
    "skip": "flcompress.trace.skip",
}


def __getattr__(name: str) -> Any:
    if name == "trace":
        return import_module("flcompress.trace")  # the package is callable: see there
    if name not in _DOOR:
        raise AttributeError(f"module 'flcompress' has no attribute '{name}'")
    return getattr(import_module(_DOOR[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
