"""From a module to its block graph, and from a smaller graph back to a module. The submodules import torch.

The package itself can be called: `flcompress.trace(model)` is `flcompress.trace.tracer.trace(model)`;
`flcompress.trace.certify` decides which blocks can go. Python binds a
package's submodules as its attributes, so the public function and this package must share the name.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from flcompress.trace.tracer import trace

        return trace(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name == "certify":
        from flcompress.trace.remove import certify

        return certify
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


sys.modules[__name__].__class__ = _CallablePackage
