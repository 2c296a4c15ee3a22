"""The block graph as SVG: blocks in rows along the flow of data, removed ones dropped off the line."""

from __future__ import annotations

import math
from html import escape

from flcompress.report import wording
from flcompress.report.findings import BlockFate, Blocks
from flcompress.report.plots import LOG_SPREAD

PITCH, ROW, BOX = 62.0, 128.0, 42.0
"""Distance of two blocks in a row, of two rows, and the side of the largest block's box, in SVG units."""

DROP = 46.0
"""How far a removed block lies below the line that data now takes."""


def block_graph(found: Blocks, *, columns: int) -> str:
    """Draw the original model's blocks and the edges that data flows along now.

    A box's height is its share of the parameters (the largest fills the box), its shade its importance. Rows hold at
    most `columns` blocks and are as equal as they can be; data runs from left to right and row to row.
    """
    rows = math.ceil(len(found.fates) / columns)
    across = math.ceil(len(found.fates) / rows)
    places = {fate.block.path: (n % across, n // across) for n, fate in enumerate(found.fates)}
    largest = max(fate.share for fate in found.fates) or 1.0
    shades = _shades(found)
    width, height = across * PITCH + 56, rows * ROW
    parts = [
        f'<svg class="graph" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="Block graph: {len(found.fates)} blocks, {len(found.gone)} removed">'
    ]
    parts += [_edge(source, target, found, places, across, rows) for source, target in found.edges]
    parts += [_box(fate, *_centre(places[fate.block.path]), largest, shades) for fate in found.fates]
    parts.append(_end("in", *_in(places, rows)))
    parts.append(_end("out", *_out(found, across, rows)))
    parts.append("</svg>")
    return "".join(parts)


def _centre(place: tuple[int, int]) -> tuple[float, float]:
    column, row = place
    return 28 + (column + 0.5) * PITCH, row * ROW + 42


def _in(places: dict[str, tuple[int, int]], rows: int) -> tuple[float, float]:
    return 12.0, _centre((0, 0))[1]


def _out(found: Blocks, across: int, rows: int) -> tuple[float, float]:
    last = (len(found.fates) - 1) % across
    return _centre((last, rows - 1))[0] + PITCH / 2 + 14, _centre((0, rows - 1))[1]


def _edge(source: str, target: str, found: Blocks, places: dict[str, tuple[int, int]], across: int, rows: int) -> str:
    order = {fate.block.path: n for n, fate in enumerate(found.fates)}
    begin, end = order.get(source, -1), order.get(target, len(found.fates))
    x1, y1 = _centre(places[source]) if source in places else _in(places, rows)
    x2, y2 = _centre(places[target]) if target in places else _out(found, across, rows)
    # Kept blocks in between mean that this edge goes past them: it is drawn as an arc, not along the line.
    passed = any(fate.fate != "removed" for fate in found.fates[begin + 1 : end])
    if passed and begin == -1:
        return ""  # conditioning that every block is given would only cover the picture
    if y1 == y2:
        lift = min(34.0, 20 + abs(x2 - x1) / 40) if passed else 0.0
        path = f"M{x1:g} {y1:g} C{x1:g} {y1 - lift:g} {x2:g} {y2 - lift:g} {x2:g} {y2:g}" if passed else (
            f"M{x1:g} {y1:g}H{x2:g}"
        )  # fmt: skip
    else:
        right, left = 28 + across * PITCH + 10, 14.0
        between = y1 + ROW - 44 if y2 > y1 else y1 - 44
        path = f"M{x1:g} {y1:g}H{right:g}V{between:g}H{left:g}V{y2:g}H{x2:g}"
    return f'<path class="{"skip" if passed else "edge"}" d="{path}"/>'


def _box(fate: BlockFate, x: float, y: float, largest: float, shades: dict[str, float]) -> str:
    path = fate.block.path
    tall = max(6.0, BOX * fate.share / largest)
    if fate.fate == "removed":
        y += DROP
        tall *= 0.62
    shade = shades.get(path)
    fill = f'style="fill-opacity:{0.1 + 0.9 * shade:.2f}"' if shade is not None else 'style="fill-opacity:0.25"'
    lines = [f"{path}: {wording.count(fate.block.parameters)} parameters, {wording.share(fate.share)} of the blocks'"]
    if fate.score is not None:
        lines.append(f"importance {wording.number(fate.score.mean)} ± {wording.number(fate.score.standard_error)}")
    lines.append(fate.fate + (f": {fate.reason}" if fate.reason else ""))
    label = y - tall / 2 - 6 if fate.fate != "removed" else y + tall / 2 + 13
    shape = f'x="{x - BOX / 2:g}" y="{y - tall / 2:g}" width="{BOX:g}" height="{tall:g}" rx="5"'
    return (
        f'<g class="block {fate.fate}"><title>{escape("; ".join(lines))}</title>'
        f'<rect class="back" {shape}/><rect class="face" {shape} {fill}/>'
        f'<text x="{x:g}" y="{label:g}">{fate.block.index}</text></g>'
    )


def _end(text: str, x: float, y: float) -> str:
    return f'<g class="end"><circle cx="{x:g}" cy="{y:g}" r="4"/><text x="{x:g}" y="{y - 10:g}">{text}</text></g>'


def _shades(found: Blocks) -> dict[str, float]:
    """Path -> 0 (least important) to 1, linear or, where the values spread far, logarithmic."""
    values = {fate.block.path: score.mean for fate, score in found.scored}
    if not values:
        return {}
    if min(values.values()) > 0 and max(values.values()) / min(values.values()) > LOG_SPREAD:
        values = {path: math.log(value) for path, value in values.items()}
    low, high = min(values.values()), max(values.values())
    return {path: (value - low) / (high - low) if high > low else 0.5 for path, value in values.items()}
