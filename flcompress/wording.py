"""The format of numbers and tables, shared by the plan, the report's page and the terminal."""

from __future__ import annotations

import datetime
import io
import math
from collections.abc import Sequence

from flcompress.stats import Interval


def _scale(value: float, prefixes: str) -> str:
    """Three significant digits and the prefix of the power of 1000: 1234567 -> "1.23 M"."""
    if abs(value) < 999.5:
        return f"{value:.0f}"
    power = 1
    while abs(value) >= 999.5 * 1000.0**power and power < len(prefixes):
        power += 1
    scaled = value / 1000.0**power
    return f"{scaled:.3g} {prefixes[power - 1]}" if abs(scaled) < 999.5 else f"{scaled:,.0f} {prefixes[power - 1]}"


def count(value: float) -> str:
    """Parameters and other counts: 14300000000 -> "14.3 B"."""
    return _scale(value, "kMBT")


def flops(value: float) -> str:
    """FLOPs, with SI prefixes: 14300000000 -> "14.3 G"."""
    return _scale(value, "kMGTPE")


def size(octets: float) -> str:
    """Bytes in decimal units: 15300000 -> "15.3 MB"."""
    text = _scale(octets, "kMGT")
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def newer_format(written: int, known: int) -> str:
    """Return what is wrong with a file of a later format than this version reads."""
    return f"written by a newer flcompress: format {written}, this one reads up to {known}; update flcompress"


def number(value: float) -> str:
    """Three significant digits, without an exponent where that stays readable."""
    if value == 0:
        return "0"
    if 1e-5 <= abs(value) < 1:
        return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"
    if 1 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"
    return f"{value:.2e}"


def elapsed(seconds: float, attempts: int) -> str:
    """2700 in 3 attempts -> "45 min 00 s in 3 attempts"."""
    return duration(seconds) + (f" in {attempts} attempts" if attempts > 1 else "")


def bounds(limits: tuple[float | None, float | None]) -> str:
    """(0.5, 2.0) -> "0.500 to 2.00"; "" where there is no limit."""
    low, high = limits
    if low is not None and high is not None:
        return f"{number(low)} to {number(high)}"
    return f"at most {number(high)}" if high is not None else f"at least {number(low)}" if low is not None else ""


def in_brackets(limits: tuple[float | None, float | None]) -> str:
    """(0.5, 2.0) -> " (0.500 to 2.00)", for behind a number; "" where there is none."""
    return f" ({bounds(limits)})" if limits != (None, None) else ""


def share(value: float, decimals: int = 1) -> str:
    """0.7 -> "70.0 %"."""
    return f"{100 * value:.{decimals}f} %"


def ratio(value: float) -> str:
    """35.714 -> "35.71x"."""
    return f"{value:.2f}x"


def around(value: Interval) -> str:
    """Mean and half the width of its interval, or the bare number."""
    if not value.measured:
        return number(value.mean)
    return f"{number(value.mean)} ± {number((value.high - value.low) / 2)}"


def moment(value: object) -> str:
    """A journal's time, given as text or as seconds since 1970 (UTC)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return str(value) if value is not None else ""


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return the lines of a plain table, the first row its head.

    Args:
        rows: the cells.
        left: number of columns that are aligned to the left; the others are to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plain = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(len(rows[0])):
        plain.add_column(justify="left" if column < left else "right", no_wrap=True)
    for row in rows:
        plain.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=10_000, color_system=None)  # as wide as its cells, on any terminal
    with console.capture() as printed:
        console.print(plain)
    return [line.rstrip() for line in printed.get().splitlines()]
