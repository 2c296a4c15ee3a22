"""How the report writes numbers, so that the terminal and the page say the same."""

from __future__ import annotations

import datetime
import math

from flcompress.stats import Interval


def count(value: float) -> str:
    """1234567 -> "1.23 M"."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}" if abs(value) < 999.5 * limit else f"{value / limit:.0f} {unit}"
    return f"{value:,.0f}"


def size(octets: float) -> str:
    """Bytes in decimal units: 15300000 -> "15.3 MB"."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if octets >= limit:
            return f"{octets / limit:.1f} {unit}"
    return f"{octets:.0f} B"


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


def number(value: float) -> str:
    """Three significant digits, without an exponent where that stays readable."""
    if value == 0:
        return "0"
    if 1e-5 <= abs(value) < 1:
        return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"
    if 1 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"
    return f"{value:.2e}"


def taken(seconds: float, attempts: int) -> str:
    """2700 in 3 attempts -> "45 min 00 s in 3 attempts"."""
    return duration(seconds) + (f" in {attempts} attempts" if attempts > 1 else "")


def bounds(limits: tuple[float | None, float | None]) -> str:
    """(0.5, 2.0) -> "0.500 to 2.00"; "" where there is no limit."""
    low, high = limits
    if low is not None and high is not None:
        return f"{number(low)} to {number(high)}"
    return f"at most {number(high)}" if high is not None else f"at least {number(low)}" if low is not None else ""


def spread(limits: tuple[float | None, float | None]) -> str:
    """(0.5, 2.0) -> " (0.500 to 2.00)", for behind a number; "" where there is none."""
    return f" ({bounds(limits)})" if limits != (None, None) else ""


def share(value: float) -> str:
    """0.7 -> "70.0 %"."""
    return f"{100 * value:.1f} %"


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
