"""Reports compared as people read them: the same words, and numbers that differ by no more than rounding."""

from __future__ import annotations

import re

NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?")
TOLERANCE = 0.01
"""Half a unit of the third digit, and some more for another machine's libm."""


def words(text: str) -> list[str]:
    """Without numbers, rules and spacing, which move with the width of a number."""
    return re.sub(r"─+", " ", NUMBER.sub("#", text)).split()


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


def difference(expected: str, found: str) -> str:
    """The first word or number that differs; "" where the texts say the same."""
    for mine, theirs in zip(words(expected), words(found), strict=False):
        if mine != theirs:
            return f"expected {mine!r}, found {theirs!r}"
    if len(words(expected)) != len(words(found)):
        return f"expected {len(words(expected))} words, found {len(words(found))}"
    for one, other in zip(numbers(expected), numbers(found), strict=True):
        if abs(one - other) > TOLERANCE * max(abs(one), abs(other)):
            return f"expected {one:g}, found {other:g}"
    return ""
