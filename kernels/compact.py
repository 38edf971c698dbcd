"""Kept tokens of K and V brought together: into new memory, in place, or by filling the holes of a paged cache.

* `run`: gather-copy in kept order to another cache of the same layout. Every program copies a tile of tokens.
* `run_in_place`: the same order inside the cache. Kept indices ascend without repeats, so kept[i] >= i: every copy moves a token
  towards the front. One program walks over a head's tokens in order, TILE at a time: it loads all rows of a tile before it
  stores any (a barrier between), and what it stores lies at most as far as the last slot of the tile, before every row a
  later tile reads. So no row is overwritten before it was read. Parallelism comes from heads, K and V, and slices of 32
  channels, which no copy connects.
* `run_moves`: KV-Compress's compaction (arXiv 2410.00161). Only survivors in the tail, past the head's new length, move, each
  into a hole left before it; order inside a head is given up, so metrics and positions move along. Sources and destinations
  are disjoint: all copies run at once. Blocks past the new length are then free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks
from kvsim.kernels.layouts import (
    CacheShape,
    CacheView,
    cache_dims,
    make_block_table,
    make_cache,
    token_offsets,
    tokens_of,
    view_kv,
)
from kvsim.kernels.runtime import CompileSpec, ceil_div, launch, next_power_of_2, recorded

SLICE_CHANNELS = 32
"""Channels of an in-place slice: 64 B of 16-bit elements, two sectors."""
COPY_ELEMENTS = 4096
"""Elements of K a program copies: 8 KiB, 64 B for each of 128 threads."""
IN_PLACE_TILE = 256
MOVE_ELEMENTS = 2048
FREE_TILE = 128


@triton.jit
def copy_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, table_ptr, out_table_ptr, kept_ptr, num_kept_ptr, kv_heads, max_kept,
    outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head,
    out_outer_stride, out_token_stride, out_head_stride, out_table_stride_batch, out_table_stride_head,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, OUT_PAGED: tl.constexpr, OUT_BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    num_kept = tl.load(num_kept_ptr + row)
    start = tl.program_id(0) * TILE
    if start < num_kept:
        slot = start + tl.arange(0, TILE)
        exists = slot < num_kept
        channel = tl.arange(0, HEAD_DIM_PADDED)
        mask = exists[:, None] & (channel[None, :] < HEAD_DIM)
        token = tl.load(kept_ptr + row * max_kept + slot, mask=exists, other=0)
        source = token_offsets(
            token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )[:, None] + channel[None, :]  # fmt: skip
        target = token_offsets(
            slot, exists, batch, head, out_table_ptr, out_table_stride_batch, out_table_stride_head,
            out_outer_stride, out_token_stride, out_head_stride, OUT_PAGED, OUT_BLOCK_SIZE,
        )[:, None] + channel[None, :]  # fmt: skip
        k = tl.load(k_ptr + source, mask=mask)
        v = tl.load(v_ptr + source, mask=mask)
        tl.store(k_out_ptr + target, k, mask=mask)
        tl.store(v_out_ptr + target, v, mask=mask)


@triton.jit
def in_place_kernel(
    k_ptr, v_ptr, table_ptr, kept_ptr, num_kept_ptr, kv_heads, max_kept,
    outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    num_kept = tl.load(num_kept_ptr + row)
    channel = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    data_ptr = k_ptr if tl.program_id(2) == 0 else v_ptr
    for start in range(0, num_kept, TILE):
        slot = start + tl.arange(0, TILE)
        exists = slot < num_kept
        token = tl.load(kept_ptr + row * max_kept + slot, mask=exists, other=0)
        moves = exists & (token > slot)  # a prefix that is kept whole stays where it is
        mask = moves[:, None] & (channel[None, :] < HEAD_DIM)
        source = token_offsets(
            token, moves, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        target = token_offsets(
            slot, moves, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        rows = tl.load(data_ptr + source[:, None] + channel[None, :], mask=mask)
        tl.debug_barrier()  # all rows of the tile are read before one is overwritten
        tl.store(data_ptr + target[:, None] + channel[None, :], rows, mask=mask)


@triton.jit
def first_kept_at_or_past(kept_ptr, num_kept, token):
    """Position in the ascending kept list of the first index >= token."""
    low, high = 0, num_kept
    while low < high:
        middle = (low + high) // 2
        before = tl.load(kept_ptr + middle) < token
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def move_kernel(
    k_ptr, v_ptr, metrics_ptr, positions_ptr, table_ptr, kept_ptr, num_kept_ptr, kv_heads, max_kept,
    outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head,
    slot_outer_stride, slot_token_stride, slot_head_stride,
    SEARCH_STEPS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Survivor number j of the tail goes into hole number j, both counted from the front.

    No list of holes is built: before kept[p] there are kept[p] − p holes, a count that never falls with p, so the j-th
    hole is j + p for the number p of kept tokens that have at most j holes before them: a binary search.
    """
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    num_kept = tl.load(num_kept_ptr + row)
    kept_row = kept_ptr + row * max_kept
    num_in_place = first_kept_at_or_past(kept_row, num_kept, num_kept)
    start = num_in_place + tl.program_id(0) * TILE
    if start < num_kept:
        slot = start + tl.arange(0, TILE)
        exists = slot < num_kept
        survivor = tl.minimum(slot, num_kept - 1)  # a valid row for every thread: loads need no predicate
        hole_number = survivor - num_in_place
        low = tl.zeros([TILE], tl.int32)
        high = tl.zeros([TILE], tl.int32) + num_kept
        for _ in range(SEARCH_STEPS):
            middle = (low + high) // 2
            open_range = low < high
            holes_before = tl.load(kept_row + middle, mask=open_range, other=0) - middle
            right = open_range & (holes_before <= hole_number)
            high = tl.where(open_range & (holes_before > hole_number), middle, high)
            low = tl.where(right, middle + 1, low)
        hole = hole_number + low
        token = tl.load(kept_row + survivor)
        source = token_offsets(
            token, token >= 0, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, True, BLOCK_SIZE,
        )  # fmt: skip
        target = token_offsets(
            hole, hole >= 0, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, True, BLOCK_SIZE,
        )  # fmt: skip
        channel = tl.arange(0, HEAD_DIM_PADDED)
        in_head = (channel < HEAD_DIM)[None, :]
        mask = exists[:, None] & in_head
        k = tl.load(k_ptr + source[:, None] + channel[None, :], mask=in_head)
        v = tl.load(v_ptr + source[:, None] + channel[None, :], mask=in_head)
        tl.store(k_ptr + target[:, None] + channel[None, :], k, mask=mask)
        tl.store(v_ptr + target[:, None] + channel[None, :], v, mask=mask)
        slot_source = token_offsets(
            token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            slot_outer_stride, slot_token_stride, slot_head_stride, True, BLOCK_SIZE,
        )  # fmt: skip
        slot_target = token_offsets(
            hole, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            slot_outer_stride, slot_token_stride, slot_head_stride, True, BLOCK_SIZE,
        )  # fmt: skip
        tl.store(metrics_ptr + slot_target, tl.load(metrics_ptr + slot_source, mask=exists), mask=exists)
        tl.store(positions_ptr + slot_target, tl.load(positions_ptr + slot_source, mask=exists), mask=exists)


@triton.jit
def free_kernel(
    table_ptr, lengths_ptr, num_kept_ptr, first_freed_ptr, freed_ptr, table_stride,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Block numbers of a head past its new length, written where the heads before it stop; the table forgets them."""
    row = tl.program_id(0).to(tl.int64)
    old_blocks = (tl.load(lengths_ptr + row) + BLOCK_SIZE - 1) // BLOCK_SIZE
    new_blocks = (tl.load(num_kept_ptr + row) + BLOCK_SIZE - 1) // BLOCK_SIZE
    first_freed = tl.load(first_freed_ptr + row)
    for start in range(new_blocks, old_blocks, TILE):
        logical = start + tl.arange(0, TILE)
        freed = logical < old_blocks
        block = tl.load(table_ptr + row * table_stride + logical, mask=freed, other=0)
        tl.store(freed_ptr + first_freed + logical - new_blocks, block, mask=freed)
        tl.store(table_ptr + row * table_stride + logical, tl.full([TILE], -1, tl.int32), mask=freed)


def reference(
    k: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    num_kept: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    **_: Any,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(K, V) of each (sequence, head): the kept rows, [num_kept, head_dim]. Nothing is written."""
    rows = []
    for sequence in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            tokens = kept[sequence, head, : int(num_kept[sequence, head])].tolist()
            last = max(tokens, default=-1) + 1
            caches = [tokens_of(cache, block_table, sequence, head, last) for cache in (k, v)]
            rows.append((caches[0][tokens], caches[1][tokens]))
    return rows


def run(
    k: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    num_kept: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    out_k: torch.Tensor | None = None,
    out_v: torch.Tensor | None = None,
    out_block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows kept[sequence, head, i] of K and V become rows i of out_k and out_v, other memory than theirs.

    k, v, block_table: a cache (kvsim.kernels.layouts). kept: [batch, kv_heads, max_kept] int32, what `select.run` returns;
    num_kept: [batch, kv_heads] int32, past which kept is not used. out_k, out_v, out_block_table: a cache in either layout;
    None: contiguous of max_kept tokens, allocated. Rows past num_kept are left as they are. Returns (out_k, out_v).
    """
    source = view_kv(k, v, num_kept, block_table)
    max_kept = _check_kept(kept, num_kept, source)
    if out_k is None or out_v is None:
        dims = (source.batch, source.kv_heads, max_kept, source.head_dim)
        out_k, out_v = (torch.empty(dims, dtype=k.dtype, device=k.device) for _ in range(2))
    checks.tensor("out_k", out_k, k.dtype, (None, None, None, source.head_dim), k.device, contiguous=False)
    room = out_k.shape[2] if out_block_table is None else out_block_table.shape[-1] * out_k.shape[1]
    checks.integer("kept.shape[2]", max_kept, 0, room)
    target = view_kv(out_k, out_v, num_kept, out_block_table)
    apart = {k.data_ptr(), v.data_ptr()}.isdisjoint({out_k.data_ptr(), out_v.data_ptr()}) or not k.numel()
    checks.require(apart, "out_k", "k or v", "be other memory, as tiles are copied in any order", "use run_in_place")
    padded = next_power_of_2(source.head_dim)
    tile = COPY_ELEMENTS // padded
    launch(
        copy_kernel, (ceil_div(max_kept, tile), source.batch * source.kv_heads),
        k, v, out_k, out_v, k if block_table is None else block_table, k if out_block_table is None else out_block_table,
        kept, num_kept, source.kv_heads, max_kept, *source.strides, *target.strides,
        PAGED=source.paged, BLOCK_SIZE=source.block_size, OUT_PAGED=target.paged, OUT_BLOCK_SIZE=target.block_size,
        HEAD_DIM=source.head_dim, HEAD_DIM_PADDED=padded, TILE=tile,
    )  # fmt: skip
    return out_k, out_v


def run_in_place(
    k: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    num_kept: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows kept[sequence, head, i] of K and V become their rows i, in the same cache; arguments as `run`'s.

    kept must ascend in each head without repeats: checked on the CPU, relied upon on a GPU. Rows past num_kept hold remains.
    """
    view = view_kv(k, v, num_kept, block_table)
    max_kept = _check_kept(kept, num_kept, view)
    launch(
        in_place_kernel, (ceil_div(view.head_dim, SLICE_CHANNELS), view.batch * view.kv_heads, 2 if max_kept else 0),
        k, v, k if block_table is None else block_table, kept, num_kept, view.kv_heads, max_kept, *view.strides,
        PAGED=view.paged, BLOCK_SIZE=view.block_size, HEAD_DIM=view.head_dim, SLICE=SLICE_CHANNELS, TILE=IN_PLACE_TILE,
        num_warps=8,
    )  # fmt: skip
    return k, v


def run_moves(
    k: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    num_kept: torch.Tensor,
    *,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    metrics: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KV-Compress: survivors of each head's tail move into the holes before it, and the blocks behind are freed. In place.

    k, v: [blocks, block_size, 1, head_dim], paged per head. kept, num_kept: as `run`'s. lengths: tokens of each head before.
    metrics: fp32 and positions: int32, both [blocks, block_size], move with their slots. block_table: freed entries become -1.

    Returns (numbers of the freed blocks [block_table.numel()] int32, -1 past their count; the count, int32 [1]).
    """
    view = view_kv(k, v, num_kept, block_table)
    checks.tensor("block_table", block_table, torch.int32, (view.batch, view.kv_heads, None), k.device)
    checks.tensor("lengths", lengths, torch.int32, (view.batch, view.kv_heads), k.device)
    checks.tensor("metrics", metrics, torch.float32, tuple(k.shape[:2]), k.device)
    checks.tensor("positions", positions, torch.int32, tuple(k.shape[:2]), k.device)
    max_kept = _check_kept(kept, num_kept, view)
    rows, padded, size = view.batch * view.kv_heads, next_power_of_2(view.head_dim), view.block_size
    tile = MOVE_ELEMENTS // padded
    launch(
        move_kernel, (ceil_div(max_kept, tile), rows), k, v, metrics, positions, block_table, kept, num_kept,
        view.kv_heads, max_kept, *view.strides, size, 1, 0, SEARCH_STEPS=max_kept.bit_length(), BLOCK_SIZE=size,
        HEAD_DIM=view.head_dim, HEAD_DIM_PADDED=padded, TILE=tile,
    )  # fmt: skip
    num_freed = ((lengths + size - 1) // size - (num_kept + size - 1) // size).flatten()
    last_freed = num_freed.cumsum(0, dtype=torch.int32)
    freed = torch.full((block_table.numel(),), -1, dtype=torch.int32, device=k.device)
    launch(
        free_kernel, (rows,), block_table, lengths, num_kept, last_freed - num_freed, freed, block_table.shape[2],
        BLOCK_SIZE=size, TILE=FREE_TILE,
    )  # fmt: skip
    return freed, last_freed[-1:]


def _check_kept(kept: torch.Tensor, num_kept: torch.Tensor, view: CacheView) -> int:
    """Width of kept. Its values are looked at on the CPU only."""
    checks.tensor("kept", kept, torch.int32, (view.batch, view.kv_heads, None), num_kept.device)
    checks.tensor("num_kept", num_kept, torch.int32, (view.batch, view.kv_heads), kept.device)
    width = kept.shape[2]
    checks.integer("kept.shape[2]", width, 0, view.max_tokens)
    if kept.device.type == "cpu" and kept.numel():
        most = int(num_kept.max())
        checks.require(int(num_kept.min()) >= 0 and most <= width, "num_kept", most, f"lie in 0..{width}", "widen kept")
        used = torch.arange(width) < num_kept[..., None]
        inside = not ((kept < 0) | (kept >= view.max_tokens))[used].any()
        checks.require(inside, "kept", "past the cache", f"hold tokens in 0..{view.max_tokens - 1}", "check the selection")
        ascending = not (kept.diff(dim=2) <= 0)[used[..., 1:]].any()
        checks.require(ascending, "kept", "out of order", "ascend in each head without repeats", "sort it")
    return width


@dataclass(frozen=True, kw_only=True)
class Shape(CacheShape):
    """kept_frac of each head's tokens stay; the copy has the layout of the cache."""

    kept_frac: float = 0.25

    @property
    def kept_counts(self) -> list[int]:
        return [int(length * self.kept_frac) for length in self.pair_lengths()]


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Random rows; each head keeps a random subset of its own."""
    inputs = make_cache(shape, rng, device)
    counts = shape.kept_counts
    kept = np.full((len(counts), max(counts)), -1)
    for row, (length, count) in enumerate(zip(shape.pair_lengths(), counts, strict=True)):
        kept[row, :count] = np.sort(rng.permutation(length)[:count])
    pairs = (shape.batch, shape.kv_heads)
    copy = CacheShape(
        batch=shape.batch, kv_heads=shape.kv_heads, tokens=max(1, *counts), head_dim=shape.head_dim, dtype=shape.dtype,
        layout=shape.layout, block_size=shape.block_size,
    )  # fmt: skip
    out_table, num_blocks = make_block_table(copy, rng, device)
    dims = cache_dims(copy, num_blocks, shape.head_dim)
    out_k, out_v = (torch.empty(dims, dtype=shape.torch_dtype, device=device) for _ in range(2))
    return {
        "k": inputs["k"], "v": inputs["v"], "block_table": inputs["block_table"],
        "kept": torch.from_numpy(kept).to(torch.int32).reshape(*pairs, -1).to(device),
        "num_kept": torch.tensor(counts, dtype=torch.int32).reshape(pairs).to(device),
        "out_k": out_k, "out_v": out_v, "out_block_table": out_table,
    }  # fmt: skip


def bytes_moved(shape: Shape) -> float:
    """Kept K and V read and written once, and their int32 indices read."""
    return float(sum(shape.kept_counts) * (4 * shape.head_dim * shape.torch_dtype.itemsize + 4))


def flops(shape: Shape) -> float:
    """None: it copies."""
    return 0.0


TOLERANCE = {dtype: 0.0 for dtype in checks.HALF_DTYPES}
"""A copy is a copy, bit by bit."""


def compile_specs() -> list[CompileSpec]:
    specs = []
    for head_dim, layout in ((128, "contiguous"), (128, "paged"), (256, "paged_per_head"), (96, "paged")):
        inputs = make_inputs(Shape(tokens=64, head_dim=head_dim, layout=layout), np.random.default_rng(0))
        specs += recorded(f"copy d={head_dim} {layout}", lambda inputs=inputs: run(**inputs))
        same = {name: inputs[name] for name in ("k", "v", "kept", "num_kept", "block_table")}
        specs += recorded(f"in place d={head_dim} {layout}", lambda same=same: run_in_place(**same))
        if layout == "paged_per_head":
            slots = inputs["k"].shape[:2]
            metrics, positions = torch.zeros(slots), torch.zeros(slots, dtype=torch.int32)
            lengths = torch.full_like(inputs["num_kept"], 64)
            moved = {**same, "lengths": lengths, "metrics": metrics, "positions": positions}
            specs += recorded(f"moves d={head_dim}", lambda moved=moved: run_moves(**moved))
    return specs
