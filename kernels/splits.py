"""Splitting one head's tokens over several programs, and joining their partial results; shared by all decode attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvsim.kernels import checks
from kvsim.kernels.layouts import CacheView
from kvsim.kernels.runtime import ASSUMED_MULTIPROCESSORS, ceil_div, launch, next_power_of_2, num_multiprocessors

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ROWS = tl.constexpr(16)
"""Query rows of a tile: the m of the smallest tensor-core product, and the largest group."""
MIN_SPLIT_TOKENS = 256
"""Below it a program's start-up and its partial result outweigh what it reads."""
PROGRAMS_PER_MULTIPROCESSOR = 2
"""What shared memory of a pipelined K and V tile leaves room for (docs/kernels.md)."""
MAX_WAVES = 8
LSE_TOLERANCE = 1e-4
"""Logits and their sum are fp32 over at most 256 channels: 256 · 2^-24 · |q||k| and the hardware's 2^-22 exponential."""


@triton.jit
def online_softmax(logits, exists, maximum, total):
    """One tile of base-2 logits, at least one token of which exists: un-normalised probabilities, the new running maximum and
    sum, and the factor for what was accumulated before.
    """
    logits = tl.where(exists[None, :], logits, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    p = tl.exp2(logits - new_maximum[:, None])
    rescale = tl.exp2(maximum - new_maximum)
    return p, new_maximum, total * rescale + tl.sum(p, 1), rescale


@triton.jit
def store_result(
    out_ptr, lse_ptr, acc, maximum, total, row, channel, pair, split, num_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Normalised output and log-sum-exp of a tile of query rows: parts (base 2, fp32) where IS_SPLIT, else the results."""
    mask = (row < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]  # an empty head: 0, and its maximum −inf
    lse = maximum + tl.log2(divisor)
    if IS_SPLIT:
        part = (pair * num_splits + split) * GROUP + row
        tl.store(out_ptr + part[:, None] * HEAD_DIM + channel[None, :], acc, mask=mask)
        tl.store(lse_ptr + part, lse, mask=row < GROUP)
    else:
        rows = pair * GROUP + row
        tl.store(out_ptr + rows[:, None] * HEAD_DIM + channel[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + rows, lse * LN_2, mask=row < GROUP)


@triton.jit
def join_kernel(
    part_out_ptr, part_lse_ptr, lengths_ptr, more_lengths_ptr, out_ptr, lse_ptr, split_tokens, num_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, SPLITS_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Splits of one query head weighted by their shares of its sum of exponentials."""
    pair, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths_ptr + pair)
    if more_lengths_ptr is not None:
        length += tl.load(more_lengths_ptr + pair)
    used = tl.cdiv(length, split_tokens)
    split = tl.arange(0, SPLITS_PADDED)
    parts = pair * num_splits * GROUP + member
    lses = tl.load(part_lse_ptr + parts + split * GROUP, mask=split < used, other=float("-inf"))
    maximum = tl.max(lses, 0)  # −inf for an empty head
    total = tl.sum(tl.where(split < used, tl.exp2(lses - maximum), 0.0), 0)
    channel = tl.arange(0, HEAD_DIM_PADDED)
    in_head = channel < HEAD_DIM
    acc = tl.zeros([HEAD_DIM_PADDED], tl.float32)
    for start in range(0, used, TILE):
        index = start + tl.arange(0, TILE)
        lse = tl.load(part_lse_ptr + parts + index * GROUP, mask=index < used, other=float("-inf"))
        pointers = part_out_ptr + (parts + index * GROUP)[:, None] * HEAD_DIM + channel[None, :]
        part = tl.load(pointers, mask=(index < used)[:, None] & in_head[None, :], other=0.0)
        acc += tl.sum(part * tl.exp2(lse - maximum)[:, None], 0)
    divisor = tl.where(total > 0, total, 1.0)
    row = pair * GROUP + member
    tl.store(out_ptr + row * HEAD_DIM + channel, (acc / divisor).to(out_ptr.dtype.element_ty), mask=in_head)
    tl.store(lse_ptr + row, (maximum + tl.log2(divisor)) * LN_2)


def split_plan(pairs: int, max_length: int, tile: int, multiprocessors: int) -> tuple[int, int]:
    """(splits, tokens of a split) for `pairs` heads of at most `max_length` tokens: the fewest splits with full last waves.

    The rule is that of FlashAttention's `num_splits_heuristic`: within 15 % of the best share of busy multiprocessors.
    """
    resident = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    most = max(1, min(max_length // MIN_SPLIT_TOKENS, ceil_div(MAX_WAVES * resident, pairs)))
    shares = [pairs * n / (resident * ceil_div(pairs * n, resident)) for n in range(1, most + 1)]
    splits = next(n for n, share in enumerate(shares, 1) if share >= 0.85 * max(shares))
    split_tokens = ceil_div(ceil_div(max(1, max_length), splits), tile) * tile
    return ceil_div(max(1, max_length), split_tokens), split_tokens


@dataclass(frozen=True)
class Partials:
    """Where a split kernel writes: the results themselves, or fp32 parts of them that `join` puts together."""

    out: torch.Tensor
    lse: torch.Tensor
    num_splits: int
    split_tokens: int


def partials_for(out: torch.Tensor, lse: torch.Tensor, kv_heads: int, num_splits: int, split_tokens: int) -> Partials:
    """Scratch for `num_splits` parts of `out` [batch, q_heads, head_dim], or `out` itself for one."""
    if num_splits == 1:
        return Partials(out, lse, 1, split_tokens)
    batch, q_heads, head_dim = out.shape
    dims = (batch * kv_heads, num_splits, q_heads // kv_heads)
    parts = torch.empty(*dims, head_dim, device=out.device, dtype=torch.float32)
    return Partials(parts, torch.empty(dims, device=out.device, dtype=torch.float32), num_splits, split_tokens)


def join(
    parts: Partials, lengths: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, more_lengths: torch.Tensor | None = None
) -> None:
    """Join the parts into `out` and `lse`; nothing to do for one split. A head's tokens are `lengths` plus `more_lengths`."""
    if parts.num_splits == 1:
        return
    pairs, num_splits, group, head_dim = parts.out.shape
    launch(
        join_kernel, (pairs, group), parts.out, parts.lse, lengths, more_lengths, out, lse, parts.split_tokens, num_splits,
        GROUP=group, HEAD_DIM=head_dim, HEAD_DIM_PADDED=next_power_of_2(head_dim),
        SPLITS_PADDED=next_power_of_2(num_splits), TILE=16, num_warps=4, num_stages=2,
    )  # fmt: skip


def check_arguments(
    q: torch.Tensor, view: CacheView, kv_dtype: torch.dtype, device: torch.device, scale: float | None,
    max_length: int | None, num_splits: int | None,
) -> tuple[int, float, int]:
    """Checks shared by all decode attention; returns group, scale and the length that splits are chosen for."""  # fmt: skip
    checks.head_dim(view.head_dim)
    checks.tensor("q", q, kv_dtype, (view.batch, None, view.head_dim), device)
    group = checks.group_of(q.shape[1], view.kv_heads)
    if scale is not None:
        checks.positive("scale", scale)
    if max_length is not None:
        checks.integer("max_length", max_length, 0, view.max_tokens)
    if num_splits is not None:
        checks.integer("num_splits", num_splits, 1, 1024)
    return group, scale or 1 / math.sqrt(view.head_dim), view.max_tokens if max_length is None else max_length


def plan(view: CacheView, max_length: int, num_splits: int | None, tile: int, device: torch.device) -> tuple[int, int]:
    """The caller's number of splits, or `split_plan`'s. Splits cover all of the cache, whatever `max_length` says."""
    if num_splits is None:
        _, split_tokens = split_plan(view.batch * view.kv_heads, max_length, tile, num_multiprocessors(device))
    else:
        split_tokens = ceil_div(ceil_div(max(1, max_length), num_splits), tile) * tile
    return ceil_div(max(1, view.max_tokens), split_tokens), split_tokens


def num_stages(paged: bool) -> int:
    """Pipeline stages with which one tile of K and V is on its way while another is used, in 70 KiB: two programs fit sm_80.

    In a paged cache the block numbers are loaded a stage ahead of what they point at, which halves the stages left for it:
    with 3 stages the compiler keeps a single buffer (38 KiB, docs/kernels.md), and loads would wait for products.
    """
    return 5 if paged else 3


def num_warps(head_dim: int) -> int:
    """8 where 4 warps' registers do not hold the query and the sums of 256 channels (docs/kernels.md: spills on sm_90)."""
    return 8 if head_dim > 128 else 4


def parts_bytes(pairs: int, group: int, head_dim: int, max_length: int, tile: int) -> int:
    """Bytes of partial results, written and read, with the splits that an assumed GPU gets; 0 for one split."""
    splits, _ = split_plan(pairs, max_length, tile, ASSUMED_MULTIPROCESSORS)
    return 0 if splits == 1 else 2 * 4 * pairs * group * splits * (head_dim + 1)
