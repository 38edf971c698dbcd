"""Kept rows brought together: out of place, in place, and by filling holes; poisoned targets show what is not written."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
import torch
from pairwise import case_name, full_product, pairwise

from kvsim.kernels import compact
from kvsim.kernels.compact import Shape, make_inputs, reference, run, run_in_place, run_moves
from kvsim.kernels.layouts import LAYOUTS, tokens_of

AXES = {
    "dtype": ("float16", "bfloat16"), "layout": LAYOUTS, "head_dim": (64, 80, 96, 128, 256), "tokens": (1, 17, 129, 1023),
    "kept_frac": (0.0, 0.3, 1.0), "kv_heads": (1, 2),
}  # fmt: skip
CASES = pairwise(**AXES)


def inputs_of(case: dict, device: str) -> tuple[Shape, dict]:
    shape = Shape(**case, batch=2, ragged=True)
    return shape, make_inputs(shape, np.random.default_rng(crc32(case_name(case).encode())), device)


def check_rows(shape: Shape, out_k: torch.Tensor, out_v: torch.Tensor, table: torch.Tensor | None, expected: list) -> None:
    for pair, (rows_k, rows_v) in enumerate(expected):
        batch, head = divmod(pair, shape.kv_heads)
        assert torch.equal(tokens_of(out_k, table, batch, head, len(rows_k)), rows_k)
        assert torch.equal(tokens_of(out_v, table, batch, head, len(rows_v)), rows_v)


def check_copy(case: dict, device: str) -> None:
    shape, inputs = inputs_of(case, device)
    expected = reference(**inputs)
    written = sum(shape.kept_counts) * shape.head_dim
    for cache in (inputs["out_k"], inputs["out_v"]):
        cache.fill_(torch.nan)
    out_k, out_v = run(**inputs)
    check_rows(shape, out_k, out_v, inputs["out_block_table"], expected)
    assert int(out_k.isfinite().sum()) == int(out_v.isfinite().sum()) == written, "nothing else is written"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_copy(case: dict, device: str) -> None:
    check_copy(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_product(**AXES), ids=case_name)
def test_a_copy_everywhere(case: dict, device: str) -> None:
    check_copy(case, device)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_in_place(case: dict, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several tiles, so that a tile's rows could be overwritten before they are read."""
    monkeypatch.setattr(compact, "IN_PLACE_TILE", 32)
    shape, inputs = inputs_of(case, device)
    expected = reference(**inputs)
    same = {name: inputs[name] for name in ("k", "v", "kept", "num_kept", "block_table")}
    check_rows(shape, *run_in_place(**same), inputs["block_table"], expected)


@pytest.mark.parametrize("kept", [[0, 63], [1, 2, 3], list(range(1, 64)), list(range(0, 64, 2)), [62, 63]])
def test_in_place_when_targets_are_sources(kept: list[int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift by one makes every target the source of the copy before it."""
    monkeypatch.setattr(compact, "IN_PLACE_TILE", 4)
    k = torch.arange(64.0, device=device).half()[None, None, :, None].repeat(1, 1, 1, 64)
    rows = torch.tensor([[kept]], dtype=torch.int32, device=device)
    count = torch.tensor([[len(kept)]], dtype=torch.int32, device=device)
    run_in_place(k, v := -k, rows, count)
    assert k[0, 0, : len(kept), 0].tolist() == kept
    assert v[0, 0, : len(kept), 63].tolist() == [-token for token in kept]


def test_between_layouts_and_into_a_view(device: str) -> None:
    inputs = make_inputs(Shape(tokens=40, head_dim=64, kv_heads=2, layout="paged", ragged=True), np.random.default_rng(1), device)
    expected = reference(**inputs)
    for name in ("out_k", "out_v", "out_block_table"):
        inputs[name] = None
    out_k, out_v = run(**inputs)
    check_rows(Shape(kv_heads=2), out_k, out_v, None, expected)
    larger = torch.full((1, 2, 60, 128), torch.nan, dtype=out_k.dtype, device=device)
    run(**inputs | {"out_k": larger[..., :64], "out_v": larger[..., 64:]})
    check_rows(Shape(kv_heads=2), larger[..., :64], larger[..., 64:], None, expected)


@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 1), (80, 17), (128, 129), (256, 40)])
def test_survivors_of_the_tail_fill_the_holes(head_dim: int, tokens: int, device: str) -> None:
    """Moves as listed by hand: j-th survivor past the new length into the j-th hole; blocks behind are freed."""
    rng = np.random.default_rng(tokens)
    shape = Shape(batch=2, kv_heads=2, tokens=tokens, head_dim=head_dim, layout="paged_per_head", ragged=True, kept_frac=0.4)
    inputs = make_inputs(shape, rng, device)
    table, slots = inputs["block_table"], inputs["k"].shape[:2]
    metrics = torch.from_numpy(rng.random(slots, dtype=np.float32)).to(device)
    positions = torch.from_numpy(rng.integers(0, 1000, slots)).to(torch.int32).to(device)
    lengths = torch.tensor(shape.pair_lengths(), dtype=torch.int32, device=device).reshape(2, 2)

    def slot_row(pair: int, token: int) -> tuple:
        block, offset = int(old_table[pair // 2, pair % 2, token // 16]), token % 16
        return inputs["k"][block, offset, 0], inputs["v"][block, offset, 0], metrics[block, offset], positions[block, offset]

    old_table, expected, freed_blocks = table.clone(), [], []
    for pair, length in enumerate(shape.pair_lengths()):
        count = shape.kept_counts[pair]
        kept = inputs["kept"][pair // 2, pair % 2, :count].tolist()
        after = {token: token for token in kept if token < count}
        holes = [token for token in range(count) if token not in kept]
        after |= dict(zip(holes, [token for token in kept if token >= count], strict=True))
        expected.append([[part.clone() for part in slot_row(pair, after[token])] for token in range(count)])
        freed_blocks += old_table[pair // 2, pair % 2, -(-count // 16) : -(-length // 16)].tolist()
    same = {name: inputs[name] for name in ("k", "v", "kept", "num_kept", "block_table")}
    freed, num_freed = run_moves(**same, lengths=lengths, metrics=metrics, positions=positions)
    for pair, rows in enumerate(expected):
        for token, parts in enumerate(rows):
            assert all(torch.equal(x, y) for x, y in zip(slot_row(pair, token), parts, strict=True))
    assert num_freed.tolist() == [len(freed_blocks)]
    assert freed.tolist() == freed_blocks + [-1] * (freed.numel() - len(freed_blocks))
    for pair, length in enumerate(shape.pair_lengths()):
        row, old = table[pair // 2, pair % 2], old_table[pair // 2, pair % 2]
        first, last = -(-shape.kept_counts[pair] // 16), -(-length // 16)
        assert torch.equal(row[:first], old[:first])
        assert (row[first:last] == -1).all()


K, KEPT, COUNT = torch.zeros(1, 1, 8, 64).half(), torch.tensor([[[0, 5]]], dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32)
BAD = [
    ("k", {"k": K.float(), "v": K.float()}), ("v", {"v": K[:, :, :4]}), ("head_dim", {"k": K[..., :48], "v": K[..., :48]}),
    ("k", {"k": K.transpose(2, 3), "v": K.transpose(2, 3)}), ("kept", {"kept": KEPT.long()}), ("kept", {"kept": KEPT.flip(2)}),
    ("kept", {"kept": KEPT + 3}), ("kept", {"kept": torch.zeros(1, 1, 9, dtype=torch.int32)}), ("num_kept", {"num_kept": COUNT + 1}),
    ("block_table", {"block_table": torch.zeros(1, dtype=torch.int32)}),
]  # fmt: skip


@pytest.mark.parametrize("call", [run, run_in_place])
@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_bad_input_is_named(name: str, change: dict, call) -> None:
    good = {"k": K.clone(), "v": K.clone(), "kept": KEPT, "num_kept": COUNT}
    with pytest.raises(ValueError, match=f"^{name}"):
        call(**(good | change))


def test_a_bad_target_is_named() -> None:
    v = K.clone()
    with pytest.raises(ValueError, match=r"^out_k=k or v must be other memory"):
        run(K, v, KEPT, COUNT, out_k=K, out_v=v)
    small = torch.zeros(1, 1, 1, 64).half()
    with pytest.raises(ValueError, match=r"^kept\.shape\[2\]=2"):
        run(K, v, KEPT, COUNT, out_k=small, out_v=small.clone())
    with pytest.raises(ValueError, match=r"^block_table"):
        run_moves(
            K.view(1, 8, 1, 64), v.view(1, 8, 1, 64), KEPT, COUNT, lengths=COUNT, block_table=torch.zeros(1, 1, dtype=torch.int32),
            metrics=torch.zeros(1, 8), positions=torch.zeros(1, 8, dtype=torch.int32),
        )  # fmt: skip
