"""The pass over all metrics of the pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pairwise import assert_close

from kvsim.kernels.metric_pool import TOLERANCE, Shape, bytes_moved, make_inputs, reference, run


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("num_slots", [0, 1, 17, 1023, 3000])
def test_squares_are_added_and_probabilities_cleared(num_slots: int, group: int, device: str) -> None:
    inputs = make_inputs(Shape(num_slots, group), np.random.default_rng(num_slots + group), device)
    expected_metrics, expected_probabilities = reference(**inputs)
    metrics, probabilities = run(**inputs)
    assert metrics is inputs["metrics"]
    assert_close(metrics, expected_metrics, TOLERANCE[torch.float32], "metrics")
    assert torch.equal(probabilities.double(), expected_probabilities)


def test_fewer_bytes_than_the_four_library_calls() -> None:
    """(16r + 8) B a slot in the reference engine (policies.md); the fused pass neither rereads nor writes squares."""
    for group in (1, 4, 8):
        assert bytes_moved(Shape(1000, group)) == 1000 * (8 * group + 8) < 1000 * (16 * group + 8)


@pytest.mark.parametrize(
    ("name", "probabilities", "metrics"),
    [
        ("probabilities", torch.zeros(4, 2).half(), torch.zeros(4)), ("probabilities", torch.zeros(4, 17), torch.zeros(4)),
        ("probabilities", torch.zeros(2, 4).T, torch.zeros(4)), ("metrics", torch.zeros(4, 2), torch.zeros(5)),
    ],
)  # fmt: skip
def test_bad_input_is_named(name: str, probabilities: torch.Tensor, metrics: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        run(probabilities, metrics)
