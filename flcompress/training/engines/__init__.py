"""Engines: a training on one process or many. `engine_of` returns the recipe's engine."""

from flcompress.training.engines.choice import engine_of
from flcompress.training.engines.engine import Engine, Hyper, NotFinite, WrappedModel

__all__ = ["Engine", "Hyper", "NotFinite", "WrappedModel", "engine_of"]
