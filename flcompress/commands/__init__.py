"""Every command as a function: the command line parses arguments, calls these and prints what they return.

Every function imports what it needs when it is called, so that `flcompress --help` and `import flcompress` stay light.
A path may be a string or any path-like object; a run may be given as its folder or as a `RunDirectory`.
"""

from flcompress.commands.clips import bench, evaluate, generate
from flcompress.commands.models import encode, inspect, remap_lora
from flcompress.commands.recipes import apply, export, plan, report, sweep

__all__ = [
    "apply",
    "bench",
    "encode",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "plan",
    "remap_lora",
    "report",
    "sweep",
]
