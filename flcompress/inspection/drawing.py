"""The picture of an inspection: every block as a box along the flow of data, and what it holds."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from flcompress import wording
from flcompress.errors import RequestError
from flcompress.files import replacing
from flcompress.inspection.model import Inspection
from flcompress.ir.graph import INPUT, OUTPUT

FORMATS = (".svg", ".png", ".pdf")
COLUMNS = 20
"""Blocks in a row."""

COLOURS = ("#3b6fb6", "#c77b30", "#4c9a6a", "#8a5aa8", "#b5495b", "#6b7280")
"""One a stack; the last for all further ones."""

STYLE = {"svg.fonttype": "none", "font.size": 8, "figure.constrained_layout.use": True}


def check_picture(path: Path) -> None:
    """Raise RequestError, before any work, for a file that cannot be drawn."""
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"--out: {path} given, expected a file that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise RequestError(f"--out: {path.parent}: no such folder; make it first")


def draw_inspection(inspection: Inspection, path: Path) -> None:
    """Draw the block graph (rows of boxes, height by share of the parameters), and the shares of each stack."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = math.ceil(len(inspection.graph.blocks) / COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 1.5 + 1.1 * rows + 0.34 * (len(inspection.graph.stacks) + 2)))
        above, below = figure.subplots(2, 1, height_ratios=[1.1 * rows, 0.34 * (len(inspection.graph.stacks) + 2)])
        _blocks(above, inspection)
        _stacks(below, inspection)
        figure.suptitle(_title(inspection), fontsize=9)
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150, metadata={})


def _title(inspection: Inspection) -> str:
    graph = inspection.graph
    title = f"{graph.model_class}: {len(graph.blocks)} blocks, {graph.parameters:,} parameters"
    if inspection.clip is not None and not inspection.unknown_flops:
        clip = f"{inspection.clip.height} x {inspection.clip.width} x {inspection.clip.frames}"
        title += f", {graph.flops / 1e12:,.1f} TFLOPs a forward at {clip}"
    return title


def _blocks(axes: Any, inspection: Inspection) -> None:
    from matplotlib.patches import Rectangle

    graph = inspection.graph
    largest = max(block.parameters for block in graph.blocks)
    positions: dict[str, tuple[float, float]] = {INPUT: (-1.0, 0.0)}
    gone = [set(removal.removed) for removal in inspection.removals]
    for number, block in enumerate(graph.blocks):
        row, column = divmod(number, COLUMNS)
        positions[block.path] = (float(column), -1.3 * row)
    last = positions[graph.blocks[-1].path]
    positions[OUTPUT] = (last[0] + 1.0, last[1])
    flows = graph.flows or _in_order(inspection)
    order = {path: number for number, path in enumerate(positions)}
    for source, target in flows:
        (x1, y1), (x2, y2) = positions[source], positions[target]
        if source == INPUT and order[target] > 1:
            continue  # what every block is given would only cover the picture
        if y1 == y2 and x2 - x1 <= 1.0:
            axes.plot([x1, x2], [y1, y2], color="#9aa0a8", lw=0.9, zorder=0)
        elif y1 != y2 and order[target] == order[source] + 1:
            right, between = COLUMNS - 0.4, y1 - 0.65
            axes.plot(
                [x1, right, right, -0.6, -0.6, x2],
                [y1, y1, between, between, y2, y2],
                color="#9aa0a8",
                lw=0.9,
                zorder=0,
            )
        else:
            bend = "arc3,rad=-0.35" if y1 == y2 else "arc3,rad=0.1"
            arrow = {"arrowstyle": "-", "color": "#c3c7cd", "lw": 0.6, "connectionstyle": bend}
            axes.annotate("", (x2, y2), (x1, y1), arrowprops=arrow, zorder=0)
    for block in graph.blocks:
        x, y = positions[block.path]
        tall = max(0.08, 0.72 * block.parameters / largest)
        colour = _colour(inspection, block.stack)
        often = sum(block.path in removed for removed in gone)
        axes.add_patch(
            Rectangle(
                (x - 0.36, y - tall / 2), 0.72, tall, facecolor=colour, edgecolor=colour,
                alpha=(1.0, 0.55, 0.25)[min(often, 2)], linestyle="--" if often else "-", zorder=2,
            )
        )  # fmt: skip
        axes.text(x, y - tall / 2 - 0.04, str(block.index), ha="center", va="top", fontsize=6.5, color="#4b5058")
    for node, text in ((INPUT, "in"), (OUTPUT, "out")):
        axes.text(*positions[node], text, ha="center", va="center", fontsize=7.5, bbox={"fc": "white", "ec": "#9aa0a8"})
    axes.set_xlim(-1.5, COLUMNS + 0.2)
    axes.set_ylim(last[1] - 0.75, 0.6)
    axes.axis("off")


def _in_order(inspection: Inspection) -> list[tuple[str, str]]:
    """The lists' own order, where nothing was traced."""
    paths = [block.path for block in inspection.graph.blocks]
    return list(itertools.pairwise(paths))


def _stacks(axes: Any, inspection: Inspection) -> None:
    graph = inspection.graph
    names = [*graph.stacks, "outside blocks"]
    for row, name in enumerate(names):
        blocks = graph.stacks.get(name, ())
        parameters = sum(block.parameters for block in blocks)
        flops = sum(block.flops for block in blocks)
        if not blocks:
            parameters = graph.parameters - sum(block.parameters for block in graph.blocks)
            flops = graph.flops - sum(block.flops for block in graph.blocks)
        colour = _colour(inspection, name)
        axes.barh(row - 0.2, parameters / graph.parameters, 0.36, color=colour)
        text = f" {wording.share(parameters / graph.parameters)} of the parameters"
        axes.text(parameters / graph.parameters, row - 0.2, text, va="center", fontsize=7)
        if not inspection.unknown_flops:
            axes.barh(row + 0.2, flops / graph.flops, 0.36, color=colour, alpha=0.5)
            axes.text(
                flops / graph.flops,
                row + 0.2,
                f" {wording.share(flops / graph.flops)} of the FLOPs",
                va="center",
                fontsize=7,
            )
    lefts = [removal for removal in inspection.removals if not removal.problem]
    summary = "; ".join(
        f"{wording.share(removal.share, 0)} removed: {removal.blocks} blocks, {removal.parameters:,} parameters"
        for removal in lefts
    )
    if summary:
        axes.set_xlabel(f"{summary} (pale boxes: the middle blocks, by parameters; no importance scores)")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _colour(inspection: Inspection, stack: str) -> str:
    names = list(inspection.graph.stacks)
    return COLOURS[min(names.index(stack), len(COLOURS) - 1)] if stack in names else COLOURS[-1]
