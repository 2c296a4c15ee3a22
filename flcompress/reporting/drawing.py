"""The block graph as SVG: blocks in rows along the flow of data, removed ones dropped off the line."""

from __future__ import annotations

import math
from html import escape

from flcompress import wording
from flcompress.ir.graph import INPUT, OUTPUT
from flcompress.reporting.findings import BlockFate, Blocks
from flcompress.reporting.plots import LOG_SPREAD

PITCH, BOX = 62.0, 42.0
"""Distance of two blocks in a row, and the side of the largest block's box, in SVG units."""

ROW, DROP = 82.0, 46.0
"""Height of a row, and how far a removed block is below the line that data now takes (the row grows by it)."""

MARGIN = 28.0


def block_graph(blocks: Blocks, *, columns: int) -> str:
    """Draw the original model's blocks and the edges that data flows along now.

    A box's height is its share of the parameters (the largest fills the box), its shade its importance. Rows hold at
    most `columns` blocks and are as equal as they can be; data runs from left to right and row to row.
    """
    layout = _Layout(blocks, columns)
    largest = max(fate.share for fate in blocks.fates) or 1.0
    shades = _shades(blocks)
    parts = [
        f'<svg class="graph" viewBox="0 0 {layout.width:g} {layout.height:g}" role="img" '
        f'style="max-width: {1.3 * layout.width:.0f}px" '
        f'aria-label="Block graph: {len(blocks.fates)} blocks, {len(blocks.gone)} removed">'
    ]
    parts += [_edge(source, target, layout) for source, target in blocks.edges]
    parts += [_box(fate, *layout.at(fate.block.path), largest, shades) for fate in blocks.fates]
    parts += [_end("in", *layout.at(INPUT)), _end("out", *layout.at(OUTPUT)), "</svg>"]
    return "".join(parts)


class _Layout:
    """The position of every node of the graph."""

    def __init__(self, blocks: Blocks, columns: int) -> None:
        self.fates = blocks.fates
        rows = math.ceil(len(self.fates) / columns)
        across = math.ceil(len(self.fates) / rows)
        self.order = {fate.block.path: n for n, fate in enumerate(self.fates)} | {INPUT: -1, OUTPUT: len(self.fates)}
        self.right = MARGIN + across * PITCH
        self.width, self.height = self.right + MARGIN, 0.0
        self._positions: dict[str, tuple[float, float]] = {}
        for start in range(0, len(self.fates), across):
            row = self.fates[start : start + across]
            line = self.height + BOX
            for column, fate in enumerate(row):
                self._positions[fate.block.path] = (MARGIN + (column + 0.5) * PITCH, line)
            self._positions.setdefault(INPUT, (12.0, line))
            self._positions[OUTPUT] = (MARGIN + len(row) * PITCH + 14, line)
            self.height += ROW + (DROP if any(fate.fate == "removed" for fate in row) else 0.0)

    def at(self, node: str) -> tuple[float, float]:
        return self._positions[node]


def _edge(source: str, target: str, layout: _Layout) -> str:
    begin, end = layout.order[source], layout.order[target]
    (x1, y1), (x2, y2) = layout.at(source), layout.at(target)
    # Kept blocks in between mean that this edge goes past them: it is drawn as an arc, not along the line.
    passed = any(fate.fate != "removed" for fate in layout.fates[begin + 1 : end])
    if passed and source == INPUT:
        return ""  # conditioning that every block is given would only cover the picture
    if y1 == y2 and passed:
        lift = y1 - min(34.0, 20 + abs(x2 - x1) / 40)
        path = f"M{x1:g} {y1:g}C{x1:g} {lift:g} {x2:g} {lift:g} {x2:g} {y2:g}"
    elif y1 == y2:
        path = f"M{x1:g} {y1:g}H{x2:g}"
    else:
        path = f"M{x1:g} {y1:g}H{layout.right + 10:g}V{y2 - 40:g}H{MARGIN / 2:g}V{y2:g}H{x2:g}"
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


def _shades(blocks: Blocks) -> dict[str, float]:
    """Path -> 0 (least important) to 1, linear or, where the values spread far, logarithmic."""
    values = {fate.block.path: score.mean for fate, score in blocks.scored}
    if not values:
        return {}
    if min(values.values()) > 0 and max(values.values()) / min(values.values()) > LOG_SPREAD:
        values = {path: math.log(value) for path, value in values.items()}
    low, high = min(values.values()), max(values.values())
    return {path: (value - low) / (high - low) if high > low else 0.5 for path, value in values.items()}
