"""Activations that autograd saves in a forward, counted block by block on fake tensors, which hold no memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    """Bytes as an affine function of the batch.

    Attributes:
        fixed: bytes that do not depend on the batch, such as weights copied to another precision.
        sample: bytes per sample.
    """

    fixed: float
    sample: float

    def of(self, samples: float) -> float:
        """Return the bytes of a batch."""
        return self.fixed + samples * self.sample


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """The activations that autograd saves in a forward.

    Attributes:
        outside: saved outside of all blocks.
        blocks: saved in all blocks together.
        block: saved in the block that saves most.
        backward: the most that computing a block and its backward take at once, gradients of its weights apart.
        streams: the blocks' inputs, which gradient checkpointing saves in place of `blocks`.
        stream: the input of one block, on average.
        inference: the most that is alive at once in a forward without gradients, its weights loaded in the precision.
    """

    outside: Bytes
    blocks: Bytes
    block: Bytes
    backward: Bytes
    streams: Bytes
    stream: Bytes
    inference: Bytes

    def training(self, samples: float, share: float, checkpointed: bool) -> float:
        """Return the most bytes while all that the forward saved is there, at the turn to the backward.

        Next to it the last block's backward works, or before that a frozen model's forward.

        Args:
            samples: samples in memory at once.
            share: share of the blocks that the model still has.
            checkpointed: whether blocks are recomputed in the backward.
        """
        inside = self.streams.of(samples) * share if checkpointed else self.blocks.of(samples) * share
        backward = self.backward.of(samples) - (0.0 if checkpointed else self.block.of(samples))
        return self.outside.of(samples) + inside + max(backward, self.inference.of(samples))


def saved_activations(
    transformer: Path, graph: BlockGraph, tokens: int, shape: LatentShape, precision: Precision, *, gpu: bool
) -> SavedActivations:
    """Count the activations of a forward at latents [batch, channels, *shape], at a batch of one and of two."""
    single, double = (
        count_activations(transformer, tokens, shape, precision, graph, batch=batch, gpu=gpu) for batch in (1, 2)
    )
    inference = count_activations(transformer, tokens, shape, precision, graph, gradients=False).alive

    def affine(first: float, second: float) -> Bytes:
        return Bytes(fixed=max(0.0, 2.0 * first - second), sample=second - first)

    return SavedActivations(
        outside=affine(single.total - sum(single.blocks), double.total - sum(double.blocks)),
        blocks=affine(sum(single.blocks), sum(double.blocks)),
        block=affine(max(single.blocks), max(double.blocks)),
        backward=affine(single.backward, double.backward),
        streams=affine(single.streams, double.streams),
        stream=affine(single.streams / len(single.blocks), double.streams / len(double.blocks)),
        inference=Bytes(fixed=0.0, sample=inference),
    )


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """Bytes of one forward of a batch.

    Attributes:
        alive: the most that is alive at once.
        total: all that autograd saves.
        blocks: what each block adds to `total`.
        backward: the most that a block and its backward take at once, gradients of its weights apart.
        streams: the inputs of all blocks.
    """

    alive: int
    total: int
    blocks: tuple[int, ...]
    backward: int
    streams: int


def count_activations(
    transformer: Path,
    tokens: int,
    shape: LatentShape,
    precision: Precision,
    graph: BlockGraph,
    *,
    batch: int = 1,
    gradients: bool = True,
    gpu: bool = False,
) -> ActivationBytes:
    """Count the activations of a forward at latents [batch, channels, *shape]: each tensor once, weights not at all.

    The forward runs on fake tensors, which choose the same kernels as real ones on the CPU. Of blocks that are built
    and called alike two run, and the second stands for the rest: the first also saves what all of them share.

    Args:
        transformer: the transformer's folder; its configuration is enough.
        tokens: length of the prompt.
        shape: (frames, height, width) of the latents.
        precision: precision that the forward computes in.
        graph: the transformer's block graph.
        batch: samples in the batch.
        gradients: whether autograd records the forward.
        gpu: whether autocast has the rules of CUDA instead of the CPU's.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils._pytree import tree_leaves, tree_map_only

    from flcompress.models.families import family_of
    from flcompress.models.inputs import example_inputs
    from flcompress.models.loading import meta_transformer
    from flcompress.models.network import CudaAutocast, half_precision
    from flcompress.models.tensor_memory import Alive
    from flcompress.tracing.call import Call, arguments_by_name, blank
    from flcompress.tracing.replay import signature
    from flcompress.tracing.running import AllTrueMasks
    from flcompress.tracing.skip import replaced_forwards

    model = meta_transformer(transformer)
    # What is not trained is held in half precision, and computes in it; trained weights are cast in every forward.
    loaded = torch.bfloat16 if precision == "bf16" and not gradients else torch.float32
    single = set(model._keep_in_fp32_modules or ())
    inputs = example_inputs(model, batch=batch, latent_shape=shape, tokens=tokens)

    def fake(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(like.shape, dtype=dtype or like.dtype, requires_grad=like.requires_grad)

    def weight(name: str, like: torch.Tensor) -> torch.Tensor:
        as_stored = like.dtype != torch.float32 or single & set(name.split("."))
        return fake(like, None if as_stored else loaded)

    # Holds the storages themselves: the address of a freed one could name another later.
    saved: dict[int, torch.UntypedStorage] = {}
    weights: dict[int, torch.UntypedStorage] = {}
    alone = False  # whether a block runs to have its backward counted; then nothing of it is noted

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not alone and storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    def saved_bytes() -> int:
        return sum(storage.nbytes() for storage in saved.values())

    def backward_alone(module: Callable[..., Any], args: Any, kwargs: Any) -> int:
        """Return the most that is alive in a block and its backward, next to what it is called with."""
        nonlocal alone
        alone = True
        own = tree_map_only(torch.Tensor, lambda one: one.detach().requires_grad_(one.requires_grad), (args, kwargs))
        with Alive() as working:
            ends = [end for end in tree_leaves(module(*own[0], **own[1])) if isinstance(end, torch.Tensor)]
            ends = [end for end in ends if end.requires_grad]
            torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])
        alone = False
        most: int = working.most
        return most

    streams = backward = 0
    added: list[int] = []
    run_blocks: dict[str, list[tuple[Any, int]]] = {}

    def counting(block: Block) -> Callable[..., Any]:
        module = model.get_submodule(block.path)
        stock, plain = module.forward, signature(module, Call((), {}, None, 0))

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal streams, backward
            arguments = arguments_by_name(module, args, kwargs)
            tensors = [arguments[stream.input] for stream in block.streams]
            streams += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            runs = run_blocks.setdefault(repr((plain, blank(args), sorted(blank(kwargs).items()))), [])
            if len(runs) < 2:
                if gradients:
                    backward = max(backward, backward_alone(stock, args, kwargs))
                before = saved_bytes()
                output = stock(*args, **kwargs)
                runs.append((tree_map_only(torch.Tensor, _shape, output), saved_bytes() - before))
            else:
                output = tree_map_only(torch.Tensor, _like, runs[1][0])
            added.append(runs[-1][1])
            return output

        return forward

    # Some models keep plain tensors in addition to their weights; those may stay on the meta device.
    forwards = {block.path: counting(block) for block in graph.blocks}
    with FakeTensorMode(allow_non_fake_inputs=True), AllTrueMasks(), replaced_forwards(model, forwards):
        state = {name: weight(name, value) for name, value in model.named_parameters()}
        state |= {name: fake(value) for name, value in model.named_buffers()}
        for value in state.values():
            if value.requires_grad:  # gradients of weights are counted by engine
                hook = value.register_post_accumulate_grad_hook
                hook(lambda weight: setattr(weight, "grad", None))  # type: ignore[no-untyped-call]
        weights = {value.untyped_storage()._cdata: value.untyped_storage() for value in state.values()}
        inputs = tree_map_only(torch.Tensor, fake, inputs)
        if loaded == torch.bfloat16:  # latents and prompts, as `as_network` gives them
            exact = family_of(type(model).__name__).fp32_arguments
            plain = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            cast = {name: value for name, value in plain.items() if value.is_floating_point() and name not in exact}
            inputs |= {name: value.to(loaded) for name, value in cast.items()}
        autocast = half_precision("cpu", enabled=precision == "bf16" and gradients)
        rules: AbstractContextManager[Any] = CudaAutocast() if gpu else nullcontext()
        alive, hooks = Alive(), saved_tensors_hooks(note, lambda tensor: tensor)
        with rules, autocast, torch.set_grad_enabled(gradients), hooks, alive:
            torch.func.functional_call(model, state, (), inputs)
    stood_for = sum(added) - sum(size for runs in run_blocks.values() for _, size in runs)
    return ActivationBytes(
        alive=alive.most,
        total=saved_bytes() + stood_for,
        blocks=tuple(added),
        backward=backward,
        streams=streams,
    )


def _shape(tensor: Any) -> Any:
    """Return a tensor's shape, dtype and need of gradients, without its storage."""
    import torch

    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


def _like(shape: Any) -> Any:
    """Return a fresh tensor of the shape that has a node in autograd's graph but is no leaf: models add in place."""
    import torch

    fresh = torch.empty_like(shape, device="cpu")
    return fresh.requires_grad_().clone() if shape.requires_grad else fresh
