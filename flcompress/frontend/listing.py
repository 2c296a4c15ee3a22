"""The passes and exporters of this installation, for `flcompress passes`."""

from __future__ import annotations

from typing import Any

from flcompress.core.registry import find_exporter, find_pass, known_exporters, known_passes
from flcompress.frontend.reference import summary


def catalogue() -> dict[str, list[dict[str, str]]]:
    """Return every pass and exporter: name, class, one line of purpose."""
    return {
        "passes": [
            {"name": name, "class": path, "purpose": _purpose(find_pass(name))} for name, path in known_passes().items()
        ],
        "exporters": [
            {"name": name, "class": path, "purpose": _purpose(find_exporter(name))}
            for name, path in known_exporters().items()
        ],
    }


def catalogue_text(listed: dict[str, list[dict[str, str]]]) -> str:
    """`catalogue` for people."""
    width = max(len(step["name"]) for steps in listed.values() for step in steps)
    lines: list[str] = []
    for title, steps in listed.items():
        lines += [f"{title}:", *(f"  {step['name']:<{width}}  {step['purpose']}" for step in steps)]
    return "\n".join([*lines, "flcompress passes NAME shows its arguments"])


def step_text(described: dict[str, Any]) -> str:
    """`reference.describe_step` for people."""
    lines = [described["name"], "", described["summary"], "", *described["declares"], "", "arguments:"]
    for argument in described["arguments"]:
        value = "required" if argument["required"] else f"default {argument['default']}"
        lines.append(f"  {argument['name']}: {argument['expected']}; {value}")
        if argument["description"]:
            lines.append(f"      {argument['description']}")
    return "\n".join(lines if described["arguments"] else [*lines[:-1], "no arguments"])


def _purpose(kind: type) -> str:
    return summary(kind).splitlines()[0]
