"""How a training runs on one process or many. `engine_of` gives the recipe's; DeepSpeed is imported only when asked."""

from flcompress.training.engines.choice import engine_of
from flcompress.training.engines.engine import Engine, Hyper, NotFinite, Wrapped

__all__ = ["Engine", "Hyper", "NotFinite", "Wrapped", "engine_of"]
