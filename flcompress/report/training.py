"""Which logged numbers share a plot: one a loss, one for gradient norms, one for the monitor's held-out losses."""

from __future__ import annotations

import math
from collections.abc import Iterable

from flcompress.report.reading import Entry
from flcompress.report.record import Record

Curve = list[tuple[float, float]]

MOST_PANELS = 8
"""Plots a pass may have; a pass that logs more numbers still has them all in its metrics.jsonl."""


def panels(entry: Entry) -> dict[str, dict[str, Curve]]:
    """Plot title -> curve label -> (step, value); numbers that are not finite are left out."""
    records = entry.metrics()
    result = entry.result()
    if result is not None and result.has("monitor") and not any("elbo_full" in r.values for r in records):
        records = [*records, *result.each("monitor")]
    found: dict[str, dict[str, Curve]] = {}
    for field, curve in _fields(records).items():
        title, label = _panel(field)
        found.setdefault(title, {})[label] = curve
    order = sorted(found, key=lambda title: (title == "Gradient norms", not title.endswith("loss")))
    return {title: found[title] for title in order[:MOST_PANELS]}


def _fields(records: Iterable[Record]) -> dict[str, Curve]:
    fields: dict[str, Curve] = {}
    for record in records:
        step = record.number("step")
        for key, value in record.values.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key != "step" and number and math.isfinite(value):
                fields.setdefault(key, []).append((step, float(value)))
    return fields


def _panel(field: str) -> tuple[str, str]:
    words = field.replace("_", " ").replace(".", " ").strip()
    if field.startswith("elbo_"):
        return "Monitor: held-out ELBO loss", field.removeprefix("elbo_").replace("_", " ")
    if field.endswith("_grad_norm"):
        return "Gradient norms", field.removesuffix("_grad_norm").replace("_", " ")
    return words[:1].upper() + words[1:], words
