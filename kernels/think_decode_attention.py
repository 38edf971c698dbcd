"""Decode attention over ThinK's split keys (arXiv 2407.21018): pruned channels for the prompt, full keys for what is recent.

A head's first `pruned_lengths` tokens have the kept channels of their keys only (a table of T channels per head, stored in
T rounded up to 16, as `think_gather` writes them); the newest of the prompt and all generated tokens have full keys. Values are
full. The query's kept channels are gathered once per program, so the pruned loop reads no index. Logits are divided by
√head_dim, not √T: pruning drops terms of the same sum. Splits and joining are those of `decode_attention`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks, decode_attention
from kvsim.kernels.layouts import CacheShape, generator, make_cache, token_offsets, tokens_of, view_cache
from kvsim.kernels.runtime import INTERPRETED, CompileSpec, ceil_div, dot, launch, next_power_of_2, specs_of
from kvsim.kernels.splits import (
    LOG2_E,
    ROWS,
    check_arguments,
    join,
    num_stages,
    num_warps,
    online_softmax,
    partials_for,
    parts_bytes,
    plan,
    store_result,
)

CHANNEL_TILE = 16
"""Stored channels are a multiple of it: 32 bytes, a sector (policies.md, ThinK)."""
TOLERANCE = decode_attention.TOLERANCE


@triton.jit
def think_split_kernel(
    q_ptr, pruned_ptr, recent_ptr, v_ptr, channels_ptr, table_ptr, recent_table_ptr, pruned_lengths_ptr, recent_lengths_ptr,
    out_ptr, lse_ptr, scale_log2, kv_heads, split_tokens, num_splits,
    pruned_outer, pruned_token, pruned_head, table_stride_batch, table_stride_head,
    recent_outer, recent_token, recent_head, recent_table_stride_batch, recent_table_stride_head,
    v_outer, v_token, v_head,
    GROUP: tl.constexpr, KEPT: tl.constexpr, STORED: tl.constexpr, STORED_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr, PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, RECENT_BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, IS_SPLIT: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """One split of one KV head: tokens with pruned keys first, then those with full keys."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    num_pruned = tl.load(pruned_lengths_ptr + pair)
    length = num_pruned + tl.load(recent_lengths_ptr + pair)
    first = split * split_tokens
    if IS_SPLIT and first >= length:
        return
    end = tl.minimum(first + split_tokens, length)
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM_PADDED)
    in_group, in_head = row < GROUP, channel < HEAD_DIM
    q_rows = q_ptr + (pair * GROUP + row)[:, None] * HEAD_DIM
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM_PADDED], tl.float32)

    slot = tl.arange(0, STORED_PADDED)
    kept = tl.load(channels_ptr + pair * KEPT + slot, mask=slot < KEPT, other=0)
    q_kept = tl.load(q_rows + kept[None, :], mask=in_group[:, None] & (slot < KEPT)[None, :], other=0.0)
    pruned_end = tl.minimum(end, num_pruned)
    for start in range(first, pruned_end, TILE):
        token = start + tl.arange(0, TILE)
        exists = token < pruned_end
        offsets = token_offsets(
            token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            pruned_outer, pruned_token, pruned_head, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        mask = exists[:, None] & (slot < STORED)[None, :]
        k = tl.load(pruned_ptr + offsets[:, None] + slot[None, :], mask=mask, other=0.0)
        logits = dot(q_kept, tl.trans(k), FP32_DOT) * scale_log2
        p, maximum, total, rescale = online_softmax(logits, exists, maximum, total)
        v_offsets = token_offsets(
            token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            v_outer, v_token, v_head, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        v = tl.load(v_ptr + v_offsets[:, None] + channel[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)
        acc = acc * rescale[:, None] + dot(p.to(v.dtype), v, FP32_DOT)

    q = tl.load(q_rows + channel[None, :], mask=in_group[:, None] & in_head[None, :], other=0.0)
    for start in range(tl.maximum(first, num_pruned), end, TILE):
        token = start + tl.arange(0, TILE)
        exists = token < end
        offsets = token_offsets(
            token - num_pruned, exists, batch, head, recent_table_ptr, recent_table_stride_batch, recent_table_stride_head,
            recent_outer, recent_token, recent_head, PAGED, RECENT_BLOCK_SIZE,
        )  # fmt: skip
        mask = exists[:, None] & in_head[None, :]
        k = tl.load(recent_ptr + offsets[:, None] + channel[None, :], mask=mask, other=0.0)
        logits = dot(q, tl.trans(k), FP32_DOT) * scale_log2
        p, maximum, total, rescale = online_softmax(logits, exists, maximum, total)
        v_offsets = token_offsets(
            token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            v_outer, v_token, v_head, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        v = tl.load(v_ptr + v_offsets[:, None] + channel[None, :], mask=mask, other=0.0)
        acc = acc * rescale[:, None] + dot(p.to(v.dtype), v, FP32_DOT)
    store_result(out_ptr, lse_ptr, acc, maximum, total, row, channel, pair, split, num_splits, GROUP, HEAD_DIM, IS_SPLIT)


def run(
    q: torch.Tensor, pruned_k: torch.Tensor, recent_k: torch.Tensor, v: torch.Tensor, channels: torch.Tensor,
    pruned_lengths: torch.Tensor, recent_lengths: torch.Tensor, block_table: torch.Tensor | None = None,
    recent_block_table: torch.Tensor | None = None, scale: float | None = None, max_length: int | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per sequence over pruned and recent keys and all values.

    q: fp16 or bf16 `[batch, q_heads, head_dim]`. v: values of all tokens, in a layout of `kvsim.kernels.layouts` with `block_table`.
    pruned_k: the same layout and table, rows of T rounded up to 16 channels whose padding is finite. recent_k: full keys of the
    tokens past `pruned_lengths`, the first in slot 0, with a table of its own. channels: int32 `[batch, kv_heads, T]`, the kept
    channels of each head; what it holds is not checked. pruned_lengths, recent_lengths: int32 `[batch, kv_heads]`; a head's length
    is their sum.
    scale, max_length and returns: as in `decode_attention.run`. Raises ValueError before any launch, TritonUnavailable.
    """  # fmt: skip
    for name, tensor in (("pruned_k", pruned_k), ("recent_k", recent_k), ("v", v)):
        checks.tensor(name, tensor, checks.HALF_DTYPES if name == "pruned_k" else pruned_k.dtype, contiguous=False)
    checks.tensor("recent_lengths", recent_lengths, torch.int32, tuple(pruned_lengths.shape), q.device)
    view = view_cache("v", v, pruned_lengths + recent_lengths if v.device.type == "cpu" else pruned_lengths, block_table)
    pruned = view_cache("pruned_k", pruned_k, pruned_lengths, block_table)
    recent = view_cache("recent_k", recent_k, recent_lengths, recent_block_table)
    group, scale, length = check_arguments(q, view, pruned_k.dtype, v.device, scale, max_length, num_splits)
    checks.require(recent.head_dim == view.head_dim, "recent_k.shape[3]", recent.head_dim, f"be {view.head_dim}, as in v", "pass full keys")
    checks.require(
        recent.paged == view.paged, "recent_block_table", recent_block_table, "be given exactly where block_table is", "use one layout"
    )  # fmt: skip
    checks.require(
        pruned.block_size == view.block_size, "pruned_k.shape[1]", pruned.block_size, f"be v's block size {view.block_size}",
        "let them share blocks",
    )  # fmt: skip
    checks.tensor("channels", channels, torch.int32, (view.batch, view.kv_heads, None), q.device)
    num_kept = channels.shape[2]
    checks.budget("channels.shape[2]", num_kept, view.head_dim)
    stored = ceil_div(num_kept, CHANNEL_TILE) * CHANNEL_TILE
    checks.require(
        pruned.head_dim == stored, "pruned_k.shape[3]", pruned.head_dim, f"be {stored}, T={num_kept} in whole tiles of 16", "pad rows"
    )  # fmt: skip

    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tile = decode_attention.tile_tokens(view.head_dim)
    parts = partials_for(out, lse, view.kv_heads, *plan(view, length, num_splits, tile, q.device))
    launch(
        think_split_kernel, (view.batch * view.kv_heads, parts.num_splits), q, pruned_k, recent_k, v, channels, block_table,
        recent_block_table, pruned_lengths, recent_lengths, parts.out, parts.lse, scale * LOG2_E.value, view.kv_heads,
        parts.split_tokens, parts.num_splits, *pruned.strides, *recent.strides, *view.strides[:3],
        GROUP=group, KEPT=num_kept, STORED=stored, STORED_PADDED=next_power_of_2(stored), HEAD_DIM=view.head_dim,
        HEAD_DIM_PADDED=next_power_of_2(view.head_dim), PAGED=view.paged, BLOCK_SIZE=view.block_size,
        RECENT_BLOCK_SIZE=recent.block_size, TILE=tile, IS_SPLIT=parts.num_splits > 1, FP32_DOT=INTERPRETED,
        num_warps=num_warps(view.head_dim), num_stages=num_stages(view.paged),
    )  # fmt: skip
    join(parts, pruned_lengths, out, lse, recent_lengths)
    return out, lse


def reference(
    q: torch.Tensor, pruned_k: torch.Tensor, recent_k: torch.Tensor, v: torch.Tensor, channels: torch.Tensor,
    pruned_lengths: torch.Tensor, recent_lengths: torch.Tensor, block_table: torch.Tensor | None = None,
    recent_block_table: torch.Tensor | None = None, scale: float | None = None, **_unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64: pruned channels put back as zeros, then plain attention."""  # fmt: skip
    batch_size, kv_heads = pruned_lengths.shape
    group, head_dim = q.shape[1] // kv_heads, q.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64, device=q.device)
    for batch, head in np.ndindex(batch_size, kv_heads):
        num_pruned, num_recent = int(pruned_lengths[batch, head]), int(recent_lengths[batch, head])
        if num_pruned + num_recent:
            keys = torch.zeros(num_pruned + num_recent, head_dim, dtype=torch.float64, device=q.device)
            kept = channels[batch, head].long()
            keys[:num_pruned, kept] = tokens_of(pruned_k, block_table, batch, head, num_pruned)[:, : len(kept)].double()
            keys[num_pruned:] = tokens_of(recent_k, recent_block_table, batch, head, num_recent).double()
            values = tokens_of(v, block_table, batch, head, num_pruned + num_recent).double()
            rows = slice(head * group, (head + 1) * group)
            logits = q[batch, rows].double() @ keys.T * (scale or 1 / math.sqrt(head_dim))
            lse[batch, rows] = logits.logsumexp(1)
            out[batch, rows] = logits.softmax(1) @ values
    return out, lse


@dataclass(frozen=True, kw_only=True)
class Shape(decode_attention.Shape):
    """`tokens` are all of a head's; of these the newest `recent_tokens` have full keys, the others `kept_channels`."""

    kept_channels: int = 77
    recent_tokens: int = 32

    @property
    def stored_channels(self) -> int:
        return ceil_div(self.kept_channels, CHANNEL_TILE) * CHANNEL_TILE

    def recent_lengths(self) -> list[int]:
        return [min(length, self.recent_tokens) for length in self.pair_lengths()]


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device) -> dict[str, Any]:
    """Standard normal numbers; zeros in the padding of pruned rows; a random ascending set of channels for each head."""
    cache = make_cache(shape, rng, device)
    recent_shape = CacheShape(
        batch=shape.batch, kv_heads=shape.kv_heads, tokens=max(1, shape.recent_tokens), head_dim=shape.head_dim, dtype=shape.dtype,
        layout=shape.layout, block_size=shape.block_size,
    )  # fmt: skip
    recent = make_cache(recent_shape, rng, device)
    pruned_k = cache["k"][..., : shape.stored_channels].clone()
    pruned_k[..., shape.kept_channels :] = 0
    order = np.argsort(rng.random((shape.batch, shape.kv_heads, shape.head_dim)), axis=-1)[..., : shape.kept_channels]
    dims = (shape.batch, shape.kv_heads * shape.group, shape.head_dim)
    recent_lengths = torch.tensor(shape.recent_lengths(), dtype=torch.int32, device=device).reshape(shape.batch, shape.kv_heads)
    return {
        "q": torch.randn(dims, generator=generator(rng, device), device=device, dtype=shape.torch_dtype),
        "pruned_k": pruned_k,
        "recent_k": recent["k"],
        "v": cache["v"],
        "channels": torch.from_numpy(np.sort(order, axis=-1)).to(torch.int32).to(device),
        "pruned_lengths": cache["lengths"] - recent_lengths,
        "recent_lengths": recent_lengths,
        "block_table": cache["block_table"],
        "recent_block_table": recent["block_table"],
    }


def bytes_moved(shape: Shape) -> int:
    """Stored channels of pruned keys, full recent keys, all values; q, output, log-sum-exp, channels, block tables, parts."""
    total, recent = sum(shape.pair_lengths()), sum(shape.recent_lengths())
    pairs, rows = shape.batch * shape.kv_heads, shape.batch * shape.kv_heads * shape.group
    elements = (total - recent) * shape.stored_channels + (recent + total) * shape.head_dim + 2 * rows * shape.head_dim
    table = 0
    if shape.layout != "contiguous":
        lengths = (*shape.pair_lengths(), *shape.recent_lengths())
        table = sum(4 * ceil_div(length, shape.block_size) for length in lengths)
    tile = decode_attention.tile_tokens(shape.head_dim)
    parts = parts_bytes(pairs, shape.group, shape.head_dim, shape.tokens, tile)
    return 2 * elements + 4 * rows + 4 * pairs * shape.kept_channels + table + parts


def flops(shape: Shape) -> int:
    """QKᵀ over stored channels or all of them, and PV."""
    total, recent = sum(shape.pair_lengths()), sum(shape.recent_lengths())
    return 2 * shape.group * ((total - recent) * shape.stored_channels + (recent + total) * shape.head_dim)


def compile_specs() -> list[CompileSpec]:
    """Launches to compile ahead of time: λ = 0.4 and 0.5, both kinds of layout, both dtypes."""
    cases = ((128, 77, "bfloat16", "paged", 4), (128, 64, "float16", "contiguous", 8), (64, 39, "bfloat16", "paged", 1),
             (256, 154, "float16", "paged", 4), (80, 48, "float16", "contiguous", 16))  # fmt: skip
    shapes = [
        Shape(batch=2, kv_heads=8, tokens=1024, head_dim=dim, kept_channels=kept, dtype=dtype, layout=layout, group=group)
        for dim, kept, dtype, layout, group in cases
    ]
    return [spec for shape in shapes for spec in specs_of(_label(shape), run, make_inputs, shape)]


def _label(shape: Shape) -> str:
    return f"{shape.dtype} d{shape.head_dim} kept {shape.kept_channels} {shape.layout} group {shape.group}"
