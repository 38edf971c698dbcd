"""What timing a point gives, and who can do it: torch (`timer.py`), or a law in tests. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from kvsim.calibrate.device.points import Point


class Skipped(Exception):
    """A point that is left out for a reason that is no failure: memory would not hold it, or it cannot be told apart."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20 % and 80 %, of so many samples. cold: inputs took turns beyond the cache."""

    seconds: float
    p20_s: float
    p80_s: float
    samples: int
    mode: str
    cold: bool = True
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def spread_frac(self) -> float:
        return (self.p80_s - self.p20_s) / self.seconds


class Timer(Protocol):
    """A device that can be timed."""

    def identity(self) -> dict[str, Any]:
        """Name, type and what else must agree before rows are continued."""
        ...

    def notes(self) -> dict[str, Any]:
        """Facts and ceilings, measured now: "facts", "peak_flops_per_s" by dtype, "copy_bytes_per_s", "host_copy_bytes_per_s"."""
        ...

    def time(self, point: Point) -> Timing:
        """Raises Skipped with a reason, or what torch raises."""
        ...

    def probe_s(self) -> float:
        """Seconds of a fixed product: by it a device is seen to slow down."""
        ...
