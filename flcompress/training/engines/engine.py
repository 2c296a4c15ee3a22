"""The engine of a training loop: wrap models, exchange gradients, step optimisers, gather weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from flcompress.core.steps import PassContext
from flcompress.errors import RequestError, TrainingError, UnavailableError
from flcompress.ir.graph import BlockGraph
from flcompress.models.loading import load_transformer, meta_transformer
from flcompress.models.network import choose_attention, compile_blocks, half_precision, mask_switch, missing_compiler
from flcompress.tracing.skip import graph_of, mute, skip
from flcompress.training.engines.offload import inputs_on_host
from flcompress.training.engines.sequence import split_tokens
from flcompress.training.parts import Part


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Settings of AdamW, and the global norm that gradients are scaled down to."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class NotFinite(Exception):  # noqa: N818
    """The gradient norm is not finite; nothing was changed."""

    def __init__(self, norm: float) -> None:
        super().__init__(str(norm))
        self.norm = norm


class WrappedModel(ABC):
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
        """Return a context for forward and backward of a micro batch; `last` for the one before the optimiser step."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients; after the last micro batch they are means over the processes."""

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clip, take one optimiser step, clear gradients; return the global norm before clipping.

        Raises:
            NotFinite: the norm is not finite; nothing was changed but the gradients, which are cleared.
        """

    @abstractmethod
    def clear(self) -> None:
        """Discard the gradients."""

    @abstractmethod
    def shards(self) -> dict[str, Part]:
        """Return this process's part of the trained parameters, by parameter name."""

    def shards_changed(self) -> None:
        """Invalidate copies that were gathered before this write to `shards`."""
        return

    @abstractmethod
    def full_state(self) -> dict[str, torch.Tensor]:
        """Return the whole state dict on the CPU in the main process, empty in the others; all processes together."""

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """Return this process's part of the weights, and of the moments if there are any: live storage.

        The names are the same in every engine: `model.NAME` for the state dict, and `optimizer.MOMENT.NAME` with the
        moments `step`, `exp_avg` and `exp_avg_sq` for the trained parameters.
        """

    @abstractmethod
    def begin_moments(self) -> None:
        """Allocate the moments that the first step would, where there are none."""

    def parts_changed(self) -> None:
        """Take over what was written to `parts`."""
        self.shards_changed()


class Engine(ABC):
    """A way to distribute a training over processes, for one pass; see `engine_of`.

    Attributes:
        skips: whether a skipped block may be left out of the computation; if not, it is computed and multiplied by
            zero.
        splits_weights: whether a process holds only its part of every weight, and gathers them block by block.
    """

    skips: bool = True
    splits_weights: bool = False
    _graphs: ClassVar[dict[str, BlockGraph]] = {}

    def __init__(self, context: PassContext) -> None:
        self.context = context

    def load_trained(self, folder: Path) -> Any:
        """Load a transformer to be trained, or this process's part of it, in fp32; all processes together.

        Raises:
            RequestError: the training asks for gradient checkpointing, which its class does not have.
        """
        model = self._load(folder, None, trained=True)
        self.checkpoint_blocks(model)
        return self._choose_kernels(model, folder)

    def load_frozen(self, folder: Path, *, unsharded: Collection[str] = ()) -> Any:
        """Load a transformer that is not trained, or this process's part of it, in the training's precision.

        Args:
            folder: the transformer's folder.
            unsharded: paths of parameters that every process holds whole, since LoRA roles replace them.
        """
        half = torch.bfloat16 if self.context.precision == "bf16" else None
        return self._choose_kernels(self._load(folder, half, trained=False, unsharded=unsharded), folder)

    def _load(self, folder: Path, dtype: torch.dtype | None, *, trained: bool, unsharded: Collection[str] = ()) -> Any:
        """Load this process's part of a transformer onto its device."""
        return load_transformer(folder, self.context.device, dtype).requires_grad_(trained)

    def checkpoint_blocks(self, model: Any, function: Callable[..., Any] | None = None) -> None:
        """Enable gradient checkpointing if the training asks for it: the backward recomputes the blocks.

        Args:
            model: a diffusers transformer.
            function: recomputes a block; torch's own by default.

        Raises:
            RequestError: the model's class has no gradient checkpointing.
        """
        if not self.context.gradient_checkpointing:
            return
        if not model._supports_gradient_checkpointing:
            raise RequestError(
                f"training.gradient_checkpointing: {type(model).__name__} has none in this diffusers; set it to false"
            )
        function = function or partial(checkpoint, use_reentrant=False)
        if (switch := mask_switch(model)) is not None:
            function = switch.recomputing(function)
        if "inputs" in self.context.offload:
            function = inputs_on_host(function)
        model.enable_gradient_checkpointing(function)

    def _choose_kernels(self, model: Any, folder: Path) -> Any:
        """Set the kernel of attention, compile the blocks, and split the tokens, as the training asks."""
        choose_attention(model, self.context.attention)
        if self.context.compile:
            if self.context.device == "cpu" and (missing := missing_compiler()):
                raise UnavailableError(f"training.compile: {missing}, or set it to false")
            compile_blocks(model, self.graph(folder))
        if (group := self.context.world.sequence) is not None:
            split_tokens(model, self.graph(folder), group)
        return model

    def graph(self, folder: Path) -> BlockGraph:
        """Return the block graph of the transformer in `folder`, traced once for each architecture."""
        settings = (folder / "config.json").read_text(encoding="utf-8")
        if settings not in self._graphs:
            self._graphs[settings] = graph_of(meta_transformer(folder))
        return self._graphs[settings]

    @abstractmethod
    def wrap_trained(self, model: nn.Module, hyper: Hyper, *, batch: int) -> WrappedModel:
        """Wrap a model for training.

        Args:
            model: from `load_trained`, or a small one that is the same in every process, on its device.
            hyper: settings of its optimiser.
            batch: samples of a step, over all processes.
        """

    def verify_engine(self, wrapped: WrappedModel, kind: type) -> WrappedModel:
        """Return `wrapped` if it is what the recipe asks for; each check has caught a silent failure.

        Raises:
            TrainingError: the library built something else.
        """
        size, name = self.context.world.size, type(wrapped.module).__name__
        if not isinstance(wrapped.module, kind):
            raise self._mismatch(f"the model is a {name}", kind.__name__)
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if processes != size:
            raise self._mismatch(f"{processes} processes share the model", f"{size}")
        for key, part in wrapped.shards().items():
            if part.tensor.dtype != torch.float32:
                raise self._mismatch(f"{key} is held in {part.tensor.dtype}", "torch.float32")
        return wrapped

    def _mismatch(self, actual: str, expected: str) -> TrainingError:
        return TrainingError(f"training.engine: {self.context.engine} asked, but {actual}, expected {expected}")

    @abstractmethod
    def wrap_frozen(self, model: nn.Module) -> Any:
        """Wrap a model from `load_frozen`; return the module to call."""

    def skip(self, model: nn.Module, paths: Iterable[str], *, graph: BlockGraph) -> AbstractContextManager[None]:
        """Return a context in which the blocks at `paths`, the same in every process, are identities."""
        return skip(model, paths, graph=graph) if self.skips else mute(model, paths, graph=graph)

    @contextmanager
    def forward_mode(self) -> Iterator[None]:
        """Return a context for every forward and backward of a training: its precision."""
        with half_precision(self.context.device, enabled=self.context.precision == "bf16"):
            yield
