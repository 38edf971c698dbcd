"""Budgets of competing heads against sorting, with ties and empty heads, and the pyramid against the simulator's policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvsim.kernels.select_budgets import (
    Shape,
    block_budgets,
    freeable_blocks,
    make_inputs,
    pooled_budgets,
    pyramid_layer_budgets,
    reference,
    run,
)
from kvsim.policies.base import CacheShape, SequenceShape
from kvsim.policies.pyramid_kv import PyramidKV


def scores_and_lengths(rng: np.random.Generator, tokens: int, levels: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pools of three heads: one empty, one full; `levels` distinct scores, 0 for all different. NaN past lengths."""
    scores = rng.random((2, 3, tokens), dtype=np.float32)
    scores = np.floor(scores * levels) if levels else scores
    lengths = rng.integers(0, tokens + 1, (2, 3))
    lengths[0, 0], lengths[1, 2] = 0, tokens
    scores[np.arange(tokens) >= lengths[..., None]] = np.nan
    return torch.from_numpy(scores).to(device), torch.from_numpy(lengths).to(torch.int32).to(device)


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize(("tokens", "block", "protected"), [(1, 4, 0), (17, 4, 2), (129, 16, 8), (1023, 16, 32)])
def test_the_cheapest_blocks_leave(tokens: int, block: int, protected: int, levels: int, device: str) -> None:
    scores, lengths = scores_and_lengths(np.random.default_rng(tokens + levels), tokens, levels, device)
    room = freeable_blocks(lengths, block, protected)
    for frac in (0.0, 0.4, 1.0):
        options = {"block_size_tokens": block, "protected_tokens": protected}
        options["blocks_to_free"] = (room.sum(1) * frac).to(torch.int32)
        budgets = block_budgets(scores, lengths, **options)
        assert torch.equal(budgets, reference("blocks", scores, lengths, **options))
        freed = -(-lengths // block) - -(-budgets // block)
        assert torch.equal(freed.sum(1).int(), options["blocks_to_free"])
        assert (freed <= room).all()
        assert (budgets >= lengths.clamp(max=protected)).all()
        touched = budgets[budgets < lengths]
        assert (touched % block == 0).all(), "an evicted head is left with whole blocks: empty tail slots went first"


def test_a_block_costs_its_largest_metric_and_not_their_sum(device: str) -> None:
    """Head 0: cheap but for one metric of 9. Head 1: all 5, a larger sum. By the largest, head 1's block leaves."""
    scores = torch.tensor([[[0.0, 0, 0, 9, 0, 0, 0, 9], [5, 5, 5, 5, 8, 8, 8, 8]]], device=device)
    lengths = torch.tensor([[4, 8]], dtype=torch.int32, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    assert block_budgets(scores, lengths, blocks_to_free=one, block_size_tokens=4).tolist() == [[4, 4]]
    lengths[0, 0] = 5  # three empty tail slots: the block behind the fifth token costs one metric, its smallest
    assert block_budgets(scores, lengths, blocks_to_free=one, block_size_tokens=4).tolist() == [[4, 8]]


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize(("tokens", "floor", "protected"), [(1, 0, 0), (17, 3, 2), (129, 13, 20), (1023, 100, 32)])
def test_a_pool_is_shared_by_its_best_tokens(tokens: int, floor: int, protected: int, levels: int, device: str) -> None:
    scores, lengths = scores_and_lengths(np.random.default_rng(tokens * 7 + levels), tokens, levels, device)
    for budget in {max(floor, protected), max(floor, protected, tokens // 2), tokens}:
        options = {"budget_tokens": budget, "floor_tokens": floor, "protected_tokens": protected}
        budgets = pooled_budgets(scores, lengths, **options)
        assert torch.equal(budgets, reference("pooled", scores, lengths, **options))
        assert torch.equal(budgets.sum(1), torch.minimum(lengths.sum(1), torch.tensor(3 * budget, device=device)))
        assert (budgets <= lengths).all()
        assert (budgets >= lengths.clamp(max=max(floor, protected))).all()


@pytest.mark.parametrize("kind", ["blocks", "pooled"])
def test_many_heads(kind: str, device: str) -> None:
    """More heads than a tile of them."""
    inputs = make_inputs(Shape(kind, num_heads=19, tokens=64), np.random.default_rng(0), device)
    assert torch.equal(run(**inputs), reference(**inputs))


@pytest.mark.parametrize("num_layers", [1, 2, 3, 32])
@pytest.mark.parametrize(("budget", "window", "beta"), [(512, 8, 20), (100, 32, 7), (64, 8, 1)])
def test_the_pyramid_is_the_simulators(num_layers: int, budget: int, window: int, beta: float) -> None:
    policy = PyramidKV(budget_tokens=budget, window_tokens=window, beta=beta)
    groups = policy.head_groups(CacheShape(num_layers, 8, 2, 128, 2, 16))
    for tokens in (1, budget, budget + 1, int(1.3 * budget), 10 * budget):
        ours = pyramid_layer_budgets(num_layers, budget, window_tokens=window, num_tokens=tokens, beta=beta)
        assert ours == [policy.stored(SequenceShape(tokens, tokens), group) for group in groups]
        assert max(ours) <= tokens
        assert sum(ours) == num_layers * min(tokens, budget)


SCORES, LENGTHS, ONE = torch.zeros(1, 2, 8), torch.tensor([[8, 3]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
BLOCKS = {"blocks_to_free": ONE, "block_size_tokens": 4}
POOL = {"budget_tokens": 4, "floor_tokens": 1}
BAD = [
    ("kind", "heads", (SCORES, LENGTHS), {}), ("scores", "blocks", (SCORES.half(), LENGTHS), BLOCKS),
    ("lengths", "blocks", (SCORES, LENGTHS.long()), BLOCKS), ("lengths", "pooled", (SCORES, LENGTHS + 1), POOL),
    ("blocks_to_free", "blocks", (SCORES, LENGTHS), BLOCKS | {"blocks_to_free": ONE * 4}),
    ("block_size_tokens", "blocks", (SCORES, LENGTHS), BLOCKS | {"block_size_tokens": 0}),
    ("budget_tokens", "pooled", (SCORES, LENGTHS), POOL | {"budget_tokens": 9}),
    ("budget_tokens", "pooled", (SCORES, LENGTHS), POOL | {"floor_tokens": 5}),
    ("protected_tokens", "pooled", (SCORES, LENGTHS), POOL | {"protected_tokens": -1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "args", "options"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_bad_input_is_named(name: str, kind: str, args: tuple, options: dict) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        run(kind, *args, **options)


@pytest.mark.parametrize("change", [{"num_layers": 0}, {"budget_tokens": 1}, {"window_tokens": 64}, {"beta": 0.5}])
def test_a_bad_pyramid_is_named(change: dict) -> None:
    good = {"num_layers": 2, "budget_tokens": 64, "window_tokens": 8, "num_tokens": 100, "beta": 20.0}
    with pytest.raises(ValueError, match=f"^{next(iter(change))}"):
        pyramid_layer_budgets(**(good | change))
