"""The smallest unit a pass may keep, skip or remove, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape (batch axis included) and dtype (such as "float32") of one tensor."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A residual input (argument name, or position such as "0") and the output index that carries it on."""

    input: str
    output: int
    spec: TensorSpec

    def __str__(self) -> str:
        return f"{self.input} -> {self.output}: {self.spec}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A tensor on an edge: the producer's output (index, or name of a model input) and the consumer's input."""

    source: str
    target: str
    spec: TensorSpec  # as the producer gave it; views and concatenations may lie between


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its standard error; each level is (sigma_low, sigma_high, mean, standard_error)."""

    mean: float
    standard_error: float
    per_level: tuple[tuple[float, float, float, float], ...] = ()

    def __post_init__(self) -> None:
        # Plain floats, so that an int or a NumPy scalar given here does not change the JSON or its hash.
        object.__setattr__(self, "mean", float(self.mean))
        object.__setattr__(self, "standard_error", float(self.standard_error))
        levels = tuple((float(low), float(high), float(mean), float(se)) for low, high, mean, se in self.per_level)
        object.__setattr__(self, "per_level", levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A residual block of a stack (a list of modules), by its module path."""

    path: str  # "transformer_blocks.7"
    stack: str  # "transformer_blocks"
    index: int  # 7
    kind: str  # the module's class name
    streams: tuple[Stream, ...]  # in the order of the outputs; none: the block cannot act as an identity
    parameters: int
    flops: int  # of one sample
    outputs: int = 0  # 0: returns a bare tensor; n: a tuple of n
    silent: tuple[int, ...] = ()  # outputs that carry nothing on and are added to something: zero while it is skipped
    importance: Estimate | None = None
    temporal_attention: Estimate | None = None
    removable: bool | None = None  # None until certified
    reason: str = ""  # why `removable` or `streams` are as they are
