"""The curves, drawn with matplotlib as SVG that takes its colours and its font from the page it stands in."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from flcompress.core.records import Front
from flcompress.ir.block import Estimate
from flcompress.reporting.findings import BlockFate, Blocks
from flcompress.stats import Interval

Points = Sequence[tuple[float, float]]
Scores = Sequence[tuple[BlockFate, Estimate]]

# Stand-ins that the page's CSS variables replace, so that one drawing serves light and dark.
INK, MUTED, RULE = "#010203", "#040506", "#070809"
KEPT, GONE, SHADE, THIRD = "#0a0b0c", "#0d0e0f", "#101112", "#131415"
VARIABLES = {
    INK: "ink", MUTED: "muted", RULE: "rule", KEPT: "kept", GONE: "gone", SHADE: "shade", THIRD: "third"
}  # fmt: skip
LINES = (KEPT, GONE, THIRD, MUTED)

STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
}

LOG_SPREAD = 30.0
"""Positive values that spread over more than this factor are drawn on a logarithmic axis."""

DRAWN = 400
"""Points a curve is drawn with: more would only make the page heavy."""


def importance(blocks: Blocks, *, narrow: bool = False) -> str:
    """Importance over depth with two standard errors, first and last quarter shaded, as SVG; needs scores."""
    label = "ELBO lost without the block" if blocks.weighting == "elbo" else "importance"
    return _over_depth(blocks.scored, "importance", label, "Importance of each block over depth", narrow=narrow)


def attention(blocks: Blocks, *, narrow: bool = False) -> str:
    """Attention on other frames over depth, with what uniform attention would give, as SVG; needs a measurement."""
    label, title = "attention on other frames", "Attention of each block on other frames over depth"
    return _over_depth(blocks.attentive, "attention", label, title, narrow=narrow, line=blocks.uniform_attention)


def _over_depth(
    scored: Scores, name: str, label: str, description: str, *, narrow: bool, line: float | None = None
) -> str:
    """Scores over depth with two standard errors, first and last quarter shaded, as SVG; a dashed line at `line`."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        _quarters(axes, len(scored))
        for colour, fate_label, gone, fill in ((KEPT, "kept", False, KEPT), (GONE, "removed", True, "none")):
            picked = [(x, score) for x, (fate, score) in enumerate(scored) if (fate.fate != "kept") == gone]
            if picked:
                if gone and scored[picked[0][0]][0].fate == "chosen":
                    fate_label = "chosen for removal"
                axes.errorbar(
                    [x for x, _ in picked], [s.mean for _, s in picked], [2 * s.standard_error for _, s in picked],
                    fmt="o", color=colour, markerfacecolor=fill, markersize=_marker(len(scored)), capsize=2.5,
                    elinewidth=1.1, label=fate_label, linestyle="none",
                )  # fmt: skip
        if line is not None:
            axes.axhline(line, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label="uniform attention")
        _value_axis(axes, [score.mean for _, score in scored])
        _depth_axis(axes, scored, narrow)
        axes.set_ylabel(label)
        axes.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.12))

    return _svg(draw, (4.4, 3.2) if narrow else (9.4, 3.4), f"{name}-{narrow}", description)


def levels(blocks: Blocks, *, narrow: bool = False) -> str:
    """Importance per noise level, one small plot each, as SVG; "" if no block has levels."""
    scored = blocks.scored
    bands = [(low, high) for low, high, _, _ in scored[0][1].per_level] if scored else []
    if not bands or any(len(score.per_level) != len(bands) for _, score in scored):
        return ""
    columns = 2 if narrow else min(4, len(bands))
    rows = math.ceil(len(bands) / columns)

    def draw(figure: Any) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for index, axes in enumerate(grid.flat):
            if index >= len(bands):
                axes.set_visible(False)
                continue
            _quarters(axes, len(scored))
            for x, (fate, score) in enumerate(scored):
                _, _, mean, error = score.per_level[index]
                remains = fate.fate == "kept"
                axes.errorbar(
                    [x], [mean], [2 * error], fmt="o", color=KEPT if remains else GONE, elinewidth=0.9,
                    markerfacecolor=KEPT if remains else "none", markersize=0.75 * _marker(len(scored)),
                )  # fmt: skip
            _value_axis(axes, [score.per_level[index][2] for _, score in scored])
            _depth_axis(axes, scored, True, label=index >= len(bands) - columns)
            axes.set_title(f"noise level {bands[index][0]:.2f} to {bands[index][1]:.2f}")

    size = (4.4, 1.9 * rows + 0.3) if narrow else (9.4, 2.1 * rows + 0.3)
    return _svg(draw, size, f"levels-{narrow}", "Importance of each block over depth, one plot per noise level")


def intervals(panels: Sequence[tuple[str, Sequence[tuple[str, Interval]]]], name: str) -> str:
    """A panel for each figure with a bar for each model and its interval, as SVG; the first model is the teacher."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for plot, (label, rows) in zip(axes, panels, strict=True):
            for y, (_, value) in enumerate(rows):
                errors = [[value.mean - value.low], [value.high - value.mean]]
                plot.errorbar([value.mean], [y], xerr=errors, fmt="o", color=GONE if y else KEPT, capsize=2.5)
            plot.set_yticks(range(len(rows)), [_plain(model) for model, _ in rows] if plot is axes[0] else [])
            plot.set_ylim(len(rows) - 0.5, -0.5)
            plot.set_title(label)

    return _svg(draw, (9.4, 0.35 * len(panels[0][1]) + 0.9), name, "Figures of every model with intervals")


def curves(
    title: str, lines: Mapping[str, Points], name: str, bounds: tuple[float | None, float | None] = (None, None)
) -> str:
    """Curves over steps as SVG: raw points faint, a running mean over them; logarithmic where the values spread.

    Limits are dashed lines where the curves come near them, and stand in the title.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        smoothed: list[float] = []
        for index, (label, points) in enumerate(lines.items()):
            colour = LINES[index % len(LINES)]
            x, raw = [p[0] for p in _thin(points)], [p[1] for p in _thin(points)]
            mean = _running(points)
            smoothed += [p[1] for p in mean]
            few = len(points) < 20
            if not few:
                axes.plot(x, raw, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(
                [p[0] for p in mean], [p[1] for p in mean],
                color=colour, linewidth=1.6, marker="o" if few else None, markersize=3, label=_plain(label),
            )  # fmt: skip
        near = [bound for bound in bounds if bound is not None and smoothed and _near(bound, smoothed)]
        for bound in near:
            axes.axhline(bound, color=GONE, linewidth=1.1, linestyle=(0, (4, 3)))
        _value_axis(axes, [*smoothed, *near])
        axes.set_title(_plain(title) + _limits_text(bounds))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        if len(lines) > 1:
            axes.legend(loc="best")

    return _svg(draw, (4.9, 2.7), name, f"{title} over steps")


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A cell of a sweep: how many times less it costs than the teacher, and a figure."""

    name: str
    saved: float
    value: Interval
    front: Front


@dataclass(frozen=True, kw_only=True)
class Fronts:
    """A plot of quality against cost. `better` is -1 where a lower figure is better; `lines` are the teacher's."""

    title: str
    cost: str
    figure: str
    better: int
    points: Sequence[FrontPoint]
    lines: Sequence[tuple[str, float]]

    def best(self, points: Sequence[FrontPoint]) -> list[FrontPoint]:
        """Return the points that no other beats in both, from the dearest to the cheapest: Pareto's front."""
        front: list[FrontPoint] = []
        for point in sorted(points, key=lambda p: (p.saved, self.better * p.value.mean), reverse=True):
            if not front or self.better * (point.value.mean - front[-1].value.mean) > 0:
                front.append(point)
        return front[::-1]


def fronts(panel: Fronts) -> str:
    """Quality against cost as SVG, a front for each way to save work; points that nothing beats are filled."""
    marks = {"steps": (THIRD, "s", "fewer steps alone"), "size": (GONE, "^", "fewer blocks alone"),
             "joint": (KEPT, "o", "both")}  # fmt: skip
    best = panel.best(panel.points)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for kind, (colour, marker, label) in marks.items():
            points = [point for point in panel.points if point.front == kind]
            front = panel.best(points)
            axes.plot([p.saved for p in front], [p.value.mean for p in front], color=colour, linewidth=1.0, alpha=0.6)
            for point in points:
                axes.errorbar(
                    [point.saved], [point.value.mean],
                    [[point.value.mean - point.value.low], [point.value.high - point.value.mean]],
                    fmt=marker, color=colour, markerfacecolor=colour if point in best else "none", markersize=6,
                    elinewidth=0.9, capsize=2, label=label if point is points[0] else None,
                )  # fmt: skip
        for index, (label, value) in enumerate(panel.lines):
            axes.axhline(value, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)) if index else "-", label=label)
        axes.set_xscale("log")
        axes.set_xlabel(panel.cost)
        axes.set_ylabel(panel.figure)
        axes.set_title(_plain(panel.title))
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.legend(loc="best")

    return _svg(draw, (5.6, 3.6), f"fronts-{panel.title}", panel.title)


def _near(bound: float, values: Sequence[float]) -> bool:
    """Return whether a limit can be drawn without flattening the curves."""
    low, high = min(values), max(values)
    margin = 1.5 * (high - low) + 0.1 * abs(high)
    return low - margin <= bound <= high + margin


def _limits_text(bounds: tuple[float | None, float | None]) -> str:
    low, high = bounds
    if low is not None and high is not None:
        return f", limits {low:.3g} to {high:.3g}"
    return f", at most {high:.3g}" if high is not None else f", at least {low:.3g}" if low is not None else ""


def _quarters(axes: Any, blocks: int) -> None:
    """Shade the first and last quarter, whose mean the U-index sets against the middle half's."""
    quarter = blocks / 4
    for low, high in ((-0.5, quarter - 0.5), (blocks - quarter - 0.5, blocks - 0.5)):
        axes.axvspan(low, high, color=SHADE, linewidth=0, zorder=0)


def _value_axis(axes: Any, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) > LOG_SPREAD:
        axes.set_yscale("log", nonpositive="clip")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=False)


def _depth_axis(axes: Any, scored: Scores, narrow: bool, label: bool = True) -> None:
    every = max(1, math.ceil(len(scored) / (8 if narrow else 32)))
    ticks = range(0, len(scored), every)
    axes.set_xticks(list(ticks), [str(scored[x][0].block.index) for x in ticks])
    axes.set_xlim(-0.5, len(scored) - 0.5)
    stacks = [fate.block.stack for fate, _ in scored]
    for x in range(1, len(stacks)):
        if stacks[x] != stacks[x - 1]:
            axes.axvline(x - 0.5, color=MUTED, linewidth=0.8, linestyle="--")
    if label:
        axes.set_xlabel("block, in the order they run")


def _marker(blocks: int) -> float:
    return 6.0 if blocks <= 24 else 4.2


def _thin(points: Points) -> Points:
    every = math.ceil(len(points) / DRAWN)
    return points[:: max(1, every)]


def _running(points: Points) -> Points:
    """Centred running mean over a twenty-fifth of the curve."""
    half = len(points) // 50
    centres = range(0, len(points), max(1, math.ceil(len(points) / DRAWN)))
    return [
        (points[n][0], statistics.fmean(y for _, y in points[max(0, n - half) : n + half + 1])) for n in centres
    ]  # fmt: skip


def _svg(draw: Callable[[Any], None], size: tuple[float, float], name: str, description: str) -> str:
    # The salt keeps the ids of one drawing apart from another's on the same page, and equal from run to run.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size)
        draw(figure)
        buffer = io.StringIO()
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    # The size in points gives way to the page's width; only the proportions stay.
    box = re.search(r'viewBox="([^"]*)"', text)
    opening = f'<svg viewBox="{box.group(1) if box else ""}" role="img" aria-label="{escape(description)}">'
    return opening + text[text.index(">") + 1 :]


def _plain(text: str) -> str:
    """Keep matplotlib from reading a logged name as mathematics."""
    return text.replace("$", r"\$")
