"""What an engine does for the one loop: it wraps models, moves gradients, steps optimisers, and gathers weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flcompress.core.steps import PassContext
from flcompress.errors import RequestError, TrainingError, UnavailableError
from flcompress.ir.graph import BlockGraph
from flcompress.models.loading import load_transformer, meta_transformer
from flcompress.models.network import compile_blocks, half_precision, missing_compiler
from flcompress.tracing.skip import graph_of, mute, skip


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """AdamW's settings and the global norm that gradients are scaled down to."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class NotFinite(Exception):  # noqa: N818
    """The gradient norm is not finite; nothing was changed."""

    def __init__(self, norm: float) -> None:
        super().__init__(str(norm))
        self.norm = norm


class Wrapped(ABC):
    """A trained model under an engine.

    A parameter without a gradient is stepped with a gradient of zeros: so AdamW's moments of a skipped block fade alike
    in every engine (sharded ones keep all gradients in one flat tensor and could not tell).

    Attributes:
        model: the model itself, where paths of blocks lead.
        module: what is called.
    """

    model: Any
    module: Any

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of each micro batch of a step; `last` before the step."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add gradients to those since the last step; after the last micro batch they are means over the processes."""

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clip, take one optimiser step, clear gradients; the global norm before clipping. Raises NotFinite."""

    @abstractmethod
    def clear(self) -> None:
        """Throw gradients away."""

    @abstractmethod
    def shards(self) -> dict[str, torch.Tensor]:
        """The trained parameters as far as this process holds them: live storage, by parameter name."""

    def written(self) -> None:
        """After something was written to `shards`: copies of them that were gathered before count no more."""
        return

    @abstractmethod
    def gathered(self) -> dict[str, torch.Tensor]:
        """The whole state dict on the CPU in the main process, empty in the others. All processes call it together."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """All that this process must store to go on bit for bit; empty where the main process stores it."""

    @abstractmethod
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `state` gave."""


class Engine(ABC):
    """One way to share a training. Made for one pass; see `engine_of`.

    Attributes:
        layout: how checkpoints are split; see `Checkpoints`.
        skips: whether a skipped block may be left out of the computation. Where not, it is computed and multiplied
            by zero.
        splits_weights: whether a process holds only its part of every weight, and gathers them block by block.
    """

    layout: str
    skips: bool = True
    splits_weights: bool = False

    def __init__(self, work: PassContext) -> None:
        self.work = work
        self._graphs: dict[str, BlockGraph] = {}

    def load_trained(self, folder: Path) -> Any:
        """A transformer to be trained, or this process's part of it: fp32 weights. All processes call it together.

        Raises:
            RequestError: gradient checkpointing is asked of a class that has none.
        """
        model = self._load(folder, None, trained=True)
        self.checkpoint_blocks(model)
        return self._compiled(model, folder)

    def load_frozen(self, folder: Path, *, whole: Collection[str] = ()) -> Any:
        """A transformer that only judges, or this process's part of it: weights in the training's precision.

        Args:
            folder: of the transformer.
            whole: paths of parameters that every process holds, since it puts others in their place at times.
        """
        half = torch.bfloat16 if self.work.precision == "bf16" else None
        return self._compiled(self._load(folder, half, trained=False, whole=whole), folder)

    def _load(self, folder: Path, dtype: torch.dtype | None, *, trained: bool, whole: Collection[str] = ()) -> Any:
        """The transformer, as far as this process holds it, on its device."""
        return load_transformer(folder, self.work.device, dtype).requires_grad_(trained)

    def checkpoint_blocks(self, model: Any, function: Callable[..., Any] | None = None) -> None:
        """Let the model compute its blocks again in the backward, by `function` where given, if the training asks so.

        Raises:
            RequestError: its class cannot.
        """
        if not self.work.gradient_checkpointing:
            return
        if not model._supports_gradient_checkpointing:
            raise RequestError(
                f"training.gradient_checkpointing: {type(model).__name__} has none in this diffusers; set it to false"
            )
        model.enable_gradient_checkpointing(function)

    def _compiled(self, model: Any, folder: Path) -> Any:
        if self.work.compile:
            if self.work.device == "cpu" and (missing := missing_compiler()):
                raise UnavailableError(f"training.compile: {missing}, or set it to false")
            compile_blocks(model, self.graph(folder))
        return model

    def graph(self, folder: Path) -> BlockGraph:
        """Of the transformer in a folder, from its configuration; traced once for all roles of one architecture."""
        settings = (folder / "config.json").read_text(encoding="utf-8")
        if settings not in self._graphs:
            self._graphs[settings] = graph_of(meta_transformer(folder))
        return self._graphs[settings]

    @abstractmethod
    def trained(self, model: nn.Module, hyper: Hyper, *, batch: int) -> Wrapped:
        """Take a model into training.

        Args:
            model: from `load_trained`, or a small one that was made alike in every process, on its device.
            hyper: of its optimiser.
            batch: samples of a step, over all processes.
        """

    def proven(self, wrapped: Wrapped, kind: type) -> Wrapped:
        """`wrapped`, proven to be what was asked: each of these has been seen to go wrong without a word.

        Raises:
            TrainingError: the library made something else of it.
        """
        size, name = self.work.world.size, type(wrapped.module).__name__
        if not isinstance(wrapped.module, kind):
            raise self._unproven(f"the model is a {name}", kind.__name__)
        met = dist.get_world_size() if dist.is_initialized() else 1
        if met != size:
            raise self._unproven(f"{met} processes share the model", f"{size}")
        odd = next(((key, one.dtype) for key, one in wrapped.shards().items() if one.dtype != torch.float32), None)
        if odd:
            raise self._unproven(f"{odd[0]} is held in {odd[1]}", "torch.float32")
        return wrapped

    def _unproven(self, found: str, expected: str) -> TrainingError:
        return TrainingError(f"training.engine: {self.work.engine} asked, but {found}, expected {expected}")

    @abstractmethod
    def frozen(self, model: nn.Module) -> Any:
        """Take a model from `load_frozen` into the training; what is called."""

    def skip(self, model: nn.Module, paths: Iterable[str], *, graph: BlockGraph) -> AbstractContextManager[None]:
        """Blocks at `paths` are identities, in the way that is right with this engine; the same in every process."""
        return skip(model, paths, graph=graph) if self.skips else mute(model, paths, graph=graph)

    @contextmanager
    def forward_mode(self) -> Iterator[None]:
        """Around every forward and backward of a training: precision."""
        with half_precision(self.work.device, enabled=self.work.precision == "bf16"):
            yield
