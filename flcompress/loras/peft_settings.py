"""Remap PEFT's settings, which diffusers keeps as JSON in a LoRA's file, to the module names of the pruned model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from flcompress.errors import RequestError

SETTINGS = "lora_adapter_metadata"
"""Key of the settings in the file's metadata."""

_PREFIXES = ("", "transformer")
"""Prefixes of the transformer's settings, as transformers and pipelines save them."""
_BY_PATTERN = ("rank_pattern", "alpha_pattern")
_CHOICE = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Settings that choose modules by block indices or regular expressions, which no longer hold."""
_KNOWN = ("target_modules", *_BY_PATTERN, *_CHOICE)


def remap_settings(text: str, modules: Mapping[str, str], where: str = SETTINGS) -> str:
    """Return the settings for the pruned model.

    Modules chosen by more than a list of names are listed one by one, and values by pattern are assigned to each
    matching module.

    Args:
        text: JSON.
        modules: {name in the uncut model: name in the pruned one}, of the modules that the LoRA keeps.
        where: origin of the settings, for messages.

    Raises:
        RequestError: no JSON object, or an invalid pattern.
    """
    settings = _read(text, where)
    for prefix in _PREFIXES:
        start = f"{prefix}." if prefix else ""
        own = {key: settings[start + key] for key in _KNOWN if start + key in settings}
        settings |= {start + key: value for key, value in _remap(own, modules, where).items()}
    return json.dumps(settings, indent=2, sort_keys=True)


def _read(text: str, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise RequestError(f"{where}: {text[:40]!r} given, expected a JSON object; save the LoRA again")
    return settings


def _remap(own: dict[str, Any], modules: Mapping[str, str], where: str) -> dict[str, Any]:
    remapped: dict[str, Any] = {key: _for_each(own[key], modules, where) for key in _BY_PATTERN if own.get(key)}
    target = own.get("target_modules")
    if isinstance(target, str) or any(own.get(key) for key in _CHOICE):
        remapped |= {key: None for key in _CHOICE if key in own}
        return remapped | {"target_modules": sorted(modules.values())}
    if target:
        # A full name means one module; an ending, such as to_q, means many.
        ends = [name for name in target if any(old.endswith(f".{name}") for old in modules)]
        remapped["target_modules"] = sorted({*ends, *(modules[name] for name in target if name in modules)})
    return remapped


def _for_each(patterns: Mapping[str, Any], modules: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return {new name: value} of every module matched by a pattern, by PEFT's rule: the first that ends its name."""
    values, known = {}, {key: _pattern(key, where) for key in patterns}
    for old, new in modules.items():
        first = next((key for key, pattern in known.items() if pattern.match(old)), None)
        if first is not None:
            values[new] = patterns[first]
    return values


def _pattern(key: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise RequestError(f"{where}: {key!r} given, expected a regular expression; save the LoRA again") from error
