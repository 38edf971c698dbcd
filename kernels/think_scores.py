"""ThinK's score of each key channel: ‖q_j‖ · ‖k_j‖ over the last queries and the prompt's keys (arXiv 2407.21018).

‖Q[:, j] · K[:, j]ᵀ‖_F of the paper is the product of two column norms, so one read of K serves. Key columns are squared and
summed by parts of PART_TOKENS tokens, then a second small kernel adds the parts, takes roots and multiplies by the queries'.

Reduction over the query heads of a KV head's group: `mean` of the heads' scores (the production form, policies.md), `rms`, the
root of the mean square (kvpress' convention up to a square, which keeps order), or `none`: a score per query head, as the
authors' code after repeat_kv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks
from kvsim.kernels.layouts import CacheShape, generator, make_cache, token_offsets, tokens_of, view_cache
from kvsim.kernels.runtime import CompileSpec, ceil_div, launch, next_power_of_2, recorded

RUN_DTYPES = (*checks.HALF_DTYPES, torch.float32)
"""fp32 is for checks against models that run in it."""
REDUCTIONS = ("mean", "rms", "none")
PART_TOKENS = 512
KEY_TILE_ELEMENTS, QUERY_TILE_ELEMENTS = 8192, 2048


@triton.jit
def key_squares_kernel(
    k_ptr, table_ptr, lengths_ptr, parts_ptr, kv_heads, num_parts,
    outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    PART: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums of squares of each channel over PART tokens of one head."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    end = tl.minimum((part + 1) * PART, tl.load(lengths_ptr + row))
    channel = tl.arange(0, HEAD_DIM_PADDED)
    in_head = channel < HEAD_DIM
    sums = tl.zeros([TILE, HEAD_DIM_PADDED], tl.float32)
    for start in range(part * PART, end, TILE):
        token = start + tl.arange(0, TILE)
        offsets = token_offsets(
            token, token < end, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        mask = (token < end)[:, None] & in_head[None, :]
        keys = tl.load(k_ptr + offsets[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += keys * keys
    tl.store(parts_ptr + (row * num_parts + part) * HEAD_DIM + channel, tl.sum(sums, 0), mask=in_head)


@triton.jit
def channel_scores_kernel(
    q_ptr, parts_ptr, lengths_ptr, scores_ptr, kv_heads, num_parts, num_queries, q_stride_batch, q_stride_head, q_stride_query,
    GROUP: tl.constexpr, REDUCTION: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    last_queries = tl.minimum(num_queries, tl.load(lengths_ptr + row))
    channel = tl.arange(0, HEAD_DIM_PADDED)
    in_head = channel < HEAD_DIM
    index = tl.arange(0, TILE)
    squares = tl.zeros([TILE, HEAD_DIM_PADDED], tl.float32)
    for start in range(0, num_parts, TILE):
        part = start + index
        pointers = parts_ptr + (row * num_parts + part)[:, None] * HEAD_DIM + channel[None, :]
        squares += tl.load(pointers, mask=(part < num_parts)[:, None] & in_head[None, :], other=0.0)
    key_norm = tl.sqrt(tl.sum(squares, 0))
    reduced = tl.zeros([HEAD_DIM_PADDED], tl.float32)
    for member in tl.static_range(GROUP):
        q_head = head * GROUP + member
        squares = tl.zeros([TILE, HEAD_DIM_PADDED], tl.float32)
        for start in range(0, last_queries, TILE):
            query = start + index
            query_rows = q_ptr + batch * q_stride_batch + q_head * q_stride_head + query[:, None] * q_stride_query
            mask = (query < last_queries)[:, None] & in_head[None, :]
            queries = tl.load(query_rows + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            squares += queries * queries
        square = tl.sum(squares, 0)
        if REDUCTION == 0:
            reduced += tl.sqrt(square) * (1.0 / GROUP)
        elif REDUCTION == 1:
            reduced += square * (1.0 / GROUP)
        else:
            own_scores = scores_ptr + (row * GROUP + member) * HEAD_DIM + channel
            tl.store(own_scores, tl.sqrt(square) * key_norm, mask=in_head)
    if REDUCTION == 0:
        tl.store(scores_ptr + row * HEAD_DIM + channel, reduced * key_norm, mask=in_head)
    elif REDUCTION == 1:
        tl.store(scores_ptr + row * HEAD_DIM + channel, tl.sqrt(reduced) * key_norm, mask=in_head)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    lengths: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """float64 scores [batch, heads, head_dim]: the Frobenius norm as the paper writes it, of each channel's product."""
    q_heads, num_queries, head_dim = q.shape[1:]
    batch, kv_heads = lengths.shape
    group = q_heads // kv_heads
    scores = torch.zeros(batch, q_heads, head_dim, dtype=torch.float64, device=q.device)
    for sequence in range(batch):
        for q_head in range(q_heads):
            length = int(lengths[sequence, q_head // group])
            queries = q[sequence, q_head, : min(num_queries, length)].double()
            keys = tokens_of(k, block_table, sequence, q_head // group, length).double()
            for channel in range(head_dim):
                scores[sequence, q_head, channel] = torch.outer(queries[:, channel], keys[:, channel]).norm()
    if reduction == "none":
        return scores
    grouped = scores.view(batch, kv_heads, group, head_dim)
    return grouped.mean(2) if reduction == "mean" else grouped.square().mean(2).sqrt()


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    lengths: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Scores of the key channels, fp32: [batch, kv_heads, head_dim], or [batch, q_heads, head_dim] for reduction "none".

    q: [batch, q_heads, num_queries, head_dim], the last of each sequence (paper: 32); of a head with fewer tokens, the first
    `length`. k, lengths, block_table: keys of a cache (kvsim.kernels.layouts). An empty head's scores are 0.
    """
    checks.tensor("k", k, RUN_DTYPES, (None, None, None, None), contiguous=False)
    view = view_cache("k", k, lengths, block_table)
    checks.head_dim(view.head_dim)
    checks.tensor("q", q, k.dtype, (view.batch, None, None, view.head_dim), k.device, contiguous=False)
    checks.last_dim_dense("q", q)
    q_heads, num_queries = q.shape[1:3]
    group = checks.group_of(q_heads, view.kv_heads)
    checks.choice("reduction", reduction, REDUCTIONS)
    rows, num_parts, padded = view.batch * view.kv_heads, ceil_div(view.max_tokens, PART_TOKENS), next_power_of_2(view.head_dim)
    heads = q_heads if reduction == "none" else view.kv_heads
    parts = torch.empty(rows, num_parts, view.head_dim, dtype=torch.float32, device=k.device)
    scores = torch.empty(view.batch, heads, view.head_dim, dtype=torch.float32, device=k.device)
    launch(
        key_squares_kernel, (num_parts, rows), k, k if block_table is None else block_table, lengths, parts,
        view.kv_heads, num_parts, *view.strides, PAGED=view.paged, BLOCK_SIZE=view.block_size,
        HEAD_DIM=view.head_dim, HEAD_DIM_PADDED=padded, PART=PART_TOKENS, TILE=KEY_TILE_ELEMENTS // padded,
    )  # fmt: skip
    launch(
        channel_scores_kernel, (rows,), q, parts, lengths, scores, view.kv_heads, num_parts, num_queries, *q.stride()[:3],
        GROUP=group, REDUCTION=REDUCTIONS.index(reduction), HEAD_DIM=view.head_dim, HEAD_DIM_PADDED=padded,
        TILE=QUERY_TILE_ELEMENTS // padded,
    )  # fmt: skip
    return scores


@dataclass(frozen=True, kw_only=True)
class Shape(CacheShape):
    group: int = 4
    num_queries: int = 32
    reduction: str = "mean"


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Keys whose channels differ in size, as real ones do."""
    inputs = make_cache(shape, rng, device)
    gen = generator(rng, device)
    k = inputs["k"] * (4 * torch.rand(shape.head_dim, generator=gen, device=device) + 0.1)
    size = (shape.batch, shape.kv_heads * shape.group, shape.num_queries, shape.head_dim)
    q = torch.randn(size, generator=gen, device=device, dtype=shape.torch_dtype)
    return {
        "q": q, "k": k.to(shape.torch_dtype), "lengths": inputs["lengths"], "block_table": inputs["block_table"],
        "reduction": shape.reduction,
    }  # fmt: skip


def bytes_moved(shape: Shape) -> float:
    """One read of K and of the queries; sums of parts written and read, scores written."""
    heads, element = shape.batch * shape.kv_heads, shape.torch_dtype.itemsize
    reads = element * (sum(shape.pair_lengths()) + heads * shape.group * shape.num_queries)
    sums = 4 * heads * (2 * -(-shape.tokens // PART_TOKENS) + (shape.group if shape.reduction == "none" else 1))
    return float(shape.head_dim * (reads + sums))


def flops(shape: Shape) -> float:
    """A square and a sum for each element of K (2·n·Hkv·d, policies.md) and of the queries."""
    rows = sum(shape.pair_lengths()) + shape.batch * shape.kv_heads * shape.group * shape.num_queries
    return 2.0 * shape.head_dim * rows


TOLERANCE = {torch.float16: 1e-5, torch.bfloat16: 1e-5, torch.float32: 1e-5}
"""Relative: sums of positive squares in fp32, some 100 roundings of 2^-24 one after another, halved by the root."""


def compile_specs() -> list[CompileSpec]:
    specs = []
    for head_dim, group, reduction, layout in (
        (128, 4, "mean", "paged"), (256, 16, "rms", "contiguous"), (96, 2, "none", "contiguous"),
    ):  # fmt: skip
        shape = Shape(tokens=1024, head_dim=head_dim, group=group, reduction=reduction, layout=layout)
        inputs = make_inputs(shape, np.random.default_rng(0))
        specs += recorded(f"{reduction} d={head_dim} group {group} {layout}", lambda inputs=inputs: run(**inputs))
    return specs
