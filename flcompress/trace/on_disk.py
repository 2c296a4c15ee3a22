"""Removal of blocks from a checkpoint on disk: certified, then copied tensor by tensor in little memory."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flcompress.errors import ModelError, NotRemovable, PostconditionError
from flcompress.ir.graph import BlockGraph
from flcompress.models import example_inputs
from flcompress.models.folder import check_transformer_config
from flcompress.models.loading import load_transformer, meta_transformer
from flcompress.models.shards import LARGEST_SHARD, StoredTensor, folder_tensors, write_tensors
from flcompress.trace.certificate import Certificate
from flcompress.trace.config_keys import build
from flcompress.trace.remove import certify, remove
from flcompress.trace.stand_in import stand_in

OWN_WEIGHTS = 32_000_000
"""Parameters up to which a removal is certified with the model's own weights, which takes several copies of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRemoval:
    """What `remove_on_disk` wrote.

    Attributes:
        certificate: of the removal, on the model's own weights or on a stand-in.
        stand_in: {config key: (the model's value, the stand-in's)}; None for the model's own weights.
        names: {name of a tensor in the new checkpoint: name in the old one}.
    """

    certificate: Certificate
    stand_in: Mapping[str, tuple[Any, Any]] | None
    names: Mapping[str, str]


def remove_on_disk(
    folder: Path,
    paths: Iterable[str],
    target: Path,
    *,
    own_weights: int = OWN_WEIGHTS,
    largest_shard: int = LARGEST_SHARD,
) -> DiskRemoval:
    """Write to `target` the transformer of `folder` without the blocks at `paths`; kept tensors keep every byte.

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
    stored = _matching(folder, large)
    count = sum(parameter.numel() for parameter in large.parameters())
    model, changed = _to_try(folder, large, own_weights)
    small: Any = remove(model, paths, example_inputs(model))
    certificate: Certificate = small.flcompress_certificate
    names = _observed(model, small, certificate.kept, exact=changed is None)
    changes = {key: after for key, (_, after) in certificate.config_changes.items()}
    both = sorted(set(changes) & set(changed or ()))
    if both:
        raise NotRemovable(
            f"{folder}: the removal changes the config value {both[0]!r}, which also decides the width: it can only be "
            f"certified with the model's own weights, {count:,} parameters in memory; expected at most {own_weights:,}"
        )
    _fits(build(large, changes), names, stored)
    work = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_tensors(work, {new: stored[old] for new, old in names.items()}, largest_shard)
    text = json.dumps({**config, **changes}, indent=2) + "\n"
    (work / "config.json").write_text(text, encoding="utf-8")
    work.rename(target)
    return DiskRemoval(certificate=certificate, stand_in=changed, names=names)


def choose_removable(
    folder: Path, graph: BlockGraph, choice: Callable[[BlockGraph], tuple[str, ...]]
) -> tuple[BlockGraph, tuple[str, ...]]:
    """What `choice` makes of the graph, all of it certified to be removable block by block.

    A block that turns out not to be is marked so, with the reason, and the choice made again. Large models are tried on
    a stand-in, as in `remove_on_disk`.

    Args:
        folder: of the transformer.
        graph: of it; blocks whose `removable` is decided already are not tried again.
        choice: the blocks to remove from a graph.

    Returns:
        (the graph with what was found out, the chosen paths).
    """
    model: nn.Module | None = None
    while True:
        chosen = choice(graph)
        open_ = [path for path in chosen if graph.block(path).removable is None]
        if not open_:
            return graph, chosen
        model = model or _to_try(folder, meta_transformer(folder), OWN_WEIGHTS)[0]
        found = certify(model, example_inputs(model), paths=open_)
        graph = graph.with_blocks(
            replace(graph.block(path), removable=found.block(path).removable, reason=found.block(path).reason)
            for path in open_
        )


def _to_try(folder: Path, large: nn.Module, own_weights: int) -> tuple[nn.Module, dict[str, tuple[Any, Any]] | None]:
    """The model that removals are tried on: the one in `folder` or, where that is large, a stand-in and its changes.

    On the CPU, whatever the training runs on: a certificate asks two models for the same bits, and a GPU may choose
    another kernel for weights at another address.
    """
    if sum(parameter.numel() for parameter in large.parameters()) <= own_weights:
        return load_transformer(folder), None
    return stand_in(large)


def _matching(folder: Path, model: nn.Module) -> dict[str, StoredTensor]:
    """The stored tensors, which are those the configuration asks for."""
    stored = folder_tensors(folder)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unknown = sorted(
        name for name in set(stored) - set(wanted) if not any(re.search(pattern, name) for pattern in ignored)
    )
    for what, names in (("missing keys", sorted(set(wanted) - set(stored))), ("unexpected keys", unknown)):
        if names:
            raise ModelError(
                f"{folder}: {len(names)} {what}, first {names[0]}; the weights do not belong to this config.json"
            )
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise ModelError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, expected {list(shape)}; "
                "the weights do not belong to this config.json"
            )
    return stored


def _observed(model: nn.Module, small: nn.Module, kept: Mapping[str, str], *, exact: bool) -> dict[str, str]:
    """{name in `small`: name in `model`}, told by the tensors' values alone.

    `exact`: these are the values that will be written, so that of several equal tensors any one will do.
    """
    places: dict[bytes, list[str]] = {}
    for name, tensor in model.state_dict().items():
        places.setdefault(_digest(tensor), []).append(name)
    before = {new: old for old, new in kept.items()}
    found: dict[str, str] = {}
    for name, tensor in small.state_dict().items():
        names = places.get(_digest(tensor), [])
        likely = _renamed(name, before)
        if likely in names:
            found[name] = likely
        elif len(names) == 1 or (names and exact):
            found[name] = names[0]
        else:
            raise NotRemovable(
                f"{type(model).__name__}: the smaller model's tensor {name} is "
                f"{'several' if names else 'none'} of the model's, so it cannot be copied on disk"
            )
    return found


def _renamed(name: str, before: Mapping[str, str]) -> str:
    """The name of a tensor of a block under the block's old path."""
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


def _fits(small: nn.Module, names: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> None:
    """The smaller configuration, at full width, must ask for exactly the tensors that will be written."""
    wanted = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    given = {new: stored[old].shape for new, old in names.items()}
    for name in sorted(set(wanted) ^ set(given)):
        raise PostconditionError(f"{name}: {'is' if name in wanted else 'is not'} asked for by the smaller config.json")
    for name, shape in wanted.items():
        if given[name] != shape:
            raise PostconditionError(f"{name}: has shape {given[name]}, the smaller config.json asks for {shape}")
