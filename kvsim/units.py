"""Units: SI inside, friendly units at the edges. Convert once, here."""

from __future__ import annotations

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB = 2**10, 2**20, 2**30

PS_PER_S = 10**12
"""Simulated time is an integer number of picoseconds."""


def ps(seconds: float) -> int:
    """Seconds to whole picoseconds, rounded to nearest."""
    return round(seconds * PS_PER_S)


def seconds(picoseconds: int) -> float:
    """Whole picoseconds to seconds."""
    return picoseconds / PS_PER_S


def format_bytes(num_bytes: float) -> str:
    """Binary units as GPU memory is quoted: ``1.50 GiB``."""
    for size, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.2f} {name}"
    return f"{num_bytes:,.0f} B"


def format_seconds(value_s: float) -> str:
    """Three significant digits in the unit that fits: ``12.3 ms``."""
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value_s) >= size:
            return f"{value_s / size:.3g} {name}" if abs(value_s) / size < 1000 else f"{value_s / size:,.0f} {name}"
    return f"{value_s / 1e-9:.3g} ns"
