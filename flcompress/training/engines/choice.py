"""The engine that a recipe asks for. FSDP2 and DeepSpeed are imported only where they are."""

from __future__ import annotations

from flcompress.core.steps import PassContext
from flcompress.training.engines.engine import Engine
from flcompress.training.engines.replicated import Distributed, Local


def engine_of(work: PassContext) -> Engine:
    """Return the engine that a pass's context asks for."""
    if work.engine == "local":
        return Local(work)
    if work.engine == "ddp":
        return Distributed(work)
    if work.engine == "fsdp2":
        from flcompress.training.engines.fsdp import FullySharded

        return FullySharded(work)
    from flcompress.training.engines.zero import Zero

    return Zero(work, stage=int(work.engine[-1]))
