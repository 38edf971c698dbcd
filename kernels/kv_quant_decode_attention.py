"""Decode attention over quantised keys and values, turned back into numbers inside the kernel.

Layouts of codes, params and the full-precision ring are those of `kvsim.kernels.packing`. Codes go to fp16 in registers (no
integer-to-float conversion) and are scaled there, so that memory traffic is that of the codes: at 4 bits a GPU has some four
instructions an element before arithmetic, not memory, is the limit. Products of quantised tiles are of fp16 whatever q's dtype is,
since scales are fp16 and fp16 holds more of a product than bf16; those of full-precision tokens are in q's dtype.

KIVI (arXiv 2402.02750): of a head's n tokens, keys below `k_quantized` are codes, R at a time, and values below `v_quantized`, one
a step; newer ones lie in rings of R = residual_tokens slots. Tokens below v_quantized take the first loop, the last R at most the second.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks, decode_attention
from kvsim.kernels.layouts import tokens_of, view_cache
from kvsim.kernels.packing import QuantFormat, dequantize, dequantized_tile
from kvsim.kernels.quant_inputs import Shape, bytes_moved, flops, make_inputs
from kvsim.kernels.runtime import INTERPRETED, CompileSpec, ceil_div, dot, launch, next_power_of_2, specs_of
from kvsim.kernels.splits import (
    LOG2_E,
    ROWS,
    check_arguments,
    join,
    num_stages,
    online_softmax,
    partials_for,
    plan,
    store_result,
)

__all__ = ["LSE_TOLERANCE", "TOLERANCE", "Shape", "bytes_moved", "compile_specs", "flops", "make_inputs", "reference", "run"]

NUM_WARPS = 8
"""Turning codes into numbers takes registers: with 4 warps KIVI's two loops spill on sm_90 (Triton 3.7)."""
TOLERANCE = {torch.float16: 8e-3, torch.bfloat16: 1.6e-2}
"""Of output, relative to 1 + |output|: code · scale + minimum is rounded twice to fp16, each by 2^-11 of a range of about 4 here, so
a key of 1 is off by 2e-3, a logit of unit queries by as much, and a probability by 2e-3 of itself; values likewise. bf16: its output's."""
LSE_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
"""A log-sum-exp is off by no more than the largest logit is; in bf16, KIVI's second loop rounds keys by 2^-7 (truncated: 2^-8)."""


@triton.jit
def _as_loaded(x, INTERPRETED: tl.constexpr):
    """x itself, past an instruction that hides where it came from.

    Triton lays a product's operand out for the width it was loaded with, a byte here, although it passes through
    registers and shared memory as fp16: then it is read back with plain loads and moves instead of `ldmatrix`.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2)


@triton.jit
def quant_split_kernel(
    q_ptr, k_codes_ptr, k_params_ptr, v_codes_ptr, v_params_ptr, table_ptr, lengths_ptr,
    k_quantized_ptr, v_quantized_ptr, k_ring_ptr, v_ring_ptr, out_ptr, lse_ptr,
    scale_log2, kv_heads, split_tokens, num_splits, residual_tokens, table_stride_batch, table_stride_head,
    k_outer, k_token, k_head, k_params_outer, k_params_row, k_params_head,
    v_outer, v_token, v_head, v_params_outer, v_params_row, v_params_head,
    K_BITS: tl.constexpr, K_IS_FLOAT: tl.constexpr, K_BY_TOKEN: tl.constexpr, K_GROUP_SIZE: tl.constexpr,
    V_BITS: tl.constexpr, V_IS_FLOAT: tl.constexpr, V_BY_TOKEN: tl.constexpr, V_GROUP_SIZE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, PAGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_RING: tl.constexpr, TILE: tl.constexpr, IS_SPLIT: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """One split of one KV head: tokens whose K and V are codes, then those with V, or K and V, in full precision."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    length = tl.load(lengths_ptr + pair)
    first = split * split_tokens
    if IS_SPLIT and first >= length:
        return
    end = tl.minimum(first + split_tokens, length)
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM_PADDED)
    in_head = channel < HEAD_DIM
    q_offsets = (pair * GROUP + row)[:, None] * HEAD_DIM + channel[None, :]
    q = tl.load(q_ptr + q_offsets, mask=(row < GROUP)[:, None] & in_head[None, :], other=0.0)
    q_fp16 = q.to(tl.float16)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM_PADDED], tl.float32)
    num_codes = length
    if HAS_RING:
        num_codes = tl.load(v_quantized_ptr + pair)
    codes_end = tl.minimum(end, num_codes)
    for start in range(first, codes_end, TILE):
        token = start + tl.arange(0, TILE)
        exists = token < codes_end
        k = dequantized_tile(
            k_codes_ptr, k_params_ptr, table_ptr, token, start, exists, codes_end, batch, head,
            table_stride_batch, table_stride_head, k_outer, k_token, k_head, k_params_outer, k_params_row, k_params_head,
            K_BITS, K_IS_FLOAT, K_BY_TOKEN, K_GROUP_SIZE, HEAD_DIM, HEAD_DIM_PADDED, PAGED, BLOCK_SIZE, TILE,
        )  # fmt: skip
        logits = dot(q_fp16, tl.trans(_as_loaded(k, FP32_DOT)), FP32_DOT) * scale_log2
        p, maximum, total, rescale = online_softmax(logits, exists, maximum, total)
        v = dequantized_tile(
            v_codes_ptr, v_params_ptr, table_ptr, token, start, exists, codes_end, batch, head,
            table_stride_batch, table_stride_head, v_outer, v_token, v_head, v_params_outer, v_params_row, v_params_head,
            V_BITS, V_IS_FLOAT, V_BY_TOKEN, V_GROUP_SIZE, HEAD_DIM, HEAD_DIM_PADDED, PAGED, BLOCK_SIZE, TILE,
        )  # fmt: skip
        acc = acc * rescale[:, None] + dot(p.to(tl.float16), _as_loaded(v, FP32_DOT), FP32_DOT)
    if HAS_RING:
        k_end = tl.load(k_quantized_ptr + pair)
        full_start = tl.maximum(first, num_codes)
        for start in tl.range(full_start // TILE * TILE, end, TILE, num_stages=1):  # few tokens: registers matter more
            token = start + tl.arange(0, TILE)
            exists = (token >= full_start) & (token < end)
            k = dequantized_tile(
                k_codes_ptr, k_params_ptr, table_ptr, token, start, exists & (token < k_end), tl.minimum(end, k_end),
                batch, head, table_stride_batch, table_stride_head, k_outer, k_token, k_head,
                k_params_outer, k_params_row, k_params_head,
                K_BITS, K_IS_FLOAT, K_BY_TOKEN, K_GROUP_SIZE, HEAD_DIM, HEAD_DIM_PADDED, PAGED, BLOCK_SIZE, TILE,
            )  # fmt: skip
            slots = (pair * residual_tokens + token % residual_tokens)[:, None] * HEAD_DIM + channel[None, :]
            full = (exists & (token >= k_end))[:, None] & in_head[None, :]
            k = k.to(q.dtype) + tl.load(k_ring_ptr + slots, mask=full, other=0.0)  # one of the two is 0
            logits = dot(q, tl.trans(k), FP32_DOT) * scale_log2
            p, maximum, total, rescale = online_softmax(logits, exists, maximum, total)
            v = tl.load(v_ring_ptr + slots, mask=exists[:, None] & in_head[None, :], other=0.0)
            acc = acc * rescale[:, None] + dot(p.to(v.dtype), v, FP32_DOT)
    store_result(out_ptr, lse_ptr, acc, maximum, total, row, channel, pair, split, num_splits, GROUP, HEAD_DIM, IS_SPLIT)


def _check_quantized(
    name: str, fmt: QuantFormat, codes: torch.Tensor, params: torch.Tensor, counts: torch.Tensor,
    block_table: torch.Tensor | None, head_dim: int,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Check codes and params of K or V; returns their strides (outer, token or row, head)."""  # fmt: skip
    size = fmt.group_size
    power = size & (size - 1) == 0
    good = power if fmt.groups == "token" else power or size >= head_dim
    checks.require(good, f"{name}_format.group_size", size, "be a power of two, or the head_dim for channels", "use 32 or 64")
    checks.tensor(f"{name}_codes", codes, torch.uint8, (None, None, None, fmt.row_bytes(head_dim)), counts.device, False)
    view = view_cache(f"{name}_codes", codes, counts, block_table)
    per_row = fmt.tokens_per_params
    checks.require(
        not view.paged or view.block_size % per_row == 0, f"{name}_format.group_size", size,
        f"divide the block size {view.block_size}", "use larger blocks",
    )  # fmt: skip
    rows = (codes.shape[1] if view.paged else codes.shape[2]) / per_row
    dims = (codes.shape[0], int(rows), codes.shape[2]) if view.paged else (codes.shape[0], codes.shape[1], math.ceil(rows))
    wanted = (*dims, fmt.params_per_row(head_dim))
    checks.tensor(f"{name}_params", params, torch.float16, wanted, counts.device, contiguous=False)
    checks.last_dim_dense(f"{name}_params", params)
    outer, second, third, _ = params.stride()
    row, head = (second, third) if view.paged else (third, second)
    if block_table is not None and block_table.dim() == 3:
        head = 0
    return view.strides[:3], (outer, row, head)


def run(
    q: torch.Tensor, k_codes: torch.Tensor, k_params: torch.Tensor, v_codes: torch.Tensor, v_params: torch.Tensor,
    k_format: QuantFormat, v_format: QuantFormat, lengths: torch.Tensor, block_table: torch.Tensor | None = None,
    k_quantized: torch.Tensor | None = None, v_quantized: torch.Tensor | None = None, k_ring: torch.Tensor | None = None,
    v_ring: torch.Tensor | None = None, scale: float | None = None, max_length: int | None = None, num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per sequence over a quantised cache.

    q: fp16 or bf16 `[batch, q_heads, head_dim]`. Codes (uint8), params (fp16) and formats: `kvsim.kernels.packing`; K and V share
    block_table. lengths: int32 `[batch, kv_heads]`, all tokens of a head, full-precision ones included.
    k_ring, v_ring: `[batch, kv_heads, residual_tokens, head_dim]` in q's dtype, both or neither; with them k_quantized and
    v_quantized, int32 `[batch, kv_heads]`: tokens below are codes. Needs v_quantized <= k_quantized <= lengths <= v_quantized +
    residual_tokens, and whole groups of tokens below k_quantized. scale, max_length and returns: as in `decode_attention.run`.
    Raises ValueError before any launch, TritonUnavailable.
    """  # fmt: skip
    checks.tensor("q", q, checks.HALF_DTYPES, (None, None, None))
    head_dim = q.shape[2]
    checks.head_dim(head_dim)
    view = view_cache("k_codes", k_codes, lengths, block_table)
    k_strides, k_params_strides = _check_quantized("k", k_format, k_codes, k_params, lengths, block_table, head_dim)
    v_strides, v_params_strides = _check_quantized("v", v_format, v_codes, v_params, lengths, block_table, head_dim)
    same = v_codes.shape[:3] == k_codes.shape[:3]
    checks.require(same, "v_codes.shape", tuple(v_codes.shape), "equal that of k_codes but for the row", "share blocks")
    extras = {"k_quantized": k_quantized, "v_quantized": v_quantized, "k_ring": k_ring, "v_ring": v_ring}
    given = [name for name, value in extras.items() if value is not None]
    checks.require(len(given) in (0, 4), "arguments", given or "none", f"be all or none of {', '.join(extras)}", "pass all four")
    residual_tokens = 0
    if k_ring is not None and v_ring is not None and k_quantized is not None and v_quantized is not None:
        pairs_shape = (view.batch, view.kv_heads)
        checks.tensor("k_quantized", k_quantized, torch.int32, pairs_shape, q.device)
        checks.tensor("v_quantized", v_quantized, torch.int32, pairs_shape, q.device)
        checks.tensor("k_ring", k_ring, q.dtype, (*pairs_shape, None, head_dim), q.device)
        checks.tensor("v_ring", v_ring, q.dtype, tuple(k_ring.shape), q.device)
        residual_tokens = k_ring.shape[2]
        checks.integer("k_ring.shape[2]", residual_tokens, 1)
        _check_counts(lengths, k_quantized, v_quantized, residual_tokens)
    view_of_numbers = type(view)(**{**view.__dict__, "head_dim": head_dim})
    group, scale, length = check_arguments(q, view_of_numbers, q.dtype, k_codes.device, scale, max_length, num_splits)

    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tile = decode_attention.tile_tokens(head_dim)
    parts = partials_for(out, lse, view.kv_heads, *plan(view, length, num_splits, tile, q.device))
    formats = {
        f"{name}_{key}": value
        for name, fmt in (("K", k_format), ("V", v_format))
        for key, value in (
            ("BITS", fmt.bits), ("IS_FLOAT", fmt.is_float), ("BY_TOKEN", fmt.groups == "token"), ("GROUP_SIZE", fmt.group_size)
        )
    }  # fmt: skip
    launch(
        quant_split_kernel, (view.batch * view.kv_heads, parts.num_splits), q, k_codes, k_params, v_codes, v_params, block_table,
        lengths, k_quantized, v_quantized, k_ring, v_ring, parts.out, parts.lse, scale * LOG2_E.value, view.kv_heads,
        parts.split_tokens, parts.num_splits, residual_tokens, *view.strides[3:], *k_strides, *k_params_strides, *v_strides,
        *v_params_strides, **formats, GROUP=group, HEAD_DIM=head_dim, HEAD_DIM_PADDED=next_power_of_2(head_dim), PAGED=view.paged,
        BLOCK_SIZE=view.block_size, HAS_RING=residual_tokens > 0, TILE=tile, IS_SPLIT=parts.num_splits > 1,
        FP32_DOT=INTERPRETED, num_warps=NUM_WARPS, num_stages=num_stages(view.paged),
    )  # fmt: skip
    join(parts, lengths, out, lse)
    return out, lse


def _check_counts(lengths: torch.Tensor, k_quantized: torch.Tensor, v_quantized: torch.Tensor, residual_tokens: int) -> None:
    """Order of the counts, on the CPU only, where looking costs no wait."""
    if lengths.device.type == "cpu":
        ordered = (v_quantized >= 0) & (v_quantized <= k_quantized) & (k_quantized <= lengths)
        checks.require(bool(ordered.all()), "v_quantized", v_quantized.tolist(), "be 0 <= v <= k_quantized <= lengths", "check the counts")
        fits = lengths - v_quantized <= residual_tokens
        checks.require(bool(fits.all()), "lengths", lengths.tolist(), f"be at most v_quantized + {residual_tokens}", "quantise more tokens")


def reference(
    q: torch.Tensor, k_codes: torch.Tensor, k_params: torch.Tensor, v_codes: torch.Tensor, v_params: torch.Tensor,
    k_format: QuantFormat, v_format: QuantFormat, lengths: torch.Tensor, block_table: torch.Tensor | None = None,
    k_quantized: torch.Tensor | None = None, v_quantized: torch.Tensor | None = None, k_ring: torch.Tensor | None = None,
    v_ring: torch.Tensor | None = None, scale: float | None = None, **_unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64: a head's K and V as numbers, then plain attention."""  # fmt: skip
    group, head_dim = q.shape[1] // lengths.shape[1], q.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64, device=q.device)
    for batch, head in np.ndindex(*lengths.shape):
        length = int(lengths[batch, head])
        if not length:
            continue
        whole = []
        for fmt, codes, params, counts, ring in (
            (k_format, k_codes, k_params, k_quantized, k_ring), (v_format, v_codes, v_params, v_quantized, v_ring)
        ):  # fmt: skip
            num_codes = length if counts is None else int(counts[batch, head])
            rows = ceil_div(num_codes, fmt.tokens_per_params)
            values = dequantize(
                tokens_of(codes, block_table, batch, head, num_codes), tokens_of(params, block_table, batch, head, rows),
                fmt, head_dim,
            )  # fmt: skip
            newest = [] if ring is None else [ring[batch, head, t % ring.shape[2]].double() for t in range(num_codes, length)]
            whole.append(torch.cat([values, *(row[None] for row in newest)]))
        heads = slice(head * group, (head + 1) * group)
        logits = q[batch, heads].double() @ whole[0].T * (scale or 1 / math.sqrt(head_dim))
        lse[batch, heads] = logits.logsumexp(1)
        out[batch, heads] = logits.softmax(1) @ whole[1]
    return out, lse


def compile_specs() -> list[CompileSpec]:
    """Launches to compile ahead of time: every format, both kinds of layout, both dtypes."""
    cases = (
        ("kivi2", 128, "bfloat16", "contiguous", 4), ("kivi4", 128, "float16", "paged", 8), ("int4_group64", 128, "bfloat16", "paged", 8),
        ("int4_token", 80, "float16", "contiguous", 1), ("int8_token", 128, "bfloat16", "contiguous", 4),
        ("int8_group64", 64, "float16", "paged_per_head", 4), ("fp8_token", 128, "bfloat16", "paged", 4),
        ("fp8_group64", 256, "float16", "contiguous", 16), ("kivi4", 256, "bfloat16", "paged", 4),
    )  # fmt: skip
    shapes = [
        Shape(batch=2, kv_heads=8, tokens=1024, format=fmt, head_dim=dim, dtype=dtype, layout=layout, group=group, block_size=32)
        for fmt, dim, dtype, layout, group in cases
    ]
    return [spec for shape in shapes for spec in specs_of(_label(shape), run, make_inputs, shape)]


def _label(shape: Shape) -> str:
    return f"{shape.format} {shape.dtype} d{shape.head_dim} {shape.layout} group {shape.group}"
