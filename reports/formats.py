"""Numbers as the reports print them; "-" where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvsim.units import GIB, KIB, MIB, format_bytes

SMALL_SHARE_FRAC = 0.0005


def number(value: float | None) -> str:
    """Three significant digits, or all digits before the point."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def percent(part: float | None, whole: float = 1.0) -> str:
    return "-" if part is None or not whole else f"{100 * part / whole:.1f}"


def share(share_frac: float) -> str:
    """In percent."""
    return "<0.1" if 0 < share_frac < SMALL_SHARE_FRAC else f"{100 * share_frac:.1f}"


def factor(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{value:.2f}x" if value < 100 else f"{value:,.0f}x"


def size(num_bytes: float) -> str:
    return format_bytes(num_bytes) if math.isfinite(num_bytes) else "-"


def size_unit(values_bytes: Iterable[float]) -> tuple[str, float]:
    """The unit in which the largest of the values reads best, and its size in bytes."""
    largest = max((value for value in values_bytes if math.isfinite(value)), default=1.0)
    units = (("GiB", float(GIB)), ("MiB", float(MIB)), ("KiB", float(KIB)))
    return next(((name, size) for name, size in units if largest >= size), ("B", 1.0))


def listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def time_unit(values_s: Iterable[float]) -> tuple[str, float]:
    """The unit in which the largest of the values reads best, and its size in seconds."""
    largest = max((value for value in values_s if math.isfinite(value)), default=1.0)
    return next(((name, size) for name, size in (("s", 1.0), ("ms", 1e-3)) if largest >= size), ("us", 1e-6))
