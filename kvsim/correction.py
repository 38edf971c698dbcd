"""What measurements say beyond the physics: log(measured / physics) as a sum of piecewise linear tables.

One table over (m, n, k), say, or the sum of two over overlapping axes, which needs fewer numbers than one over all of them and
carries better to combinations that nobody measured. Beyond its first and last knot a table stays as it is there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import log2

PERMILLE = 1e-3


class Term:
    """A table over some axes, multilinear between its knots.

    where: which coordinates of a place it depends on. knots: ascending log2 along each of them, one or more.
    values: log ratios, the last axis fastest.
    """

    __slots__ = ("knots", "strides", "values", "where")

    def __init__(self, where: Sequence[int], knots: Sequence[Sequence[float]], values: Sequence[float]) -> None:
        self.where, self.knots, self.values = tuple(where), [list(axis) for axis in knots], list(values)
        strides, size = [], 1
        for axis in reversed(self.knots):
            strides.append(size)
            size *= len(axis)
        assert len(self.values) == size, (len(self.values), size)
        self.strides = strides[::-1]

    def at(self, place: Sequence[float]) -> float:
        """The log ratio at a place."""
        values, total = self.values, 0.0
        for offset, weight in self._corners(place):
            total += values[offset] * weight
        return total

    def along(self, axis: int, place: Sequence[float]) -> tuple[list[float], list[float]]:
        """(knots, log ratios) along one coordinate, the others held at the place; one knot where it does not matter."""
        if axis not in self.where:
            return [0.0], [self.at(place)]
        free = self.where.index(axis)
        knots, stride, values = self.knots[free], self.strides[free], self.values
        found = [0.0] * len(knots)
        for offset, weight in self._corners(place, free):
            for i in range(len(knots)):
                found[i] += values[offset + i * stride] * weight
        return knots, found

    def _corners(self, place: Sequence[float], free: int = -1) -> list[tuple[int, float]]:
        """(offset, weight) of the values around a place; the axis `free` is left at its first knot."""
        corners = [(0, 1.0)]
        for i, which in enumerate(self.where):
            if i == free:
                continue
            stride = self.strides[i]
            cell, share = cell_of(self.knots[i], place[which])
            offset = cell * stride
            if share:
                rest, beyond = 1.0 - share, offset + stride
                corners = [(first + offset, weight * rest) for first, weight in corners] + [
                    (first + beyond, weight * share) for first, weight in corners
                ]
            elif offset:
                corners = [(first + offset, weight) for first, weight in corners]
        return corners

    def covers(self, place: Sequence[float]) -> bool:
        """Whether a place lies between first and last knots, and not beside them."""
        return all(
            knots[0] - 1e-6 <= place[which] <= knots[-1] + 1e-6
            for which, knots in zip(self.where, self.knots, strict=True)
        )


def cell_of(knots: Sequence[float], x: float) -> tuple[int, float]:
    """(first knot, share of the second) for x between two knots; clamped outside."""
    cell = bisect_right(knots, x) - 1
    if cell < 0:
        return 0, 0.0
    if cell >= len(knots) - 1:
        return len(knots) - 1, 0.0
    return cell, (x - knots[cell]) / (knots[cell + 1] - knots[cell])


class Correction:
    """The sum of some terms.

    shift: added to the coordinates before tables are read: a GPU with half the multiprocessors does half as much side by side.
    """

    __slots__ = ("shift", "terms")

    def __init__(self, terms: Sequence[Term], shift: Sequence[float] | None = None) -> None:
        self.terms, self.shift = tuple(terms), shift

    def shifted(self, place: Sequence[float]) -> Sequence[float]:
        return place if self.shift is None else [x + by for x, by in zip(place, self.shift, strict=True)]

    def at(self, place: Sequence[float]) -> float:
        """log(measured / physics) at a place."""
        place = self.shifted(place)
        total = 0.0
        for term in self.terms:
            total += term.at(place)
        return total

    def along(self, axis: int, place: Sequence[float], values: Sequence[float]) -> list[float]:
        """log ratios where the coordinate `axis` takes each of these values (not logarithms) in turn."""
        place = self.shifted(place)
        by = 0.0 if self.shift is None else self.shift[axis]
        lines = [term.along(axis, place) for term in self.terms]
        if all(len(knots) == 1 for knots, _ in lines):
            return [sum(ratios[0] for _, ratios in lines)] * len(values)
        found = []
        for value in values:
            x, total = log2(value) + by, 0.0
            for knots, ratios in lines:
                cell, share = cell_of(knots, x)
                total += ratios[cell] if share <= 0.0 else ratios[cell] + share * (ratios[cell + 1] - ratios[cell])
            found.append(total)
        return found

    def covers(self, place: Sequence[float]) -> bool:
        """Whether the place lies inside what was measured."""
        place = self.shifted(place)
        return all(term.covers(place) for term in self.terms)
