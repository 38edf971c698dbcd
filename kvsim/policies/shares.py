"""Budgets that differ from head to head: classes of heads, and what each class keeps.

Which head keeps how much follows from the data. What can be said beforehand is a distribution: `head_shares` lists the
mean share of equally large classes of heads, and one level, common to all heads as a threshold on scores would be,
turns shares into tokens so that the total is met.
"""

from __future__ import annotations

from functools import lru_cache
from math import log
from typing import Annotated

from pydantic import AfterValidator

_NUDGE_TOKENS = 1e-6
"""Above any rounding error of a product, below any token."""


def exponential_shares(num_classes: int) -> tuple[float, ...]:
    """Mean of a unit exponential variable in each of its quantile classes, ascending; their mean is 1."""
    below = [1.0] + [q - q * log(q) for q in (1 - i / num_classes for i in range(1, num_classes))] + [0.0]
    return tuple(num_classes * (below[i] - below[i + 1]) for i in range(num_classes))


EXPONENTIAL_SHARES = exponential_shares(8)
"""An assumption, not a measurement: most heads are concentrated and a few are wide, the largest class at 3.1 times the
mean.
"""


def _normalise(shares: tuple[float, ...]) -> tuple[float, ...]:
    if not shares or min(shares) <= 0:
        raise ValueError(f"head_shares={shares} must hold at least one share, all > 0; try (0.5, 1.5)")
    mean = sum(shares) / len(shares)
    return tuple(share / mean for share in shares)


HeadShares = Annotated[tuple[float, ...], AfterValidator(_normalise)]
"""Relative budgets of equally large classes of heads, scaled to a mean of 1."""


def head_classes(shares: tuple[float, ...], num_pairs: int) -> tuple[tuple[int, float], ...]:
    """(pairs, share) of each class; shares have mean 1 over the pairs. Fewer pairs than classes: each pair averages
    some.
    """
    num_classes = len(shares)
    if num_pairs >= num_classes:
        edges = [i * num_pairs // num_classes for i in range(num_classes + 1)]
        sizes = [edges[i + 1] - edges[i] for i in range(num_classes)]
    else:
        shares, sizes = tuple(_slice_mean(shares, p, num_pairs) for p in range(num_pairs)), [1] * num_pairs
    mean = sum(size * share for size, share in zip(sizes, shares, strict=True)) / num_pairs
    return tuple((size, share / mean) for size, share in zip(sizes, shares, strict=True))


def _slice_mean(shares: tuple[float, ...], index: int, num_slices: int) -> float:
    """Mean of the step function `shares` over slice `index` of `num_slices` equal ones."""
    fine = [share for share in shares for _ in range(num_slices)]
    width = len(shares)
    return sum(fine[index * width : (index + 1) * width]) / width


def class_tokens(share: float, shares: tuple[float, ...], mean: int, floor: int, cap: int, unit: int = 1) -> int:
    """Tokens of each head of a class: `floor` plus its share of the rest, at most `cap`, in whole `unit`s below it.

    Over all classes the mean is `mean` less rounding, never more; what capped heads cannot take goes to the others.
    """
    if mean >= cap:
        return cap
    return _tokens(share, _level(shares, mean, floor, cap, unit), floor, cap, unit)


def _tokens(share: float, level: float, floor: int, cap: int, unit: int) -> int:
    wanted = floor + level * share + _NUDGE_TOKENS
    return cap if wanted >= cap else max(floor, int(wanted // unit) * unit)


@lru_cache(maxsize=65536)
def _level(shares: tuple[float, ...], mean: int, floor: int, cap: int, unit: int) -> float:
    """The highest level at which the classes together keep no more than the target, by bisection."""
    low, high = 0.0, (cap - floor) / min(shares) + unit
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(_tokens(share, middle, floor, cap, unit) for share in shares) <= mean * len(shares)
        low, high = (middle, high) if fits else (low, middle)
    return low
