"""Column scores against float64 references: statistics, poolings, layouts, ragged heads."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
import torch
from pairwise import assert_close, case_name, full_product, pairwise

from kvsim.kernels import noise, prefill_scores
from kvsim.kernels.layouts import LAYOUTS
from kvsim.kernels.prefill_scores import POOLINGS, STATISTICS, TOLERANCE, Shape, make_inputs, reference, run

AXES = {
    "dtype": ("float16", "bfloat16"), "layout": LAYOUTS, "head_dim": (64, 80, 96, 128, 256), "group": (1, 3, 4, 16),
    "statistic": ("sum", "square", "gumbel"), "tokens": (1, 17, 129), "kv_heads": (1, 2),
}  # fmt: skip


def check(shape: Shape, draw: int, device: str, **options) -> torch.Tensor:
    inputs = make_inputs(shape, np.random.default_rng(draw), device) | options
    actual, expected = run(**inputs), reference(**inputs)
    for pair, length in enumerate(shape.pair_lengths()):
        batch, head = divmod(pair, shape.kv_heads)
        assert not actual[batch, head, length:].any(), "scores past a length are 0"
    assert_close(actual, expected, TOLERANCE[shape.torch_dtype], str(shape))
    return actual


@pytest.mark.parametrize("case", pairwise(**AXES), ids=case_name)
def test_all_queries(case: dict, device: str) -> None:
    check(Shape(**case, ragged=True), crc32(case_name(case).encode()), device, temperature=1.3, seed=2**40 + 7)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_product(**AXES), ids=case_name)
def test_all_queries_everywhere(case: dict, device: str) -> None:
    check(Shape(**case, ragged=True), 1, device, temperature=1.3, seed=5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("tokens", "queries"), [(1, 8), (17, 8), (1023, 32)])
def test_the_last_window_pooled(pooling: str, tokens: int, queries: int, device: str) -> None:
    shape = Shape(kv_heads=2, tokens=tokens, head_dim=64, num_queries=queries, statistic="square", pooling=pooling, ragged=True)
    check(shape, tokens, device, pool_tokens=7, num_unpooled=min(queries, 8), group_mean=True)


@pytest.mark.parametrize(("tokens", "queries", "group"), [(165, 100, 1), (150, 70, 3), (300, 200, 1)])
def test_some_of_the_queries(tokens: int, queries: int, group: int, device: str) -> None:
    """The later tiles of keys are seen by some queries only; at 165 the first that sees one is the last of its tile."""
    check(Shape(kv_heads=2, tokens=tokens, head_dim=64, num_queries=queries, group=group), tokens, device)


def test_a_probability_above_the_mean_is_counted(device: str) -> None:
    """Off by one where p · t is within 1e-4 of 1, which fp32 may see either way: such inputs are not drawn here."""
    shape = Shape(kv_heads=2, tokens=129, head_dim=64, num_queries=40, statistic="count")
    scores = check(shape, 3, device)
    assert 0 < scores.sum() < 40 * 129 * 8


def test_row_sums_of_flash_attention_are_used(device: str) -> None:
    shape = Shape(tokens=65, head_dim=64)
    inputs = make_inputs(shape, np.random.default_rng(0), device)
    own = run(**inputs)
    q, k = inputs["q"].double(), inputs["k"].double().repeat_interleave(4, 1)
    hidden = torch.triu(torch.ones(65, 65, dtype=torch.bool, device=device), 1)
    lse = (q @ k.transpose(2, 3) / 8).masked_fill(hidden, -torch.inf).logsumexp(-1)
    assert_close(run(**inputs, lse=lse.float()), own.double(), 2e-5, "given row sums")
    assert_close(run(**inputs, lse=(lse + 1).float()), own.double() / torch.e, 2e-5, "others change the scores")


def test_sums_of_each_head_are_its_queries(device: str) -> None:
    """Every query's probabilities add up to 1."""
    scores = run(**make_inputs(Shape(kv_heads=2, group=3, tokens=77, head_dim=64), np.random.default_rng(4), device))
    assert_close(scores.sum(-1), torch.full((1, 2), 3.0 * 77, device=device), 1e-6, "mass")


def test_gumbel_noise_is_gumbel() -> None:
    """Mean and variance of 200,000 draws within 5 standard errors: γ = 0.5772, π²/6; its kurtosis is 5.4."""
    index = torch.arange(200_000)
    draws = noise.gumbel_reference(9, index, index // 7, index % 3)
    assert abs(draws.mean() - 0.5772157) < 5 * (1.645 / 200_000) ** 0.5
    assert abs(draws.var() - 1.6449341) < 5 * 1.6449341 * (4.4 / 200_000) ** 0.5


BAD = [
    ("k", {"k": torch.zeros(1, 1, 4, 64, dtype=torch.float64)}), ("head_dim", {"k": torch.zeros(1, 1, 4, 48).half()}),
    ("q", {"q": torch.zeros(1, 4, 4, 64)}), ("q", {"q": torch.zeros(1, 33, 4, 64).half()}),
    ("q", {"q": torch.zeros(1, 4, 64, 4).half().transpose(2, 3)}), ("lengths", {"lengths": torch.tensor([[4]])}),
    ("statistic", {"statistic": "mean"}), ("pooling", {"pooling": "avg"}), ("temperature", {"temperature": 0.0}),
    ("pool_tokens", {"pool_tokens": 4}), ("num_unpooled", {"num_unpooled": -1}),
    ("lse", {"statistic": "gumbel", "lse": torch.zeros(1, 4, 4)}), ("lse", {"lse": torch.zeros(1, 4, 3)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BAD)])
def test_bad_input_is_named(name: str, change: dict) -> None:
    good = {"q": torch.zeros(1, 4, 4, 64).half(), "k": torch.zeros(1, 1, 4, 64).half(), "lengths": torch.tensor([[4]]).int()}
    with pytest.raises(ValueError, match=f"^{name}"):
        prefill_scores.run(**(good | change))


def test_every_statistic_is_tested() -> None:
    assert set(STATISTICS) == {*AXES["statistic"], "count"}
