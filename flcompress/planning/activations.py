"""What a forward keeps alive for its backward, counted block by block on tensors that hold no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.core.settings import Precision
from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph

if TYPE_CHECKING:
    from flcompress.models.families.family import LatentShape


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes that do not depend on the batch (weights copied to another precision), and those of a sample."""

    fixed: float
    sample: float

    def of(self, samples: float) -> float:
        return self.fixed + samples * self.sample


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What autograd keeps of a forward.

    Attributes:
        outside: of all that is in no block.
        blocks: of all blocks together.
        block: of the block that keeps most.
        streams: the blocks' inputs, which gradient checkpointing keeps in place of `blocks`.
        alone: the most that is alive at once of a forward without gradients, of weights loaded in the precision.
    """

    outside: Bytes
    blocks: Bytes
    block: Bytes
    streams: Bytes
    alone: Bytes

    def training(self, samples: float, share: float, checkpointed: bool) -> float:
        """Bytes at the turn from the forward to the backward.

        One block's worth is added for what is being worked on: a backward holds the gradients of what a block kept, a
        frozen model's forward what it computes with.

        Args:
            samples: how many are in memory at once.
            share: of the blocks that the model has.
            checkpointed: whether blocks are computed again.
        """
        inside = self.streams.of(samples) * share if checkpointed else self.blocks.of(samples) * share
        again = self.block.of(samples) if checkpointed else 0.0
        return self.outside.of(samples) + inside + again + self.block.of(samples)


def kept_alive(transformer: Path, graph: BlockGraph, tokens: int, shape: LatentShape, precision: Precision) -> Kept:
    """Count what a forward at latents [batch, channels, *shape] keeps alive."""
    one, two = (kept_for_backward(transformer, tokens, shape, precision, graph, batch=batch) for batch in (1, 2))
    alone = kept_for_backward(transformer, tokens, shape, precision, graph, gradients=False).alive

    def line(first: float, second: float) -> Bytes:
        return Bytes(fixed=max(0.0, 2.0 * first - second), sample=second - first)

    return Kept(
        outside=line(one.total - sum(one.blocks), two.total - sum(two.blocks)),
        blocks=line(sum(one.blocks), sum(two.blocks)),
        block=line(max(one.blocks), max(two.blocks)),
        streams=line(one.streams, two.streams),
        alone=Bytes(fixed=0.0, sample=alone),
    )


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Bytes of a batch: the most that is alive, all that autograd keeps, what each block adds, the blocks' streams."""

    alive: int
    total: int
    blocks: tuple[int, ...]
    streams: int


def kept_for_backward(
    transformer: Path,
    tokens: int,
    shape: LatentShape,
    precision: Precision,
    graph: BlockGraph,
    *,
    batch: int = 1,
    gradients: bool = True,
) -> Counted:
    """Count for latents [batch, channels, *shape]; each tensor once, weights not at all.

    Counted on fake tensors, which choose the same kernels as real ones on the CPU. Of blocks that are built and called
    alike two run, and the second stands for the rest: the first keeps, too, what all of them share.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils._pytree import tree_map_only

    from flcompress.models.inputs import example_inputs
    from flcompress.models.loading import meta_transformer
    from flcompress.models.network import half_precision
    from flcompress.models.tensor_memory import Alive
    from flcompress.tracing.call import Call, blank, named
    from flcompress.tracing.replay import signature
    from flcompress.tracing.running import AllTrueMasks
    from flcompress.tracing.skip import replaced_forwards

    model = meta_transformer(transformer)
    # What is not trained is loaded in half precision; trained weights are fp32 and cast in every forward.
    loaded = torch.bfloat16 if precision == "bf16" and not gradients else torch.float32
    single = set(model._keep_in_fp32_modules or ())
    inputs = example_inputs(model, batch=batch, latent_shape=shape, tokens=tokens)

    def fake(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(like.shape, dtype=dtype or like.dtype, requires_grad=like.requires_grad)

    def weight(name: str, like: torch.Tensor) -> torch.Tensor:
        kept = like.dtype != torch.float32 or single & set(name.split("."))
        return fake(like, None if kept else loaded)

    # The storages themselves are held: the address of one that is freed would name another later.
    saved: dict[int, torch.UntypedStorage] = {}
    weights: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    def held() -> int:
        return sum(storage.nbytes() for storage in saved.values())

    streams = 0
    spent: list[int] = []
    known: dict[str, list[tuple[Any, int]]] = {}

    def counting(block: Block) -> Callable[..., Any]:
        module = model.get_submodule(block.path)
        stock, plain = module.forward, signature(module, Call((), {}, None, 0))

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal streams
            given = named(module, args, kwargs)
            tensors = [given[stream.input] for stream in block.streams]
            streams += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            alike = known.setdefault(repr((plain, blank(args), sorted(blank(kwargs).items()))), [])
            if len(alike) < 2:
                before = held()
                output = stock(*args, **kwargs)
                alike.append((tree_map_only(torch.Tensor, _shape, output), held() - before))
            else:
                output = tree_map_only(torch.Tensor, _like, alike[1][0])
            spent.append(alike[-1][1])
            return output

        return forward

    # Some models keep plain tensors beside their weights; those may stay on the meta device.
    forwards = {block.path: counting(block) for block in graph.blocks}
    with FakeTensorMode(allow_non_fake_inputs=True), AllTrueMasks(), replaced_forwards(model, forwards):
        state = {name: weight(name, value) for name, value in model.named_parameters()}
        state |= {name: fake(value) for name, value in model.named_buffers()}
        weights = {value.untyped_storage()._cdata: value.untyped_storage() for value in state.values()}
        inputs = tree_map_only(torch.Tensor, fake, inputs)
        cast = half_precision("cpu", enabled=precision == "bf16")
        alive = Alive()
        with cast, torch.set_grad_enabled(gradients), saved_tensors_hooks(note, lambda tensor: tensor), alive:
            torch.func.functional_call(model, state, (), inputs)
    more = sum(spent) - sum(size for alike in known.values() for _, size in alike)
    return Counted(alive=alive.most, total=held() + more, blocks=tuple(spent), streams=streams)


def _shape(tensor: Any) -> Any:
    """All but the storage."""
    import torch

    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


def _like(shape: Any) -> Any:
    """A fresh tensor of the shape, with a place in the graph of autograd, but no leaf: models add in place."""
    import torch

    fresh = torch.empty_like(shape, device="cpu")
    return fresh.requires_grad_().clone() if shape.requires_grad else fresh
