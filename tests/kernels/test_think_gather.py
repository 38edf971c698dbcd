"""Kept channels of keys, padded to whole tiles; counts against the simulator's policy."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
import torch
from pairwise import case_name, full_product, pairwise

from kvsim.kernels.layouts import LAYOUTS, tokens_of
from kvsim.kernels.think_gather import Shape, kept_channels, make_inputs, reference, run, stored_channels
from kvsim.policies.think import ThinK

AXES = {
    "dtype": ("float16", "bfloat16"), "layout": LAYOUTS, "head_dim": (64, 80, 96, 128, 256), "tokens": (1, 17, 129, 1023),
    "pruned_frac": (0.0, 0.4, 0.9), "kv_heads": (1, 2),
}  # fmt: skip


def check(case: dict, device: str) -> None:
    shape = Shape(**case, ragged=True)
    inputs = make_inputs(shape, np.random.default_rng(crc32(case_name(case).encode())), device)
    out = run(**inputs)
    for head, rows in enumerate(reference(**inputs)):
        assert torch.equal(tokens_of(out, inputs["block_table"], 0, head, len(rows)), rows)
    assert int(out.isfinite().sum()) == sum(shape.pair_lengths()) * stored_channels(shape.num_channels), "nothing else is written"


@pytest.mark.parametrize("case", pairwise(**AXES), ids=case_name)
def test_gather(case: dict, device: str) -> None:
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_product(**AXES), ids=case_name)
def test_gather_everywhere(case: dict, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("pruned_frac", [0.0, 0.3, 0.4, 0.5, 0.7, 0.9])
def test_counts_are_the_simulators(head_dim: int, pruned_frac: float) -> None:
    policy = ThinK(pruned_frac=pruned_frac)
    assert kept_channels(head_dim, pruned_frac) == policy.kept_channels(head_dim)
    assert min(head_dim, stored_channels(kept_channels(head_dim, pruned_frac))) == policy.stored_key_channels(head_dim)


def test_the_papers_example() -> None:
    assert (kept_channels(128, 0.4), stored_channels(77)) == (77, 80)


K, CHANNELS = torch.zeros(1, 1, 8, 64).half(), torch.tensor([[[0, 5]]], dtype=torch.int32)
BAD = [
    ("k", {"k": K.float()}), ("head_dim", {"k": K[..., :48]}), ("channels", {"channels": CHANNELS.flip(2)}),
    ("channels", {"channels": CHANNELS + 60}), ("channels", {"channels": CHANNELS.long()}),
    ("channels", {"channels": torch.arange(65, dtype=torch.int32)[None, None]}), ("lengths", {"lengths": torch.tensor([[8]])}),
    ("out", {"out": torch.zeros(1, 1, 8, 32).half()}), ("out", {"out": torch.zeros(1, 1, 8, 16)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_bad_input_is_named(name: str, change: dict) -> None:
    good = {"k": K, "lengths": torch.tensor([[8]], dtype=torch.int32), "channels": CHANNELS}
    with pytest.raises(ValueError, match=f"^{name}"):
        run(**(good | change))
