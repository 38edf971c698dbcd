"""Column statistics of causal attention: what each key received from all queries of a prompt, or from the last few.

FlashAttention never keeps its probabilities, so a policy that scores tokens by them recomputes QKᵀ. Given each row's
log-sum-exp, a probability is one exponential of one logit: a program owns a tile of key columns, walks over the queries
that may see them and adds up. No atomics, so results repeat bit by bit, and O(tokens) memory.

| statistic | a key's score is | used by |
|---|---|---|
| sum | Σ p | H2O (all queries); SnapKV, PyramidKV, AdaKV (last w queries, pooled) |
| square | Σ p² | KV-Compress (last 8 queries, max-pool 7) |
| gumbel | Σ softmax((x + ζ)/τ) | Keyformer (all queries); its row log-sum-exp is computed here, by a pass of its own |
| count | Σ [p > 1/t], t the keys a query sees | Scissorhands (last 400 queries) |

Sums run over the query heads of a KV head's group too (or are their mean). Queries are the last ones of each sequence: of a
head with `length` tokens, query i of the tensor sits at position i + max(0, length − num_queries).
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
from kvsim.kernels.noise import gumbel_noise, gumbel_reference
from kvsim.kernels.runtime import INTERPRETED, CompileSpec, ceil_div, launch, next_power_of_2, recorded

STATISTICS = ("sum", "square", "gumbel", "count")
POOLINGS = ("none", "mean", "max")
SUM, SQUARE, GUMBEL, COUNT = (tl.constexpr(i) for i in range(4))
RUN_DTYPES = (*checks.HALF_DTYPES, torch.float32)
"""fp32 is for checks against models that run in it: its products take no tensor cores."""
POOL_TILE = 1024
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _product(a, b, FP32_DOT: tl.constexpr):
    """a @ b summed in fp32. FP32_DOT: the interpreter's product of bf16 tiles is wrong, and fp32 keys must not become tf32."""
    if FP32_DOT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _probabilities(logits, log_sum_exp):
    return tl.exp2((logits - log_sum_exp) * LOG2_E)


@triton.jit
def column_kernel(
    q_ptr, k_ptr, table_ptr, lse_ptr, lengths_ptr, scores_ptr,
    scale, inverse_temperature, seed, factor, num_queries, max_tokens, kv_heads,
    q_stride_batch, q_stride_head, q_stride_query,
    outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, STATISTIC: tl.constexpr,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, TILE_ROWS: tl.constexpr,
    FP32_DOT: tl.constexpr,
):  # fmt: skip
    """Scores of TILE_KEYS keys of one KV head. A row is a (query, head of the group) pair, queries outermost."""
    first_key = tl.program_id(0) * TILE_KEYS
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    length = tl.load(lengths_ptr + row)
    key = first_key + tl.arange(0, TILE_KEYS)
    sums = tl.zeros([TILE_KEYS], tl.float32)
    if first_key < length:
        channel = tl.arange(0, HEAD_DIM_PADDED)
        in_head = channel < HEAD_DIM
        key_offsets = token_offsets(
            key, key < length, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        k = tl.load(
            k_ptr + key_offsets[:, None] + channel[None, :], mask=(key < length)[:, None] & in_head[None, :], other=0.0
        )
        first_position = tl.maximum(length - num_queries, 0)
        num_rows = tl.minimum(num_queries, length) * GROUP
        # Queries before the tile's first key see none of it.
        first_row = tl.maximum(first_key - first_position, 0) * GROUP // TILE_ROWS * TILE_ROWS
        for start in range(first_row, num_rows, TILE_ROWS):
            index = start + tl.arange(0, TILE_ROWS)
            exists = index < num_rows
            query, q_head = index // GROUP, head * GROUP + index % GROUP
            q_offsets = batch * q_stride_batch + q_head * q_stride_head + query * q_stride_query
            q = tl.load(q_ptr + q_offsets[None, :] + channel[:, None], mask=exists[None, :] & in_head[:, None], other=0.0)
            position = first_position + query
            visible = exists[None, :] & (key[:, None] <= position[None, :])
            lse_offsets = (batch * kv_heads * GROUP + q_head) * num_queries + query
            lse = tl.load(lse_ptr + lse_offsets, mask=exists, other=0.0)
            logits = _product(k, q, FP32_DOT) * scale
            if STATISTIC == GUMBEL:
                noise = gumbel_noise(seed, key[:, None], position[None, :], (batch * kv_heads * GROUP + q_head)[None, :])
                logits = (logits + noise) * inverse_temperature
            p = tl.where(visible, _probabilities(logits, lse[None, :]), 0.0)
            if STATISTIC == SQUARE:
                p = p * p
            if STATISTIC == COUNT:
                p = tl.where(visible & (p * (position[None, :] + 1).to(tl.float32) > 1.0), 1.0, 0.0)
            sums += tl.sum(p, 1)
    tl.store(scores_ptr + row * max_tokens + key, sums * factor, mask=key < max_tokens)


@triton.jit
def row_lse_kernel(
    q_ptr, k_ptr, table_ptr, lse_ptr, lengths_ptr,
    scale, inverse_temperature, seed, num_queries, kv_heads,
    q_stride_batch, q_stride_head, q_stride_query,
    outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, NOISY: tl.constexpr,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, TILE_ROWS: tl.constexpr,
    FP32_DOT: tl.constexpr,
):  # fmt: skip
    """log Σ exp of TILE_ROWS rows over the keys each may see; rows of queries that a head has not got get 0."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    length = tl.load(lengths_ptr + row)
    index = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    num_rows = tl.minimum(num_queries, length) * GROUP
    exists = index < num_rows
    query, q_head = index // GROUP, head * GROUP + index % GROUP
    channel = tl.arange(0, HEAD_DIM_PADDED)
    in_head = channel < HEAD_DIM
    q_offsets = batch * q_stride_batch + q_head * q_stride_head + query * q_stride_query
    q = tl.load(q_ptr + q_offsets[:, None] + channel[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)
    position = tl.maximum(length - num_queries, 0) + query
    highest = tl.full([TILE_ROWS], -1.0e30, tl.float32)  # finite, so that an empty row makes no NaN
    total = tl.zeros([TILE_ROWS], tl.float32)
    for start in range(0, tl.max(tl.where(exists, position + 1, 0), 0), TILE_KEYS):
        key = start + tl.arange(0, TILE_KEYS)
        key_offsets = token_offsets(
            key, key < length, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        k = tl.load(
            k_ptr + key_offsets[None, :] + channel[:, None], mask=(key < length)[None, :] & in_head[:, None], other=0.0
        )
        logits = _product(q, k, FP32_DOT) * scale
        if NOISY:
            noise = gumbel_noise(seed, key[None, :], position[:, None], (batch * kv_heads * GROUP + q_head)[:, None])
            logits = (logits + noise) * inverse_temperature
        visible = exists[:, None] & (key[None, :] <= position[:, None])
        logits = tl.where(visible, logits, -1.0e30)
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.where(visible, tl.exp2((logits - higher[:, None]) * LOG2_E), 0.0)
        total = total * tl.exp2((highest - higher) * LOG2_E) + tl.sum(weights, 1)
        highest = higher
    lse = tl.where(exists, highest + tl.log(tl.where(exists, total, 1.0)), 0.0)
    lse_offsets = (batch * kv_heads * GROUP + q_head) * num_queries + query
    tl.store(lse_ptr + lse_offsets, lse, mask=index < num_queries * GROUP)


@triton.jit
def pool_kernel(
    scores_ptr, pooled_ptr, lengths_ptr, max_tokens, num_unpooled,
    WIDTH: tl.constexpr, MAXIMUM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each score becomes the mean or maximum of WIDTH around it; the newest num_unpooled pass through and lend nothing."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    length = tl.load(lengths_ptr + row)
    end = tl.maximum(length - num_unpooled, 0)
    pooled = tl.zeros([TILE], tl.float32)  # scores are sums of probabilities: none is below 0
    for step in tl.static_range(WIDTH):
        other = token + (step - WIDTH // 2)
        score = tl.load(scores_ptr + row * max_tokens + other, mask=(other >= 0) & (other < end), other=0.0)
        if MAXIMUM:
            pooled = tl.maximum(pooled, score)
        else:
            pooled += score * (1.0 / WIDTH)
    own = tl.load(scores_ptr + row * max_tokens + token, mask=(token >= end) & (token < length), other=0.0)
    tl.store(pooled_ptr + row * max_tokens + token, tl.where(token < end, pooled, own), mask=token < max_tokens)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    lengths: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    statistic: str = "sum",
    group_mean: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    pooling: str = "none",
    pool_tokens: int = 5,
    num_unpooled: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """float64 scores [batch, kv_heads, tokens], probabilities in full: each softmax finds its own sum, so `lse` is not used."""
    q_heads, num_queries, head_dim = q.shape[1:]
    batch, kv_heads = lengths.shape
    group = q_heads // kv_heads
    max_tokens = k.shape[2] if block_table is None else block_table.shape[-1] * k.shape[1]
    scores = torch.zeros(batch, kv_heads, max_tokens, dtype=torch.float64, device=k.device)
    for sequence in range(batch):
        for head in range(kv_heads):
            length = int(lengths[sequence, head])
            if not length:
                continue
            keys = tokens_of(k, block_table, sequence, head, length).double()
            token = torch.arange(length, device=k.device)
            position = token[-num_queries:]
            for q_head in range(head * group, (head + 1) * group):
                queries = q[sequence, q_head, : len(position)].double()
                logits = queries @ keys.T * (head_dim**-0.5 if scale is None else scale)
                if statistic == "gumbel":
                    index = torch.tensor(sequence * q_heads + q_head, device=k.device)
                    logits = (logits + gumbel_reference(seed, token[None, :], position[:, None], index)) / temperature
                p = logits.masked_fill(token[None, :] > position[:, None], -torch.inf).softmax(-1)
                if statistic == "square":
                    p = p**2
                elif statistic == "count":
                    p = (p * (position[:, None] + 1) > 1).double()
                scores[sequence, head, :length] += p.sum(0) / (group if group_mean else 1)
            end = max(0, length - num_unpooled)
            if pooling != "none" and end:
                padded = torch.nn.functional.pad(scores[sequence, head, :end], (pool_tokens // 2, pool_tokens // 2))
                windows = padded.unfold(0, pool_tokens, 1)
                scores[sequence, head, :end] = windows.mean(1) if pooling == "mean" else windows.amax(1)
    return scores


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    lengths: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    statistic: str = "sum",
    group_mean: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    pooling: str = "none",
    pool_tokens: int = 5,
    num_unpooled: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """Scores of all tokens of each KV head, [batch, kv_heads, max tokens] fp32; 0 past a head's length.

    q: [batch, q_heads, num_queries, head_dim], the last of each sequence, rotated as keys are; of a head with fewer tokens,
    the first `length`. k, lengths, block_table: keys of a cache (kvsim.kernels.layouts).
    lse: natural log of each row's sum of exponentials, [batch, q_heads, num_queries] fp32, as FlashAttention returns it;
    None: computed here, by a pass of its own over QKᵀ, as always for the noisy rows of "gumbel".
    temperature, seed: of "gumbel". scale: of logits, head_dim^-0.5 if None. group_mean: mean over the group's query heads.
    pooling: "none", "mean" or "max" over pool_tokens (odd) neighbours, except the newest num_unpooled tokens.
    """
    checks.tensor("k", k, RUN_DTYPES, (None, None, None, None), contiguous=False)
    view = view_cache("k", k, lengths, block_table)
    checks.head_dim(view.head_dim)
    checks.tensor("q", q, k.dtype, (view.batch, None, None, view.head_dim), k.device, contiguous=False)
    checks.last_dim_dense("q", q)
    q_heads, num_queries = q.shape[1:3]
    group = checks.group_of(q_heads, view.kv_heads)
    checks.choice("statistic", statistic, STATISTICS)
    checks.choice("pooling", pooling, POOLINGS)
    checks.positive("temperature", temperature)
    checks.integer("seed", seed, 0)
    checks.integer("pool_tokens", pool_tokens, 1)
    checks.require(pool_tokens % 2 == 1, "pool_tokens", pool_tokens, "be odd, to have a middle", f"use {pool_tokens + 1}")
    checks.integer("num_unpooled", num_unpooled, 0)
    noisy = statistic == "gumbel"
    if lse is not None:
        checks.require(not noisy, "lse", "given", "be None for statistic='gumbel', whose rows have sums of their own", "drop it")
        checks.tensor("lse", lse, torch.float32, (view.batch, q_heads, num_queries), k.device)
    scores = torch.empty(view.batch, view.kv_heads, view.max_tokens, dtype=torch.float32, device=k.device)
    rows = view.batch * view.kv_heads
    scale = view.head_dim**-0.5 if scale is None else scale
    inverse_temperature = 1.0 / temperature if noisy else 1.0
    shared = {
        **_tiles(view.head_dim, group * num_queries, noisy), "GROUP": group, "PAGED": view.paged, "BLOCK_SIZE": view.block_size,
        "HEAD_DIM": view.head_dim, "HEAD_DIM_PADDED": next_power_of_2(view.head_dim),
        "FP32_DOT": INTERPRETED or k.dtype == torch.float32,
    }  # fmt: skip
    strides = (*q.stride()[:3], *view.strides)
    table = k if block_table is None else block_table
    if lse is None:
        lse = torch.empty(view.batch, q_heads, num_queries, dtype=torch.float32, device=k.device)
        launch(
            row_lse_kernel, (ceil_div(num_queries * group, shared["TILE_ROWS"]), rows), q, k, table, lse, lengths,
            scale, inverse_temperature, seed, num_queries, view.kv_heads, *strides, NOISY=noisy, **shared,
        )  # fmt: skip
    launch(
        column_kernel, (ceil_div(view.max_tokens, shared["TILE_KEYS"]), rows), q, k, table, lse, lengths, scores,
        scale, inverse_temperature, seed, 1.0 / group if group_mean else 1.0, num_queries, view.max_tokens, view.kv_heads,
        *strides, STATISTIC=STATISTICS.index(statistic), **shared,
    )  # fmt: skip
    if pooling == "none":
        return scores
    pooled = torch.empty_like(scores)
    launch(
        pool_kernel, (ceil_div(view.max_tokens, POOL_TILE), rows), scores, pooled, lengths, view.max_tokens, num_unpooled,
        WIDTH=pool_tokens, MAXIMUM=pooling == "max", TILE=POOL_TILE,
    )  # fmt: skip
    return pooled


def _tiles(head_dim: int, num_rows: int, noisy: bool) -> dict[str, int]:
    """256 channels fill shared memory and noise takes registers sooner; the few rows of a window need no tile of 64."""
    wide = head_dim > 128
    return {
        "TILE_KEYS": 64 if wide or noisy else 128, "TILE_ROWS": 32 if wide or num_rows <= 32 else 64,
        "num_warps": 4 if wide or noisy else 8,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape(CacheShape):
    """group: query heads of a KV head. num_queries: the last ones, which score; 0: all of the tokens."""

    group: int = 4
    num_queries: int = 0
    statistic: str = "sum"
    pooling: str = "none"

    @property
    def queries(self) -> int:
        return self.num_queries or self.tokens


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Standard normal queries and keys, so that some keys stand out."""
    inputs = make_cache(shape, rng, device)
    del inputs["v"]
    size = (shape.batch, shape.kv_heads * shape.group, shape.queries, shape.head_dim)
    q = torch.randn(size, generator=generator(rng, device), device=device, dtype=shape.torch_dtype)
    return {"q": q, **inputs, "statistic": shape.statistic, "pooling": shape.pooling}


def bytes_moved(shape: Shape) -> float:
    """Keys, queries and row sums read by the pass over columns, scores written (pooled: read and written again).

    Without FlashAttention's row sums, which make_inputs leaves out, a pass before it reads keys and queries and writes sums.
    """
    heads = sum(shape.pair_lengths()) * shape.head_dim * shape.torch_dtype.itemsize
    rows = shape.batch * shape.kv_heads * shape.group * shape.queries
    scores = 4 * shape.batch * shape.kv_heads * shape.tokens * (1 if shape.pooling == "none" else 3)
    return float(2 * (heads + rows * (shape.head_dim * shape.torch_dtype.itemsize + 4)) + scores)


def flops(shape: Shape) -> float:
    """QKᵀ of the pairs that causality leaves, in both passes."""
    pairs = 0.0
    for length in shape.pair_lengths():
        last = min(shape.queries, length)
        pairs += last * (length - last) + last * (last + 1) / 2
    return 2 * 2.0 * pairs * shape.group * shape.head_dim


TOLERANCE = {torch.float16: 2e-5, torch.bfloat16: 2e-5, torch.float32: 2e-5}
"""Relative to 1 + score, whatever the inputs' dtype: products of 16-bit numbers are exact in fp32, a logit of size x is off by
some 2^-24 · x · sqrt(head_dim), which is the relative error of its exponential, and Gumbel noise adds 4e-6."""


def compile_specs() -> list[CompileSpec]:
    """All queries and a window, both layouts, the narrowest and widest heads."""
    shapes = [
        Shape(tokens=256, statistic=statistic, head_dim=head_dim, layout=layout, num_queries=queries, pooling=pooling)
        for statistic, head_dim, layout, queries, pooling in (
            ("sum", 128, "contiguous", 0, "none"), ("gumbel", 128, "paged", 0, "none"), ("gumbel", 256, "contiguous", 0, "none"),
            ("sum", 64, "paged", 32, "mean"), ("square", 128, "paged_per_head", 8, "max"), ("count", 96, "contiguous", 0, "none"),
        )
    ]  # fmt: skip
    specs = []
    for shape in shapes:
        inputs = make_inputs(shape, np.random.default_rng(0))
        label = f"{shape.statistic} d={shape.head_dim} {shape.layout} {shape.queries} queries"
        specs += recorded(label, lambda inputs=inputs: run(**inputs))
    return specs
