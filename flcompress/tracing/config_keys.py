"""Find the config key that counts a list of modules: change each integer by one, build, see which lists follow."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flcompress.models.configs import BUILD_ERRORS

_followers: WeakKeyDictionary[nn.Module, dict[tuple[str, str, str], set[str]]] = WeakKeyDictionary()

COUNTING_WORDS = ("layer", "depth", "block")


def list_lengths(model: nn.Module) -> dict[str, int]:
    """Return the length of every list of modules, by its path."""
    return {name: len(part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}


def has_config(model: nn.Module) -> bool:
    """Return whether the model can be rebuilt from its own config, as diffusers' models can."""
    return isinstance(getattr(model, "config", None), Mapping) and callable(getattr(type(model), "from_config", None))


def build(model: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    """Build a model of the same class with some config values changed; raises BUILD_ERRORS.

    Its parameters are on the meta device; buffers, such as tables of positions, are on the CPU.
    """
    from accelerate import init_empty_weights  # late: its import takes a second

    factory: Any = type(model)
    config: Any = model.config
    with warnings.catch_warnings(), torch.device("cpu"), init_empty_weights(include_buffers=False):
        warnings.simplefilter("ignore")  # about odd sizes, in configs that only probe
        built: nn.Module = factory.from_config(changed_config(config, changes))
    return built


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with some values changed, for `from_config`, as if it had been saved and loaded.

    Private entries are dropped: one of them lists keys at their default, which `from_config` would keep there whatever
    their values.
    """
    changed = {**config, **changes}
    return {key: _as_saved(value) for key, value in changed.items() if not key.startswith("_")}


def _as_saved(value: Any) -> Any:
    """Return the value as JSON would restore it: tuples as lists, keys as text."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:  # a dtype or the like, which diffusers writes in its own way
        return value


def followers(model: nn.Module, key: str) -> set[str]:
    """Return the lists of modules whose length follows the config value at `key`, a number or a list."""
    config: Any = model.config
    known = _followers.setdefault(model, {})
    snapshot = (key, repr(config), repr(list_lengths(model)))
    if snapshot not in known:
        known[snapshot] = _followers_of(model, key)
    return known[snapshot]


def _followers_of(model: nn.Module, key: str) -> set[str]:
    config: Any = model.config
    lengths = list_lengths(model)
    value = config[key]
    count = value if type(value) is int else len(value)
    # Down first; up where that cannot be built: nothing left in a list, or an index list that names the last block.
    for step in (-1, 1) if count > 1 else (1,):
        try:
            changed = list_lengths(build(model, {key: _longer(value, step)}))
        except BUILD_ERRORS:
            continue
        return {name for name, length in lengths.items() if changed.get(name, 0) == length + step}
    return set()


def _longer(value: Any, step: int) -> Any:
    """Return a number plus `step` (1 or -1), or a list with `step` more entries."""
    if type(value) is int:
        return value + step
    return [*value, value[-1]] if step > 0 else [*value][:step]


def list_keys(model: nn.Module, stacks: Iterable[str]) -> dict[str, str]:
    """Return {stack: config key} of stacks with a module per entry of a list, such as Wan VACE's hint positions."""
    keys: dict[str, str] = {}
    if not has_config(model):
        return keys
    config: Any = model.config
    lengths = list_lengths(model)
    for stack in stacks:
        for key, value in config.items():
            is_list = isinstance(value, list | tuple) and not key.startswith("_")
            if is_list and len(value) == lengths[stack] and stack in followers(model, key):
                keys.setdefault(stack, key)
    return keys


def count_keys(model: nn.Module, stacks: Iterable[str]) -> dict[str, str]:
    """Return {stack: config key}, without stacks that no single integer counts."""
    wanted = set(stacks)
    keys: dict[str, str] = {}
    if not has_config(model):
        return keys
    config: Any = model.config
    all_lengths = list_lengths(model)
    lengths = {all_lengths[stack] for stack in wanted}
    # Likely keys first, since every guess costs one build.
    numbers = [key for key, value in config.items() if type(value) is int and value > 0]
    numbers = [key for key in numbers if config[key] in lengths or any(word in key for word in COUNTING_WORDS)]
    numbers.sort(key=lambda key: (config[key] not in lengths, not any(word in key for word in COUNTING_WORDS)))
    for key in numbers:
        if wanted <= set(keys):
            break
        keys |= {stack: key for stack in followers(model, key) & wanted if stack not in keys}
    return keys
