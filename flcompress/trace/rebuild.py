"""The smaller model: which config and which weights it must have for the kept blocks to stay what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from flcompress.errors import NotRemovable
from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.trace.call import first_line
from flcompress.trace.config_keys import BUILD_ERRORS, build_on_meta, followers, list_lengths

Indices = frozenset[int]


def removed_indices(graph: BlockGraph, paths: tuple[str, ...]) -> dict[str, Indices]:
    """{stack: removed indices}, checked against the config keys that count the stacks; raises NotRemovable."""
    removed: dict[str, set[int]] = {}
    for path in paths:
        removed.setdefault(graph.block(path).stack, set()).add(graph.block(path).index)
    for stack, indices in removed.items():
        key = graph.config_keys.get(stack)
        if key is None:
            raise NotRemovable(
                f"'{stack}.{min(indices)}' cannot be removed: no config key of {graph.model_class} counts '{stack}'"
            )
        for other in sorted(one for one, its_key in graph.config_keys.items() if its_key == key and one != stack):
            if len(removed.get(other, ())) != len(indices):
                raise NotRemovable(
                    f"'{stack}.{min(indices)}' cannot be removed alone: config key '{key}' counts '{stack}' and "
                    f"'{other}', which go only together; remove {len(indices)} of '{other}' with it"
                )
    return {stack: frozenset(indices) for stack, indices in removed.items()}


def companions(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> dict[str, Indices]:
    """`removed`, and the same indices of other lists as long as a stack that its config key counts too."""
    lengths = list_lengths(model)
    found = dict(removed)
    for stack, indices in removed.items():
        for name in sorted(followers(model, graph.config_keys[stack])):
            inside = any(name.startswith(f"{one}.") for one in graph.stacks)
            if not inside and name not in graph.stacks and lengths[name] == lengths[stack]:
                found.setdefault(name, indices)
    return found


def reindexed(state: Mapping[str, Tensor], removed: Mapping[str, Indices]) -> dict[str, Tensor]:
    """The state dict without the removed entries, the others moved up to close the gaps."""
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stack = next((one for one in removed if name.startswith(f"{one}.")), None)
        if stack is None:
            kept[name] = tensor
            continue
        index, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(index) not in removed[stack]:
            place = int(index) - sum(one < int(index) for one in removed[stack])
            kept[f"{stack}.{place}.{rest}"] = tensor
    return kept


def config_candidates(
    config: Mapping[str, Any], graph: BlockGraph, removed: Mapping[str, Indices]
) -> Iterator[dict[str, Any]]:
    """Config changes to try, the simplest first: lowered counts, then also lists of settings and lists of indices."""
    counts = {graph.config_keys[stack]: config[graph.config_keys[stack]] - len(one) for stack, one in removed.items()}
    yield counts
    by_entry: dict[str, Any] = {}
    by_index: dict[str, Any] = {}
    for stack, indices in removed.items():
        depth = len(graph.stacks[stack])
        for key, value in config.items():
            if not isinstance(value, list | tuple) or key.startswith("_"):
                continue
            if len(value) == depth:
                by_entry[key] = type(value)(item for place, item in enumerate(value) if place not in indices)
            numbers = [item for item in value if type(item) is int and 0 <= item < depth]
            if numbers == list(value) and sorted(set(numbers)) == numbers:
                kept = [item for item in numbers if item not in indices]
                by_index[key] = type(value)(item - sum(one < item for one in indices) for item in kept)
    tried = [dict(config)]
    singles = [{key: value} for repairs in (by_entry, by_index) for key, value in repairs.items()]
    for repair in [*singles, by_entry, by_index, by_index | by_entry, by_entry | by_index]:
        if {**config, **repair} not in tried:
            tried.append({**config, **repair})
            yield counts | repair


def smaller(model: nn.Module, changes: Mapping[str, Any], removed: Mapping[str, Indices]) -> nn.Module | str:
    """A model of the changed config holding (not copying) the kept weights; a sentence where they do not fit.

    Its other buffers are on the meta device: it can be saved, not run.
    """
    try:
        built = build_on_meta(model, changes)
    except BUILD_ERRORS as error:
        return f"the smaller config is refused with {type(error).__name__}: {first_line(error)}"
    state, wanted = reindexed(model.state_dict(), removed), built.state_dict()
    unknown, missing = sorted(set(state) - set(wanted)), sorted(set(wanted) - set(state))
    wrong = sorted(name for name in set(state) & set(wanted) if state[name].shape != wanted[name].shape)
    for names, fault in (
        (missing, "needs weights that the model lacks"),
        (unknown, "has no place for weights"),
        (wrong, "expects another shape for weights"),
    ):
        if names:
            return f"rebuilt from its config, the smaller model {fault}: '{names[0]}' ({len(names)} in all)"
    built.load_state_dict(state, assign=True)
    return built


def needs_streams(blocks: list[Block]) -> None:
    """Raise NotRemovable for the first block that carries nothing on."""
    for block in blocks:
        if not block.streams:
            reason = block.reason or "it carries no residual stream"
            raise NotRemovable(f"'{block.path}' cannot be removed: {reason}")
