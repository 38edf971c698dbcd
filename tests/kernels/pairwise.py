"""Few cases that hold every pair of values of every two parameters, and the comparison of a kernel with its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import torch


def full_product(**values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, case, strict=True)) for case in product(*values.values())]


def pairwise(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """A covering array of strength 2: greedily, always the case with most pairs not seen yet. Deterministic."""
    names = list(values)
    missing = {((a, x), (b, y)) for a, b in combinations(names, 2) for x in values[a] for y in values[b]}
    cases = full_product(**values)
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & pairs_of(case)))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen


def pairs_of(case: Mapping[str, Any]) -> set[Any]:
    return set(combinations(case.items(), 2))


def case_name(case: Mapping[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in case.items())


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """|actual − expected| <= tolerance · (1 + |expected|) everywhere; infinities must agree, and nothing may be NaN."""
    assert actual.shape == expected.shape, name
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert not actual.isnan().any(), f"{name} has {int(actual.isnan().sum())} NaN of {actual.numel()}"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), f"{name}: infinities differ"
    error = ((actual - expected).abs() / (1 + expected.abs()))[~infinite]
    assert error.numel() == 0 or float(error.max()) <= tolerance, f"{name}: error {float(error.max()):.3g} > {tolerance:.3g}"
