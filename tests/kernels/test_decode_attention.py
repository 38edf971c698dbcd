"""Decode attention, plain and scored, against the float64 reference on fresh random inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pairwise import assert_close, case_name, full_product, pairwise

from kvsim.kernels import decode_attention, decode_attention_scored, splits

GRID: dict[str, Any] = {
    "dtype": ("float16", "bfloat16"),
    "layout": ("contiguous", "paged", "paged_per_head"),
    "head_dim": (64, 80, 96, 128, 256),
    "group": (1, 3, 4, 8, 16),
    "tokens": (1, 17, 129),
    "num_splits": (None, 1, 3),
}
ODD = (
    {"tokens": 1, "kv_heads": 1, "group": 1},
    {"tokens": 1023, "kv_heads": 1, "head_dim": 64, "layout": "paged"},
    {"tokens": 129, "batch": 3, "kv_heads": 1, "ragged": True, "head_dim": 64},
    {"tokens": 40, "kv_heads": 2, "block_size": 1, "layout": "paged"},
)


def check(case: dict[str, Any], device: str) -> None:
    case = dict(case)
    num_splits = case.pop("num_splits", None)
    shape = decode_attention.Shape(**{"kv_heads": 2, "ragged": True, **case})
    inputs = decode_attention.make_inputs(shape, np.random.default_rng(), device)
    out, lse = decode_attention.run(**inputs, num_splits=num_splits)
    expected_out, expected_lse = decode_attention.reference(**inputs)
    assert out.dtype == shape.torch_dtype and lse.dtype == torch.float32
    assert_close(out, expected_out, decode_attention.TOLERANCE[out.dtype], "out")
    assert_close(lse, expected_lse, splits.LSE_TOLERANCE, "lse")


@pytest.mark.parametrize("case", [*pairwise(**GRID), *ODD], ids=case_name)
def test_equals_the_reference(case: dict[str, Any], device: str) -> None:
    """Two KV heads, the first of them empty: output 0 and log-sum-exp −inf."""
    check(case, device)


FULL = full_product(**{**GRID, "tokens": (129,), "num_splits": (2,)})


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=case_name)
def test_equals_the_reference_everywhere(case: dict[str, Any], device: str) -> None:
    check(case, device)


SCORED_GRID: dict[str, Any] = {
    "statistic": decode_attention_scored.STATISTICS,
    "dtype": ("float16", "bfloat16"),
    "layout": ("contiguous", "paged", "paged_per_head"),
    "head_dim": (64, 80, 128, 256),
    "group": (1, 3, 16),
    "tokens": (1, 17, 129),
    "num_splits": (None, 2),
}


def check_scored(case: dict[str, Any], device: str) -> None:
    case = dict(case)
    num_splits = case.pop("num_splits", None)
    shape = decode_attention_scored.Shape(**{"kv_heads": 2, "ragged": True, **case})
    inputs = decode_attention_scored.make_inputs(shape, np.random.default_rng(), device)
    before = inputs["scores"].clone()
    expected_out, expected_lse, expected = decode_attention_scored.reference(**inputs)
    out, lse = decode_attention_scored.run(**inputs, num_splits=num_splits)
    assert_close(out, expected_out, decode_attention_scored.TOLERANCE[out.dtype], "out")
    assert_close(lse, expected_lse, splits.LSE_TOLERANCE, "lse")
    scores = inputs["scores"].double()
    if shape.statistic == "threshold_count":
        assert ((scores == expected) | near_threshold(inputs)).all()
    else:
        relative, absolute = decode_attention_scored.SCORE_TOLERANCE
        added = expected - before.double()
        rounding = 2**-23 * expected.abs()  # of the fp32 sum with the old score
        assert ((scores - expected).abs() <= relative * added + absolute * shape.group + rounding).all()
    for pair, length in enumerate(shape.pair_lengths()):
        batch, head = divmod(pair, shape.kv_heads)
        assert torch.equal(inputs["scores"][batch, head, length:], before[batch, head, length:]), "slots past the length"


def near_threshold(inputs: dict[str, Any]) -> torch.Tensor:
    """Slots where some α·t is so close to 1 that fp16 may count it either way."""
    near = torch.zeros(inputs["scores"].shape, dtype=torch.bool, device=inputs["scores"].device)
    logits = decode_attention_scored.logits_reference(inputs["q"], inputs["k"], inputs["lengths"], inputs["block_table"], None)
    for (batch, head), rows in logits.items():
        length = rows.shape[1]
        near[batch, head, :length] = ((rows.softmax(1) * length - 1).abs() < 2**-10).any(0)
    return near


@pytest.mark.parametrize("case", [*pairwise(**SCORED_GRID), {"statistic": "gumbel", "tokens": 1023, "head_dim": 64}], ids=case_name)
def test_scores_equal_the_reference(case: dict[str, Any], device: str) -> None:
    check_scored(case, device)


SCORED_FULL = full_product(**{**SCORED_GRID, "tokens": (129,), "num_splits": (2,)})


@pytest.mark.slow
@pytest.mark.parametrize("case", SCORED_FULL, ids=case_name)
def test_scores_equal_the_reference_everywhere(case: dict[str, Any], device: str) -> None:
    check_scored(case, device)


def test_sums_over_all_slots(device: str) -> None:
    """Probabilities of a head sum to the size of its group, whichever statistic keeps them linear."""
    for statistic in ("sum", "gumbel"):
        shape = decode_attention_scored.Shape(statistic=statistic, tokens=129, head_dim=64, group=3)
        inputs = decode_attention_scored.make_inputs(shape, np.random.default_rng(), device)
        inputs["scores"].zero_()
        decode_attention_scored.run(**inputs)
        assert float(inputs["scores"].sum()) == pytest.approx(3, rel=2e-3)


def test_seen_tokens_are_the_threshold(device: str) -> None:
    """With t = 1 no α exceeds 1/t; with a huge t every α does."""
    shape = decode_attention_scored.Shape(statistic="threshold_count", tokens=40, head_dim=64, group=4, layout="paged")
    for seen, added in ((1, 0), (2**30, 4)):
        inputs = decode_attention_scored.make_inputs(shape, np.random.default_rng(), device)
        before = inputs["scores"].clone()
        decode_attention_scored.run(**inputs, num_seen=torch.tensor([seen], dtype=torch.int32, device=device))
        assert ((inputs["scores"] - before)[..., :40] == added).all()


def test_noise_follows_seed_and_step(device: str) -> None:
    """Same seed and step: the same scores, bit by bit. Another step: other ones (noise is drawn anew at each call)."""
    shape = decode_attention_scored.Shape(statistic="gumbel", tokens=40, head_dim=64)
    inputs = decode_attention_scored.make_inputs(shape, np.random.default_rng(), device)
    found = []
    for step in (3, 3, 4):
        scores = torch.zeros_like(inputs["scores"])
        decode_attention_scored.run(**{**inputs, "scores": scores, "step": step})
        found.append(scores)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


@pytest.mark.parametrize(("pairs", "length"), [(1, 1), (1, 256), (8, 131072), (256, 8192), (300, 8192), (4096, 512)])
def test_splits_cover_the_length_and_fill_the_gpu(pairs: int, length: int) -> None:
    num_splits, split_tokens = splits.split_plan(pairs, length, 64, 108)
    assert split_tokens % 64 == 0 and (num_splits - 1) * split_tokens < length <= num_splits * split_tokens
    assert num_splits == 1 or length // num_splits >= splits.MIN_SPLIT_TOKENS // 2
    if pairs * (length // splits.MIN_SPLIT_TOKENS) >= 2 * 216:  # enough tokens for two waves
        waves = pairs * num_splits / 216
        assert waves / np.ceil(waves) >= 0.7


BAD = (
    ("q", lambda i: i["q"].float(), "q.dtype"),
    ("q", lambda i: i["q"][:, :3], "q.shape"),
    ("q", lambda i: i["q"].transpose(1, 2).contiguous().transpose(1, 2), "q.stride"),
    ("k", lambda i: i["k"].to(torch.float64), "k.dtype"),
    ("k", lambda i: i["k"][..., :48], "head_dim"),
    ("k", lambda i: i["k"].transpose(2, 3), "k"),
    ("v", lambda i: i["v"][:, :, :-1], "v.shape"),
    ("lengths", lambda i: i["lengths"].long(), "lengths.dtype"),
    ("lengths", lambda i: i["lengths"] + 1, "lengths="),
    ("block_table", lambda i: torch.zeros(2, 2, dtype=torch.int32), "block_table.shape"),
    ("scale", lambda i: -1.0, "scale"),
    ("num_splits", lambda i: 0, "num_splits"),
    ("max_length", lambda i: 10**6, "max_length"),
)


@pytest.mark.parametrize(("name", "change", "named"), BAD, ids=[f"{name}-{named}" for name, _, named in BAD])
def test_bad_input_is_refused_by_name(name: str, change: Any, named: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(decode_attention, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    inputs = decode_attention.make_inputs(decode_attention.Shape(kv_heads=2, tokens=20), np.random.default_rng(0), "cpu")
    bad = change(inputs)
    changed = {"k": bad, "v": bad} if name == "k" else {name: bad}
    with pytest.raises(ValueError, match=rf"^{named}.* must .*; "):
        decode_attention.run(**{**inputs, **changed})


BAD_SCORES = (
    ("scores", lambda i: i["scores"].half(), "scores.dtype"),
    ("scores", lambda i: i["scores"][..., :-1].contiguous(), r"scores.shape\[2\]"),
    ("statistic", lambda i: "mean", "statistic"),
    ("temperature", lambda i: 0.0, "temperature"),
    ("seed", lambda i: -1, "seed"),
    ("step", lambda i: 1.5, "step"),
    ("num_seen", lambda i: torch.ones(3, dtype=torch.int32), "num_seen.shape"),
)


@pytest.mark.parametrize(("name", "change", "named"), BAD_SCORES, ids=[f"{name}-{named}" for name, _, named in BAD_SCORES])
def test_bad_scores_are_refused_by_name(name: str, change: Any, named: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(decode_attention, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    shape = decode_attention_scored.Shape(kv_heads=2, tokens=20)
    inputs = decode_attention_scored.make_inputs(shape, np.random.default_rng(0), "cpu")
    with pytest.raises(ValueError, match=rf"^{named}.* must .*; "):
        decode_attention_scored.run(**{**inputs, name: change(inputs)})
