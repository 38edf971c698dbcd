"""Scores of key channels against the paper's Frobenius norms."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
import torch
from pairwise import assert_close, case_name, full_product, pairwise

from kvsim.kernels.layouts import LAYOUTS
from kvsim.kernels.think_scores import REDUCTIONS, TOLERANCE, Shape, make_inputs, reference, run

AXES = {
    "dtype": ("float16", "bfloat16"), "layout": LAYOUTS, "head_dim": (64, 80, 96, 128, 256), "group": (1, 3, 16),
    "reduction": REDUCTIONS, "tokens": (1, 17, 129, 1023), "kv_heads": (1, 2),
}  # fmt: skip


def check(case: dict, device: str) -> None:
    shape = Shape(**case, num_queries=5, ragged=True)
    inputs = make_inputs(shape, np.random.default_rng(crc32(case_name(case).encode())), device)
    assert_close(run(**inputs), reference(**inputs), TOLERANCE[shape.torch_dtype], case_name(case))


@pytest.mark.parametrize("case", pairwise(**AXES), ids=case_name)
def test_norms(case: dict, device: str) -> None:
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_product(**AXES), ids=case_name)
def test_norms_everywhere(case: dict, device: str) -> None:
    check(case, device)


def test_thirty_two_queries_and_an_empty_head(device: str) -> None:
    shape = Shape(kv_heads=2, tokens=70, head_dim=64, ragged=True)
    scores = run(**(inputs := make_inputs(shape, np.random.default_rng(0), device)))
    assert not scores[0, 0].any()
    assert_close(scores, reference(**inputs), 1e-5, "32 queries")


BAD = [
    ("k", {"k": torch.zeros(1, 1, 4, 64, dtype=torch.float64)}), ("head_dim", {"k": torch.zeros(1, 1, 4, 48).half()}),
    ("q", {"q": torch.zeros(1, 17, 4, 64).half()}), ("q", {"q": torch.zeros(1, 4, 4, 64)}),
    ("lengths", {"lengths": torch.zeros(1, 1)}), ("reduction", {"reduction": "sum"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_bad_input_is_named(name: str, change: dict) -> None:
    good = {"q": torch.zeros(1, 4, 4, 64).half(), "k": torch.zeros(1, 1, 4, 64).half(), "lengths": torch.tensor([[4]]).int()}
    with pytest.raises(ValueError, match=f"^{name}"):
        run(**(good | change))
