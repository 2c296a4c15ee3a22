"""Remove blocks from a checkpoint on disk: certify, then copy tensor by tensor in little memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flcompress.errors import NotRemovable, PostconditionError
from flcompress.ir.graph import BlockGraph
from flcompress.models.configs import check_transformer_config
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer, meta_transformer
from flcompress.models.part_check import matching_tensors
from flcompress.models.shards import LARGEST_SHARD, StackedTensor, StoredTensor, Writable, write_model
from flcompress.models.stock import Fit, state_shapes
from flcompress.tracing.config_keys import build
from flcompress.tracing.removal.remove import Certificate, certify, remove
from flcompress.tracing.removal.sources import Chunks
from flcompress.tracing.removal.stand_in import stand_in

OWN_WEIGHTS = 32_000_000
"""Most parameters of a model whose removal is certified with its own weights, which takes several copies of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRemoval:
    """Result of `remove_on_disk`.

    Attributes:
        certificate: certificate of the removal, on the model's own weights or on a stand-in.
        stand_in: {config key: (the model's value, the stand-in's)}; None for the model's own weights.
        names: {tensor in the new checkpoint: tensor in the old one that it equals or has rows of}.
        resized: {path of a kept block in the new checkpoint: its parameters}, for those that became another kind.
    """

    certificate: Certificate
    stand_in: Mapping[str, tuple[Any, Any]] | None
    names: Mapping[str, str]
    resized: Mapping[str, int]

    def without(self, graph: BlockGraph) -> BlockGraph:
        """Return the new checkpoint's graph, from the old one's.

        A block that took over the kind of a removed one, such as the last, costs as much as that did.
        """
        small = graph.without(self.certificate.removed)
        removed = [graph.block(path) for path in self.certificate.removed]
        blocks = []
        for path, count in self.resized.items():
            block = small.block(path)
            twins = (other for other in removed if (other.stack, other.parameters) == (block.stack, count))
            twin = next(twins, block)
            blocks.append(replace(block, parameters=count, flops=twin.flops))
        return small.with_blocks(blocks)


def remove_on_disk(
    folder: Path,
    paths: Iterable[str],
    target: Path,
    *,
    own_weights: int = OWN_WEIGHTS,
    largest_shard: int = LARGEST_SHARD,
) -> DiskRemoval:
    """Write to `target` the transformer of `folder` without the blocks at `paths`; kept tensors keep every byte.

    If a kept block becomes another kind, as the certificate says, rows of a tensor are copied instead.

    A model of at most `own_weights` parameters is removed from in memory and certified as `remove` does. A larger one
    is never loaded: the certificate is that of a stand-in (same class, same depth, fewer channels), and its findings,
    which config values change and which tensor becomes which, are checked against the large model's own names and
    shapes. `docs/decisions/0006-pruning-on-disk.md` says why that is sound.

    Raises:
        RequestError: a path that is no block, or all of them.
        ModelError: weights that are missing, short, or not those of the configuration.
        NotRemovable: no certificate.
    """
    config = check_transformer_config(folder)
    large = meta_transformer(folder)
    stored = matching_tensors(folder, large)
    count = sum(parameter.numel() for parameter in large.parameters())
    model, changed = _trial_model(folder, large, own_weights)
    small: Any = remove(model, paths, example_inputs(model))
    certificate: Certificate = small.flcompress_certificate
    names = _match_by_value(model, small, certificate, exact=changed is None)
    changes = {key: after for key, (_, after) in certificate.config_changes.items()}
    both = sorted(set(changes) & set(changed or ()))
    if both:
        raise NotRemovable(
            f"{folder}: the removal changes the config value {both[0]!r}, which also decides the width: it can only be "
            f"certified with the model's own weights, {count:,} parameters in memory; expected at most {own_weights:,}"
        )
    tensors = {new: _rows(stored[old], certificate.chunked.get(new)) for new, old in names.items()}
    built = build(large, changes)
    _check_fit(built, tensors)
    write_model(target, tensors, {**config, **changes}, largest_shard)
    return DiskRemoval(
        certificate=certificate, stand_in=changed, names=names, resized=_resized_blocks(large, built, certificate)
    )


def choose_removable(
    folder: Path, graph: BlockGraph, choice: Callable[[BlockGraph], tuple[str, ...]]
) -> tuple[BlockGraph, tuple[str, ...]]:
    """Choose blocks of the graph, all of them certified to be removable one by one.

    A block that turns out not to be is marked with the reason, and the choice is repeated. Large models are tried on
    a stand-in, as in `remove_on_disk`.

    Args:
        folder: the transformer's folder.
        graph: its graph; blocks whose `removable` is already decided are not tried again.
        choice: the blocks to remove from a graph.

    Returns:
        (the graph with what was found out, the chosen paths).
    """
    model: nn.Module | None = None
    while True:
        chosen = choice(graph)
        undecided = [path for path in chosen if graph.block(path).removable is None]
        if not undecided:
            return graph, chosen
        model = model or _trial_model(folder, meta_transformer(folder), OWN_WEIGHTS)[0]
        certified = certify(model, example_inputs(model), paths=undecided)
        graph = graph.with_blocks(
            replace(graph.block(path), removable=certified.block(path).removable, reason=certified.block(path).reason)
            for path in undecided
        )


def _trial_model(
    folder: Path, large: nn.Module, own_weights: int
) -> tuple[nn.Module, dict[str, tuple[Any, Any]] | None]:
    """Return the model on which removals are tried: that of `folder`, or a stand-in of a large one and its changes.

    It is on the CPU, whatever the training runs on: a certificate compares the bits of two models, and a GPU may choose
    another kernel for weights at another address.
    """
    if sum(parameter.numel() for parameter in large.parameters()) <= own_weights:
        return load_transformer(folder), None
    return stand_in(large)


def _match_by_value(model: nn.Module, small: nn.Module, certificate: Certificate, *, exact: bool) -> dict[str, str]:
    """Return {name in `small`: name in `model`}, identified by the tensors' values alone.

    For chunks the certificate gives the name, and the values must agree. With `exact` these values will be written, so
    any of several equal tensors is accepted.
    """
    state = model.state_dict()
    names_by_digest: dict[bytes, list[str]] = {}
    for name, tensor in state.items():
        names_by_digest.setdefault(_digest(tensor), []).append(name)
    before = {new: old for old, new in certificate.kept.items()}
    old_names: dict[str, str] = {}
    for name, tensor in small.state_dict().items():
        chunks = certificate.chunked.get(name)
        if chunks is not None and _digest(chunks.of(state[chunks.name])) == _digest(tensor):
            old_names[name] = chunks.name
            continue
        names = names_by_digest.get(_digest(tensor), [])
        expected = _old_name(name, before)
        if expected in names:
            old_names[name] = expected
        elif len(names) == 1 or (names and exact):
            old_names[name] = names[0]
        else:
            raise NotRemovable(
                f"{type(model).__name__}: the smaller model's tensor {name} is "
                f"{'several' if names else 'none'} of the model's, so it cannot be copied on disk"
            )
    return old_names


def _old_name(name: str, before: Mapping[str, str]) -> str:
    """Return the name of a tensor under its block's old path."""
    for new, old in before.items():
        if name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    return name


def _digest(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.float64:
        plain = plain.float()  # a table of positions in double precision goes through the certificate in single
    digest = hashlib.sha256(repr((plain.dtype, tuple(plain.shape))).encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _rows(tensor: StoredTensor, chunks: Chunks | None) -> Writable:
    if chunks is None:
        return tensor
    count = tensor.shape[0] // chunks.count
    return StackedTensor(tuple(tensor.rows(chunk * count, count) for chunk in chunks.order))


def _resized_blocks(large: nn.Module, built: nn.Module, certificate: Certificate) -> dict[str, int]:
    """Return {path in `built`: parameters} of the kept blocks whose number of parameters differs from `large`."""

    def count(model: nn.Module, path: str) -> int:
        return sum(parameter.numel() for parameter in model.get_submodule(path).parameters())

    sizes = {new: count(built, new) for new in certificate.kept.values()}
    return {new: sizes[new] for old, new in certificate.kept.items() if sizes[new] != count(large, old)}


def _check_fit(built: nn.Module, tensors: Mapping[str, Writable]) -> None:
    """Raise PostconditionError unless the full-width model of the smaller config has exactly the written tensors."""
    fit = Fit.between({name: tensor.shape for name, tensor in tensors.items()}, state_shapes(built))
    for name in sorted(fit.missing | fit.unexpected):
        raise PostconditionError(
            f"{name}: {'is' if name in fit.missing else 'is not'} asked for by the smaller config.json"
        )
    for name, (shape, expected) in fit.shapes.items():
        raise PostconditionError(f"{name}: has shape {shape}, the smaller config.json asks for {expected}")
