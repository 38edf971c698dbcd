"""Decode attention over ThinK's split keys against the float64 reference, and against plain attention where nothing is pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pairwise import assert_close, case_name, full_product, pairwise

from kvsim.kernels import decode_attention, splits, think_decode_attention, think_gather
from kvsim.kernels.think_decode_attention import TOLERANCE, Shape, make_inputs, reference, run

GRID: dict[str, Any] = {
    "dtype": ("float16", "bfloat16"),
    "layout": ("contiguous", "paged", "paged_per_head"),
    "head_dim": (64, 80, 96, 128, 256),
    "group": (1, 4, 16),
    "tokens": (1, 17, 129),
    "recent_tokens": (0, 5, 32),
    "kept_frac": (0.2, 0.6, 1.0),
    "num_splits": (None, 1, 3),
}


def check(case: dict[str, Any], device: str) -> None:
    case = dict(case)
    num_splits, kept_frac = case.pop("num_splits", None), case.pop("kept_frac", 0.6)
    kept = int(case.get("head_dim", 128) * kept_frac)
    shape = Shape(**{"kv_heads": 2, "ragged": True, "kept_channels": kept, **case})
    inputs = make_inputs(shape, np.random.default_rng(), device)
    out, lse = run(**inputs, num_splits=num_splits)
    expected_out, expected_lse = reference(**inputs)
    assert_close(out, expected_out, TOLERANCE[out.dtype], "out")
    assert_close(lse, expected_lse, splits.LSE_TOLERANCE, "lse")


@pytest.mark.parametrize("case", [*pairwise(**GRID), {"tokens": 1023, "head_dim": 64, "kv_heads": 1}], ids=case_name)
def test_equals_the_reference(case: dict[str, Any], device: str) -> None:
    check(case, device)


FULL = full_product(**{**GRID, "tokens": (129,), "recent_tokens": (32,), "num_splits": (2,)})


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=case_name)
def test_equals_the_reference_everywhere(case: dict[str, Any], device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_keys_that_think_gather_wrote(layout: str, device: str) -> None:
    """Gathering keys and attending to them equals plain attention over keys whose other channels are zero."""
    shape = decode_attention.Shape(tokens=40, kv_heads=2, layout=layout)
    rng = np.random.default_rng()
    inputs = decode_attention.make_inputs(shape, rng, device)
    channels = torch.from_numpy(np.sort(rng.permuted(np.tile(np.arange(128), (1, 2, 1)), axis=-1)[..., :77])).to(torch.int32).to(device)
    cache = {"lengths": inputs["lengths"], "block_table": inputs["block_table"]}
    stored = think_gather.run(inputs["k"], inputs["lengths"], channels, block_table=inputs["block_table"])
    none = torch.zeros_like(inputs["lengths"])
    empty = decode_attention.make_inputs(decode_attention.Shape(tokens=1, kv_heads=2, layout=layout), rng, device)
    out, lse = run(
        inputs["q"], stored, empty["k"], inputs["v"], channels, inputs["lengths"], none, inputs["block_table"], empty["block_table"]
    )
    masked = torch.zeros_like(inputs["k"])
    head_axis = 1 if layout == "contiguous" else 2
    for head in range(2):
        index = channels[0, head].long()
        masked.select(head_axis, head)[..., index] = inputs["k"].select(head_axis, head)[..., index]
    expected_out, expected_lse = decode_attention.reference(inputs["q"], masked, inputs["v"], **cache)
    assert_close(out, expected_out, TOLERANCE[out.dtype], "out")
    assert_close(lse, expected_lse, splits.LSE_TOLERANCE, "lse")


BAD = (
    ("pruned_k", lambda i: i["pruned_k"].float(), "pruned_k.dtype"),
    ("pruned_k", lambda i: i["pruned_k"][..., :64], r"pruned_k.shape\[3\]"),
    ("recent_k", lambda i: i["recent_k"][..., :64], r"recent_k.shape\[3\]"),
    ("recent_lengths", lambda i: i["recent_lengths"][:, :1].contiguous(), "recent_lengths.shape"),
    ("recent_lengths", lambda i: i["recent_lengths"] + 100, "lengths"),
    ("channels", lambda i: i["channels"].long(), "channels.dtype"),
    ("channels", lambda i: torch.zeros(1, 2, 129, dtype=torch.int32), r"channels.shape\[2\]"),
    ("recent_block_table", lambda i: None, "recent_block_table"),
    ("q", lambda i: i["q"][:, :3].contiguous(), "q.shape"),
)


@pytest.mark.parametrize(("name", "change", "named"), BAD, ids=[f"{name}-{named}" for name, _, named in BAD])
def test_bad_input_is_refused_by_name(name: str, change: Any, named: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(think_decode_attention, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    inputs = make_inputs(Shape(kv_heads=2, tokens=40, layout="paged"), np.random.default_rng(0), "cpu")
    if named == "recent_block_table":
        inputs["recent_k"] = torch.zeros(1, 2, 32, 128, dtype=inputs["q"].dtype)
    with pytest.raises(ValueError, match=rf"^{named}.* must .*; "):
        run(**{**inputs, name: change(inputs)})
