"""Integer cost curves: piecewise straight, values and slopes rounded once, so that sums over runs are exact."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from kvsim.units import PS_PER_S

_BEYOND = 1 << 62


class Curve:
    """Picoseconds as a function of whole scalar units: in cell i, ``ys[i] + ms[i] * (x - xs[i])``.

    Slopes are rounded down, so the curve never falls where its points do not. Beyond the last knot the last cell goes on.
    `parts` are the same curve split by Op label and source; their values and slopes add up to the whole exactly.
    While a simulation runs, `count` and `offset` add up the evaluations in each cell, from which `times` gets time by part.
    """

    __slots__ = ("count", "knots", "ms", "offset", "parts", "xs", "ys")

    def __init__(self, knots: Sequence[int], seconds: Mapping[Any, Sequence[float]], hold: bool = True) -> None:
        """knots: ascending, from 0. seconds: for each part, its values at the knots; where they fall (noise) they are held.

        hold: False where a part may fall although the whole does not, as a wait does that compute comes to cover.
        """
        self.knots = knots
        self.xs: list[int] = [*knots[:-1], _BEYOND]
        self.parts: dict[Any, tuple[list[int], list[int]]] = {}
        for label, values in seconds.items():
            highest, ys = 0, []
            for value in values:
                highest = max(highest if hold else 0, round(value * PS_PER_S))
                ys.append(highest)
            ms = [(ys[i + 1] - ys[i]) // (knots[i + 1] - knots[i]) for i in range(len(knots) - 1)]
            self.parts[label] = (ys[:-1], ms)
        cells = range(len(knots) - 1)
        if len(self.parts) == 1:
            ((self.ys, self.ms),) = self.parts.values()
        else:
            self.ys = [sum(ys[i] for ys, _ in self.parts.values()) for i in cells]
            self.ms = [sum(ms[i] for _, ms in self.parts.values()) for i in cells]
        self.count = [0] * len(cells)
        self.offset = [0] * len(cells)

    def plus(self, other: Curve) -> Curve:
        """The sum of two curves over the same knots, with an account of its own."""
        assert self.knots == other.knots and not self.parts.keys() & other.parts.keys()
        total = Curve(self.knots, {})
        total.parts = {**self.parts, **other.parts}
        total.ys = [a + b for a, b in zip(self.ys, other.ys, strict=True)]
        total.ms = [a + b for a, b in zip(self.ms, other.ms, strict=True)]
        return total

    def twin(self) -> Curve:
        """The same curve with an account of its own."""
        new = copy(self)
        new.count, new.offset = [0] * len(self.count), [0] * len(self.count)
        return new

    def __call__(self, x: int) -> int:
        """Picoseconds at x units."""
        i = bisect_right(self.xs, x) - 1
        return self.ys[i] + self.ms[i] * (x - self.xs[i])

    def charge(self, x: int, times: int = 1) -> int:
        """Picoseconds at x, entered into the account `times` times."""
        i = bisect_right(self.xs, x) - 1
        step = x - self.xs[i]
        self.count[i] += times
        self.offset[i] += times * step
        return self.ys[i] + self.ms[i] * step

    def times(self) -> dict[Any, int]:
        """Picoseconds by part of all evaluations in the account."""
        return {
            label: sum(y * n + m * offset for y, m, n, offset in zip(ys, ms, self.count, self.offset, strict=True))
            for label, (ys, ms) in self.parts.items()
        }


def steps_to_reach(target_ps: int, first_ps: int, growth_ps: int, max_steps: int) -> int:
    """The least n in 1..max_steps with ``n*first + growth*n*(n-1)/2 >= target``; max_steps where none does.

    This is the step at whose end an arrival `target_ps` ahead is noticed. Every step must take some time.
    """
    if target_ps <= first_ps or max_steps == 1:
        return 1
    if growth_ps == 0:
        n = -(-target_ps // first_ps)
        return n if n < max_steps else max_steps
    half = first_ps - growth_ps / 2
    under = half * half + 2.0 * growth_ps * target_ps
    if under < 0:  # steps get shorter and never add up to the target
        return max_steps
    n = int((under**0.5 - half) / growth_ps)
    n = min(max(n, 1), max_steps)
    # The square root is a guess in floating point; whole numbers decide.
    while n < max_steps and n * first_ps + growth_ps * (n * (n - 1) // 2) < target_ps:
        n += 1
    while n > 1 and (n - 1) * first_ps + growth_ps * ((n - 1) * (n - 2) // 2) >= target_ps:
        n -= 1
    return n
