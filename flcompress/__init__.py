"""flcompress: a compiler for video diffusion transformers. Fewer blocks, fewer steps, one recipe.

What every command does is a function here: `apply`, `plan`, `inspect`, `encode`, `export`, `generate`, `evaluate`,
`bench`, `report`, `sweep` and `remap_lora`. `load_recipe` reads a recipe; `trace`, `skip` and `remove` work on a
transformer in memory; `NotRemovable` says why a block has to stay. Each is imported when it is first used.

Authors of passes, exporters and model families find what they need in `flcompress.api`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flcompress.commands import apply as apply
    from flcompress.commands import bench as bench
    from flcompress.commands import encode as encode
    from flcompress.commands import evaluate as evaluate
    from flcompress.commands import export as export
    from flcompress.commands import generate as generate
    from flcompress.commands import inspect as inspect
    from flcompress.commands import plan as plan
    from flcompress.commands import remap_lora as remap_lora
    from flcompress.commands import report as report
    from flcompress.commands import sweep as sweep
    from flcompress.errors import NotRemovable as NotRemovable
    from flcompress.frontend.loading import load_recipe as load_recipe
    from flcompress.tracing.removal.remove import remove as remove
    from flcompress.tracing.skip import skip as skip
    from flcompress.tracing.tracer import trace as trace

__version__ = "0.1.0"

_DOOR = {
    "NotRemovable": "flcompress.errors",
    "apply": "flcompress.commands",
    "bench": "flcompress.commands",
    "encode": "flcompress.commands",
    "evaluate": "flcompress.commands",
    "export": "flcompress.commands",
    "generate": "flcompress.commands",
    "inspect": "flcompress.commands",
    "load_recipe": "flcompress.frontend.loading",
    "plan": "flcompress.commands",
    "remap_lora": "flcompress.commands",
    "remove": "flcompress.tracing.removal.remove",
    "report": "flcompress.commands",
    "skip": "flcompress.tracing.skip",
    "sweep": "flcompress.commands",
    "trace": "flcompress.tracing.tracer",
}

__all__ = [
    "NotRemovable",
    "apply",
    "bench",
    "encode",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load_recipe",
    "plan",
    "remap_lora",
    "remove",
    "report",
    "skip",
    "sweep",
    "trace",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if not TYPE_CHECKING:  # a type checker knows the names above, and no others

    def __getattr__(name: str) -> Any:
        if name not in _DOOR:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return getattr(import_module(_DOOR[name]), name)
