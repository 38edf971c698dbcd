"""Selections against sorting: exact and threshold, ties, protected tokens, ragged rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvsim.kernels import select
from kvsim.kernels.select import METHODS, Shape, make_inputs, reference, run


def same(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(actual[0].cpu(), expected[0].cpu())
    assert torch.equal(actual[1].cpu(), expected[1].cpu())


@pytest.fixture(params=["resident", "streamed"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both exact searches on short rows, the streamed one over several tiles."""
    if request.param == "streamed":
        monkeypatch.setattr(select, "RESIDENT_TOKENS", 0)
        monkeypatch.setattr(select, "WRITE_TILE", 256)
    return request.param


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 17, 129, 1023])
def test_random_scores(tokens: int, method: str, search: str, device: str) -> None:
    shape = Shape(3, tokens, (tokens + 1) // 2, min(1, tokens // 4), min(3, tokens // 4), method)
    inputs = make_inputs(shape, np.random.default_rng(tokens), device)
    same(run(**inputs), reference(**inputs))


@pytest.mark.parametrize("method", METHODS)
def test_ragged_rows_with_an_empty_one(method: str, search: str, device: str) -> None:
    rng = np.random.default_rng(8)
    scores = torch.from_numpy(rng.standard_normal((6, 300), dtype=np.float32)).to(device)
    lengths = torch.tensor([0, 300, 1, 2, 150, 299], dtype=torch.int32, device=device)
    budgets = torch.tensor([0, 100, 1, 2, 150, 6], dtype=torch.int32, device=device)
    for row, length in enumerate(lengths.tolist()):
        scores[row, length:] = torch.nan
    inputs = {"lengths": lengths, "max_budget_tokens": 160, "num_sink": 2, "num_recent": 4, "method": method}
    actual = run(scores, budgets, **inputs)
    same(actual, reference(scores, budgets, **inputs))
    assert actual[1].tolist() == budgets.tolist()
    assert (actual[0][actual[0] >= 0].cpu() < 300).all()


@pytest.mark.parametrize("values", [(0.0,), (-1.0, 0.0, 1.0), (-0.0, 0.0, 1e-40, torch.inf, -torch.inf)])
def test_of_equal_scores_the_first_stay(values: tuple[float, ...], search: str, device: str) -> None:
    rng = np.random.default_rng(len(values))
    scores = torch.tensor(rng.choice(values, (2, 401)), dtype=torch.float32, device=device)
    for budget in (0, 1, 57, 200, 400, 401):
        same(run(scores, budget), reference(scores, budget))
    if len(values) == 1:
        assert run(scores, 57)[0][0].tolist() == list(range(57))


def test_the_threshold_differs_from_exact_only_within_a_slice(device: str) -> None:
    """As many tokens stay; none left out scores above any kept by more than a 256th of the range of images."""
    scores = torch.from_numpy(np.random.default_rng(2).random((1, 1000), dtype=np.float32) + 1).to(device)
    kept, count = run(scores, 300, method="threshold")
    assert count.item() == 300
    assert not torch.equal(kept, run(scores, 300)[0])
    left_out = torch.ones(1000, dtype=torch.bool, device=device).scatter_(0, kept[0].long(), False)
    # Within [1, 2) images are linear in the scores.
    assert scores[0, left_out].max() - scores[0, kept[0].long()].min() <= (scores.max() - scores.min()) * 2 / 256


def test_views_of_a_larger_buffer(device: str) -> None:
    buffer = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 64), dtype=np.float32)).to(device)
    same(run(buffer[:, :33], 9), reference(buffer[:, :33].contiguous(), 9))


SCORES, LENGTHS = torch.zeros(2, 8), torch.tensor([8, 3], dtype=torch.int32)
BUDGETS = torch.tensor([4, 3], dtype=torch.int32)
BAD = [
    ("scores", (SCORES.half(), 4), {}), ("scores", (torch.zeros(8, 2).T, 1), {}), ("budgets", (SCORES, 9), {}),
    ("budgets", (SCORES, 4), {"lengths": LENGTHS}), ("max_budget_tokens", (SCORES, BUDGETS), {}),
    ("budgets", (SCORES, BUDGETS + 1), {"lengths": LENGTHS, "max_budget_tokens": 8}),
    ("budgets", (SCORES, BUDGETS.long()), {"max_budget_tokens": 4}), ("budgets", (SCORES, BUDGETS), {"max_budget_tokens": 3}),
    ("lengths", (SCORES, 1), {"lengths": LENGTHS + 5}), ("num_sink", (SCORES, 4), {"num_sink": -1}),
    ("num_sink", (SCORES, 4), {"num_sink": 2, "num_recent": 3}), ("method", (SCORES, 4), {"method": "sort"}),
    ("budgets", (SCORES, BUDGETS), {"max_budget_tokens": 8, "num_sink": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "options"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_bad_input_is_named(name: str, args: tuple, options: dict) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        run(*args, **options)
