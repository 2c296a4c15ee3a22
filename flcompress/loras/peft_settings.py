"""PEFT's settings, which diffusers keeps as JSON in a LoRA's file, with the module names of the cut model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from flcompress.errors import RequestError

SETTINGS = "lora_adapter_metadata"
"""Their key in the file's metadata."""

_PREFIXES = ("", "transformer")
"""Of settings for the transformer, as transformers and pipelines save them."""
_BY_PATTERN = ("rank_pattern", "alpha_pattern")
_CHOICE = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""What, beside its names, chooses modules: by numbers of blocks or regular expressions, which do not hold any more."""
_KNOWN = ("target_modules", *_BY_PATTERN, *_CHOICE)


def remap_settings(text: str, modules: Mapping[str, str], where: str = SETTINGS) -> str:
    """The settings for the cut model.

    Modules that are chosen by more than a list of their names are listed one by one, and values by pattern are given to
    each module that they were for.

    Args:
        text: JSON.
        modules: {name in the uncut model: name in the cut one}, of the modules that the LoRA keeps.
        where: what holds them, for messages.

    Raises:
        RequestError: no JSON object, or patterns that are none.
    """
    settings = _read(text, where)
    for prefix in _PREFIXES:
        start = f"{prefix}." if prefix else ""
        own = {key: settings[start + key] for key in _KNOWN if start + key in settings}
        settings |= {start + key: value for key, value in _remapped(own, modules, where).items()}
    return json.dumps(settings, indent=2, sort_keys=True)


def _read(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"{where}: {text[:40]!r} given, expected a JSON object; save the LoRA again")
    return found


def _remapped(own: dict[str, Any], modules: Mapping[str, str], where: str) -> dict[str, Any]:
    made: dict[str, Any] = {key: _for_each(own[key], modules, where) for key in _BY_PATTERN if own.get(key)}
    target = own.get("target_modules")
    if isinstance(target, str) or any(own.get(key) for key in _CHOICE):
        made |= {key: None for key in _CHOICE if key in own}
        return made | {"target_modules": sorted(modules.values())}
    if target:
        # A name that is whole is the module's; one that is an ending, such as to_q, is that of many.
        ends = [name for name in target if any(old.endswith(f".{name}") for old in modules)]
        made["target_modules"] = sorted({*ends, *(modules[name] for name in target if name in modules)})
    return made


def _for_each(patterns: Mapping[str, Any], modules: Mapping[str, str], where: str) -> dict[str, Any]:
    """{new name: value} of every module that a pattern is for, by PEFT's rule: the first one that ends its name."""
    found, known = {}, {key: _pattern(key, where) for key in patterns}
    for old, new in modules.items():
        first = next((key for key, pattern in known.items() if pattern.match(old)), None)
        if first is not None:
            found[new] = patterns[first]
    return found


def _pattern(key: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise RequestError(f"{where}: {key!r} given, expected a regular expression; save the LoRA again") from error
