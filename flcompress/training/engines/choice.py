"""The engine that a recipe asks for. FSDP2 and DeepSpeed are imported only where they are."""

from __future__ import annotations

from flcompress.core.steps import PassContext
from flcompress.training.engines.engine import Engine
from flcompress.training.engines.replicated import Distributed, Local


def engine_of(context: PassContext) -> Engine:
    """Return the engine that a pass's context asks for."""
    if context.engine == "local":
        return Local(context)
    if context.engine == "ddp":
        return Distributed(context)
    if context.engine == "fsdp2":
        from flcompress.training.engines.fsdp import FullySharded

        return FullySharded(context)
    from flcompress.training.engines.zero import Zero

    return Zero(context, stage=int(context.engine[-1]))
