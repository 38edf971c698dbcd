"""Token counts over decode steps as straight pieces, and the arithmetic to compose them.

A `Ramp` says: for the next `steps` steps the count is ``value, value + slope, value + 2*slope, ...``. Policies state their
counts as ramps, composition adds and clips them, and the breakpoints of the result follow by themselves.
"""

from __future__ import annotations

from typing import NamedTuple

FOREVER = 1 << 60
"""Steps of a ramp that never ends: longer than any output."""


class Ramp(NamedTuple):
    """`value + slope * j` at step j for 0 <= j < steps."""

    value: int
    slope: int = 0
    steps: int = FOREVER

    def plus(self, other: Ramp) -> Ramp:
        return Ramp(self.value + other.value, self.slope + other.slope, min(self.steps, other.steps))

    def minus(self, other: Ramp) -> Ramp:
        return Ramp(self.value - other.value, self.slope - other.slope, min(self.steps, other.steps))

    def at_most(self, other: Ramp) -> Ramp:
        """The smaller of the two; the piece ends where they cross.

        Where they start alike the steeper one counts for one step: it says how the value was come to, and blocks are taken by it.
        """
        steps = min(self.steps, other.steps)
        low, high = sorted((self, other), key=lambda ramp: (ramp.value, -ramp.slope))
        closing = low.slope - high.slope
        if closing > 0:
            steps = min(steps, (high.value - low.value) // closing + 1)
        return Ramp(low.value, low.slope, steps)


ZERO = Ramp(0)
ALL = Ramp(FOREVER)
"""More tokens than any cache holds: clipped to what is resident."""
