"""One query per sequence over its KV cache: split-KV flash decoding (Flash-Decoding, Dao et al. 2023; FlashAttention-2, arXiv
2307.08691) in all layouts, with a length for every head.

The query heads of a KV head form one tile (padded to 16 rows, the least that tensor cores take), so K and V are read once
however large the group is. A program walks over `split_tokens` tokens of one head; further splits of a head run beside it and a
second small kernel joins their results by log-sum-exp. Splits have a fixed number of tokens, not a share of the head's length, so
that ragged heads give even work; a program past its head's end returns at once. Neighbouring programs are neighbouring heads,
whose rows lie side by side in a paged cache. Tokens of a tile look up their blocks together, one stage of the pipeline ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels.layouts import CacheShape, CacheView, generator, make_cache, token_offsets, tokens_of, view_kv
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

NO_SCRATCH, PROBABILITIES, LOGITS = (tl.constexpr(i) for i in range(3))
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of output, relative to 1 + |output|: probabilities are rounded to the dtype before PV and the output after it, each by at most
one unit in the last place (2^-10, 2^-7; the interpreter truncates), of values whose mean absolute weight is below 1."""


@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, out_ptr, lse_ptr, scratch_ptr, tile_max_ptr,
    scale_log2, kv_heads, split_tokens, num_splits, max_slots,
    outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, PAGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, IS_SPLIT: tl.constexpr, SCRATCH: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """Output and log2-sum-exp of one split of one KV head's tokens; partial, in fp32, where IS_SPLIT.

    SCRATCH keeps what a policy's statistic needs, `[pairs, GROUP, max_slots]`: fp16 exp(logit − running maximum) and that
    maximum per tile (PROBABILITIES), or fp32 logits times log2(e) (LOGITS).
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    length = tl.load(lengths_ptr + pair)
    first = split * split_tokens
    if IS_SPLIT and first >= length:
        return
    end = tl.minimum(first + split_tokens, length)
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM_PADDED)
    in_group, in_head = row < GROUP, channel < HEAD_DIM
    q_offsets = (pair * GROUP + row)[:, None] * HEAD_DIM + channel[None, :]
    q_mask = in_group[:, None] & in_head[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM_PADDED], tl.float32)
    for start in range(first, end, TILE):
        token = start + tl.arange(0, TILE)
        exists = token < end
        offsets = token_offsets(
            token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )[:, None] + channel[None, :]  # fmt: skip
        mask = exists[:, None] & in_head[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        logits = dot(q, tl.trans(k), FP32_DOT) * scale_log2
        p, maximum, total, rescale = online_softmax(logits, exists, maximum, total)
        if SCRATCH != NO_SCRATCH:
            slots = scratch_ptr + (pair * GROUP + row)[:, None] * max_slots + token[None, :]
            kept = in_group[:, None] & exists[None, :]
            if SCRATCH == PROBABILITIES:
                tl.store(slots, p.to(tl.float16), mask=kept)
                tiles = tile_max_ptr + (pair * GROUP + row) * (max_slots // TILE) + start // TILE
                tl.store(tiles, maximum, mask=in_group)
            else:
                tl.store(slots, logits, mask=kept)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        acc = acc * rescale[:, None] + dot(p.to(v.dtype), v, FP32_DOT)
    store_result(out_ptr, lse_ptr, acc, maximum, total, row, channel, pair, split, num_splits, GROUP, HEAD_DIM, IS_SPLIT)


def tile_tokens(head_dim: int) -> int:
    """Tokens of a tile: K and V of 16 KiB each."""
    return 32 if head_dim > 128 else 64


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor | None,
    view: CacheView, scale: float, max_length: int, num_splits: int | None,
    scratch: torch.Tensor | None = None, tile_max: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch both kernels on checked arguments; `scratch` and `tile_max` are filled for a statistic."""  # fmt: skip
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tile = tile_tokens(view.head_dim)
    parts = partials_for(out, lse, view.kv_heads, *plan(view, max_length, num_splits, tile, q.device))
    kept = NO_SCRATCH if scratch is None else PROBABILITIES if tile_max is not None else LOGITS
    launch(
        split_kernel, (view.batch * view.kv_heads, parts.num_splits), q, k, v, block_table, lengths,
        parts.out, parts.lse, scratch, tile_max, scale * LOG2_E.value, view.kv_heads, parts.split_tokens, parts.num_splits,
        0 if scratch is None else scratch.shape[-1], *view.strides,
        GROUP=q.shape[1] // view.kv_heads, HEAD_DIM=view.head_dim, HEAD_DIM_PADDED=next_power_of_2(view.head_dim),
        PAGED=view.paged, BLOCK_SIZE=view.block_size, TILE=tile, IS_SPLIT=parts.num_splits > 1, SCRATCH=kept.value,
        FP32_DOT=INTERPRETED, num_warps=num_warps(view.head_dim), num_stages=num_stages(view.paged),
    )  # fmt: skip
    join(parts, lengths, out, lse)
    return out, lse


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor | None = None,
    scale: float | None = None, max_length: int | None = None, num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per sequence over the cache.

    q: fp16 or bf16 `[batch, q_heads, head_dim]`; k, v, lengths, block_table: as in `kvsim.kernels.layouts`.
    scale: of the logits; 1/√head_dim by default.
    max_length: longest length where the host knows it: splits are chosen for it; results do not depend on it.
    Returns the output `[batch, q_heads, head_dim]` in q's dtype (0 for an empty head) and the natural log-sum-exp of the scaled
    logits, fp32 `[batch, q_heads]` (−inf for an empty head). Raises ValueError before any launch, TritonUnavailable.
    """  # fmt: skip
    view = view_kv(k, v, lengths, block_table)
    _, scale, length = check_arguments(q, view, k.dtype, k.device, scale, max_length, num_splits)
    return attend(q, k, v, lengths, block_table, view, scale, length, num_splits)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor | None = None,
    scale: float | None = None, **_unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, head by head."""  # fmt: skip
    scale = scale or 1 / math.sqrt(q.shape[2])
    group = q.shape[1] // lengths.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64, device=q.device)
    for batch, head in np.ndindex(*lengths.shape):
        length = int(lengths[batch, head])
        if length:
            keys = tokens_of(k, block_table, batch, head, length).double()
            values = tokens_of(v, block_table, batch, head, length).double()
            rows = slice(head * group, (head + 1) * group)
            logits = q[batch, rows].double() @ keys.T * scale
            lse[batch, rows] = logits.logsumexp(1)
            out[batch, rows] = logits.softmax(1) @ values
    return out, lse


@dataclass(frozen=True, kw_only=True)
class Shape(CacheShape):
    """A cache and the query heads of each of its KV heads."""

    group: int = 4


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device) -> dict[str, Any]:
    """Arguments of `run` and `reference`: standard normal q, K and V."""
    gen = generator(rng, device)
    dims = (shape.batch, shape.kv_heads * shape.group, shape.head_dim)
    return {"q": torch.randn(dims, generator=gen, device=device, dtype=shape.torch_dtype), **make_cache(shape, rng, device)}


def bytes_moved(shape: Shape) -> int:
    """K, V and block table read; q read, output and log-sum-exp written; parts of splits written and read."""
    pairs, rows = shape.batch * shape.kv_heads, shape.batch * shape.kv_heads * shape.group
    total = sum(shape.pair_lengths())
    table = 0 if shape.layout == "contiguous" else sum(4 * ceil_div(n, shape.block_size) for n in shape.pair_lengths())
    parts = parts_bytes(pairs, shape.group, shape.head_dim, shape.tokens, tile_tokens(shape.head_dim))
    return 2 * total * shape.head_dim * 2 + table + rows * (2 * shape.head_dim * 2 + 4) + parts


def flops(shape: Shape) -> int:
    """QKᵀ and PV: 4 · head_dim a query head and token, padding not counted."""
    return 4 * shape.head_dim * shape.group * sum(shape.pair_lengths())


def compile_specs() -> list[CompileSpec]:
    """Launches to compile ahead of time: every head_dim, both kinds of layout, both dtypes, with and without splits."""
    shapes = [
        Shape(batch=2, kv_heads=8, tokens=1024, head_dim=head_dim, dtype=dtype, layout=layout, group=group)
        for head_dim, dtype, layout, group in (
            (64, "float16", "paged", 1), (80, "bfloat16", "contiguous", 4), (96, "float16", "paged_per_head", 4),
            (128, "bfloat16", "paged", 8), (128, "float16", "contiguous", 16), (256, "bfloat16", "paged", 4),
        )
    ]  # fmt: skip
    specs = [spec for shape in shapes for spec in specs_of(_label(shape), run, make_inputs, shape)]
    single = Shape(batch=64, kv_heads=8, tokens=128, layout="paged", group=8)
    return specs + specs_of(_label(single), run, make_inputs, single, num_splits=1)


def _label(shape: Shape) -> str:
    return f"{shape.dtype} d{shape.head_dim} {shape.layout} group {shape.group}"
