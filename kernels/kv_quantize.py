"""Keys and values quantised to 2, 4 or 8 bits, with fp16 scales and minima, in the places that `packing` gives them.

* KIVI (arXiv 2402.02750): keys in groups of consecutive tokens of one channel, values in groups of channels of one token;
* int8 and int4 in groups of channels or per token (FlexGen, arXiv 2303.06865: int4, groups of 64), fp8 (e4m3) with a scale only.

A group's minimum and scale = (maximum − minimum) / (2^bits − 1) are rounded to fp16 first, and codes are rounded against
what is stored: code = round((x − minimum) / scale). A number of fp8 is rounded to the nearest even e4m3 by integer arithmetic,
as sm_80 has no instruction for it. One program reads its tile once and writes codes and params: nothing else moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks
from kvsim.kernels.layouts import CacheShape, make_cache, token_offsets, tokens_of, view_cache
from kvsim.kernels.packing import FP8_MAX, PARAM_BYTES, QuantFormat, pack
from kvsim.kernels.runtime import CompileSpec, ceil_div, launch, next_power_of_2, recorded

FP16_MAX = 65504.0
TILE_ELEMENTS = 4096
LARGE = tl.constexpr(3.0e38)


@triton.jit
def _to_e4m3(x):
    """Bits of the nearest e4m3 number (ties to even) of fp32 numbers within ±448, in int32."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # 20 of 23 mantissa bits go, to nearest even, a carry reaching the exponent; its bias falls from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below 2^-6 numbers are multiples of 2^-9, the spacing of fp32 numbers from 16384 on.
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return sign | tl.where(magnitude < 0x3C800000, subnormal, normal)


@triton.jit
def _params(low, high, IS_FLOAT: tl.constexpr, BITS: tl.constexpr):
    """(minimum, scale) rounded to fp16, in fp32, and the factor 1/scale, 0 where the scale is."""
    if IS_FLOAT:
        minimum = low * 0.0
        scale = tl.maximum(tl.abs(low), tl.abs(high)) * (1.0 / 448.0)
    else:
        minimum = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
        scale = (high - low) * (1.0 / (2**BITS - 1))
    scale = tl.minimum(scale, 65504.0).to(tl.float16).to(tl.float32)
    return minimum, scale, tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)


@triton.jit
def _codes(x, minimum, factor, IS_FLOAT: tl.constexpr, BITS: tl.constexpr):
    if IS_FLOAT:
        return _to_e4m3(tl.minimum(tl.maximum(x * factor, -448.0), 448.0))
    else:
        return tl.minimum(tl.maximum(tl.floor((x - minimum) * factor + 0.5), 0.0), 2.0**BITS - 1.0).to(tl.int32)


@triton.jit
def _pack(codes, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BITS: tl.constexpr):
    """Bytes [ROWS, CHANNELS · BITS/8] of codes [ROWS, CHANNELS]; the first channel of a byte in its lowest bits."""
    if BITS == 8:
        return codes.to(tl.uint8)
    elif BITS == 4:
        low, high = tl.split(tl.reshape(codes, [ROWS, CHANNELS // 2, 2]))
        return (low | (high << 4)).to(tl.uint8)
    else:
        even, odd = tl.split(tl.reshape(codes, [ROWS, CHANNELS // 4, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first | (second << 2) | (third << 4) | (fourth << 6)).to(tl.uint8)


@triton.jit
def quantize_kernel(
    x_ptr, table_ptr, codes_ptr, params_ptr, out_table_ptr, lengths_ptr, first_ptr, kv_heads,
    outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head,
    codes_outer_stride, codes_token_stride, codes_head_stride, out_table_stride_batch, out_table_stride_head,
    params_outer_stride, params_row_stride, params_head_stride,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, OUT_PAGED: tl.constexpr, OUT_BLOCK_SIZE: tl.constexpr,
    RING: tl.constexpr, HAS_FIRST: tl.constexpr, BITS: tl.constexpr, IS_FLOAT: tl.constexpr, BY_TOKEN: tl.constexpr,
    GROUP_SIZE: tl.constexpr, GROUP_PADDED: tl.constexpr, NUM_GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE tokens of one head, with BY_TOKEN one group of tokens: codes and params."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    length = tl.load(lengths_ptr + row)
    start = tl.program_id(0) * (GROUP_SIZE if BY_TOKEN else TILE)
    if HAS_FIRST:
        start += tl.load(first_ptr + row)
    if start < length:
        token = start + tl.arange(0, TILE)
        exists = token < length
        if BY_TOKEN:
            exists = exists & (token < start + GROUP_SIZE)
        channel = tl.arange(0, HEAD_DIM_PADDED)
        slot = token % RING if RING > 0 else token
        source = token_offsets(
            slot, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        used = exists[:, None] & (channel[None, :] < HEAD_DIM)
        x = tl.load(x_ptr + source[:, None] + channel[None, :], mask=used, other=0.0).to(tl.float32)
        if BY_TOKEN:
            low = tl.min(tl.where(used, x, LARGE), 0)
            high = tl.max(tl.where(used, x, -LARGE), 0)
            in_head = channel < HEAD_DIM
            minimum, scale, factor = _params(tl.where(in_head, low, 0.0), tl.where(in_head, high, 0.0), IS_FLOAT, BITS)
            codes = _codes(x, minimum[None, :], factor[None, :], IS_FLOAT, BITS)
            param_row = tl.zeros([1], tl.int32) + start // GROUP_SIZE
            offsets = token_offsets(
                param_row, param_row >= 0, batch, head, out_table_ptr, out_table_stride_batch, out_table_stride_head,
                params_outer_stride, params_row_stride, params_head_stride, OUT_PAGED, OUT_BLOCK_SIZE // GROUP_SIZE,
            )  # fmt: skip
            params = params_ptr + offsets[:, None] + channel[None, :]
            tl.store(params, scale[None, :].to(tl.float16), mask=in_head[None, :])
            if not IS_FLOAT:
                tl.store(params + HEAD_DIM, minimum[None, :].to(tl.float16), mask=in_head[None, :])
        else:
            GROUPS_PADDED: tl.constexpr = HEAD_DIM_PADDED // GROUP_PADDED
            grouped = tl.reshape(x, [TILE, GROUPS_PADDED, GROUP_PADDED])
            in_head = tl.reshape(tl.broadcast_to((channel < HEAD_DIM)[None, :], [TILE, HEAD_DIM_PADDED]), grouped.shape)
            low = tl.min(tl.where(in_head, grouped, LARGE), 2)
            high = tl.max(tl.where(in_head, grouped, -LARGE), 2)
            group = tl.arange(0, GROUPS_PADDED)
            is_group = (group < NUM_GROUPS)[None, :]
            minimum, scale, factor = _params(tl.where(is_group, low, 0.0), tl.where(is_group, high, 0.0), IS_FLOAT, BITS)
            codes = _codes(grouped, minimum[:, :, None], factor[:, :, None], IS_FLOAT, BITS)
            codes = tl.reshape(codes, [TILE, HEAD_DIM_PADDED])
            offsets = token_offsets(
                token, exists, batch, head, out_table_ptr, out_table_stride_batch, out_table_stride_head,
                params_outer_stride, params_row_stride, params_head_stride, OUT_PAGED, OUT_BLOCK_SIZE,
            )  # fmt: skip
            params = params_ptr + offsets[:, None] + group[None, :]
            stored = exists[:, None] & is_group
            tl.store(params, scale.to(tl.float16), mask=stored)
            if not IS_FLOAT:
                tl.store(params + NUM_GROUPS, minimum.to(tl.float16), mask=stored)
        packed = _pack(codes, TILE, HEAD_DIM_PADDED, BITS)
        byte = tl.arange(0, HEAD_DIM_PADDED * BITS // 8)
        target = token_offsets(
            token, exists, batch, head, out_table_ptr, out_table_stride_batch, out_table_stride_head,
            codes_outer_stride, codes_token_stride, codes_head_stride, OUT_PAGED, OUT_BLOCK_SIZE,
        )  # fmt: skip
        stored_bytes = exists[:, None] & (byte[None, :] < HEAD_DIM * BITS // 8)
        tl.store(codes_ptr + target[:, None] + byte[None, :], packed, mask=stored_bytes)


def reference(
    x: torch.Tensor,
    lengths: torch.Tensor,
    fmt: QuantFormat,
    *,
    block_table: torch.Tensor | None = None,
    **_: Any,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(codes, params) of each (sequence, head) from its first token on, as rows of `packing`; codes rounded in float64.

    Params are defined in fp32, then rounded to fp16: (maximum − minimum) · fp32(1/(2^bits − 1)), or |x| · fp32(1/448).
    """
    pairs = []
    for sequence in range(lengths.shape[0]):
        for head in range(lengths.shape[1]):
            rows = tokens_of(x, block_table, sequence, head, int(lengths[sequence, head])).float()
            pairs.append(_reference_rows(rows, fmt))
    return pairs


def _reference_rows(rows: torch.Tensor, fmt: QuantFormat) -> tuple[torch.Tensor, torch.Tensor]:
    axis = 0 if fmt.groups == "token" else 1
    codes, scales, minima = [], [], []
    for group in rows.split(fmt.group_size, axis) if rows.numel() else ():
        low, high = group.amin(axis, keepdim=True), group.amax(axis, keepdim=True)
        if fmt.is_float:
            minimum, scale = low * 0, torch.maximum(low.abs(), high.abs()) * torch.tensor(1 / FP8_MAX, dtype=torch.float32)
        else:
            minimum = low.clamp(-FP16_MAX, FP16_MAX).half()
            scale = (high - low) * torch.tensor(1 / fmt.max_code, dtype=torch.float32)
        scale = scale.clamp(max=FP16_MAX).half()
        exact = (group.double() - minimum.double()) / scale.double()
        exact = torch.where(scale.double() > 0, exact, 0.0)
        codes.append(exact.clamp(-FP8_MAX, FP8_MAX) if fmt.is_float else exact.add(0.5).floor().clamp(0, fmt.max_code))
        scales.append(scale)
        minima.append(minimum.half())
    if not codes:
        return rows.new_zeros(0, fmt.row_bytes(rows.shape[1])).byte(), rows.new_zeros(0, fmt.params_per_row(rows.shape[1])).half()
    per_row = [torch.cat(scales, axis), *([] if fmt.is_float else [torch.cat(minima, axis)])]
    whole = torch.cat(codes, axis)
    packed = whole.float().to(torch.float8_e4m3fn).view(torch.uint8) if fmt.is_float else pack(whole, fmt.bits)
    return packed, torch.cat(per_row, 1)


def run(
    x: torch.Tensor,
    lengths: torch.Tensor,
    fmt: QuantFormat,
    *,
    block_table: torch.Tensor | None = None,
    ring: bool = False,
    first_tokens: torch.Tensor | None = None,
    max_new_tokens: int | None = None,
    codes: torch.Tensor | None = None,
    params: torch.Tensor | None = None,
    out_block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and params (kvsim.kernels.packing) of tokens first … length−1 of each head. Returns (codes, params).

    x, lengths, block_table: keys or values, a cache (kvsim.kernels.layouts); with `ring`, x is the residual
    [batch, kv_heads, residual_tokens, head_dim], token t in slot t mod residual_tokens, and the others must be given.
    first_tokens: [batch, kv_heads] int32, multiples of the group size for token groups; None: 0. max_new_tokens: at least the
    largest length − first; None: as many as the cache holds.
    codes, params, out_block_table: where to; None: allocated in x's layout. A paged cache's block must hold whole groups.
    """
    checks.tensor("x", x, checks.HALF_DTYPES, (None, None, None, None), contiguous=False)
    # A ring has fewer slots than tokens were seen, so its lengths are none of a cache; values are looked at on the CPU only.
    held = torch.zeros_like(lengths) if ring and lengths.device.type == "cpu" else lengths
    view = view_cache("x", x, held, block_table)
    head_dim = view.head_dim
    checks.head_dim(head_dim)
    by_token = fmt.groups == "token"
    if not by_token:
        fits = fmt.group_size >= head_dim or fmt.group_size & (fmt.group_size - 1) == 0
        checks.require(fits, "fmt.group_size", fmt.group_size, "be a power of two or the head_dim", "use 32, 64 or the head_dim")
    given = codes is not None and params is not None
    if ring:
        plain = block_table is None
        checks.require(plain, "block_table", "given", "be None for a ring, which is contiguous", "drop it")
        checks.require(given, "codes", None, "be given, with params, for a ring", "pass the quantised cache")
    if codes is None or params is None:
        checks.require(codes is None and params is None, "codes", codes, "be given with params or not at all", "pass both")
        out_block_table = block_table
        codes = torch.empty((*x.shape[:3], fmt.row_bytes(head_dim)), dtype=torch.uint8, device=x.device)
        token_axis = 2 if block_table is None else 1
        dims = list(codes.shape)
        dims[token_axis] = ceil_div(dims[token_axis], fmt.tokens_per_params)
        dims[3] = fmt.params_per_row(head_dim)
        params = torch.empty(dims, dtype=torch.float16, device=x.device)
    checks.tensor("codes", codes, torch.uint8, (None, None, None, fmt.row_bytes(head_dim)), x.device, contiguous=False)
    checks.tensor("params", params, torch.float16, (None, None, None, fmt.params_per_row(head_dim)), x.device, contiguous=False)
    out = view_cache("codes", codes, lengths, out_block_table)
    if out.paged:
        whole = out.block_size % fmt.tokens_per_params == 0
        checks.require(whole, "fmt.group_size", fmt.group_size, f"divide the block of {out.block_size} tokens", "use larger blocks")
    rows_axis = 1 if out.paged else 2
    param_rows = ceil_div(codes.shape[rows_axis], fmt.tokens_per_params)
    expected = [*codes.shape[:3], None]
    expected[rows_axis] = param_rows
    checks.tensor("params", params, torch.float16, expected, x.device, contiguous=False)
    checks.last_dim_dense("params", params)
    if first_tokens is not None:
        checks.tensor("first_tokens", first_tokens, torch.int32, (view.batch, view.kv_heads), x.device)
    most = out.max_tokens if max_new_tokens is None else max_new_tokens
    checks.integer("max_new_tokens", most, 0, out.max_tokens)
    padded = next_power_of_2(head_dim)
    tile = next_power_of_2(fmt.group_size) if by_token else TILE_ELEMENTS // padded
    outer, row_stride, head_stride = _param_strides(params, out.paged, out.head_stride == 0)
    launch(
        quantize_kernel, (ceil_div(most, fmt.group_size if by_token else tile), view.batch * view.kv_heads),
        x, x if block_table is None else block_table, codes, params, codes if out_block_table is None else out_block_table,
        lengths, lengths if first_tokens is None else first_tokens, view.kv_heads, *view.strides, *out.strides,
        outer, row_stride, head_stride, PAGED=view.paged, BLOCK_SIZE=view.block_size, OUT_PAGED=out.paged,
        OUT_BLOCK_SIZE=out.block_size, RING=x.shape[2] if ring else 0, HAS_FIRST=first_tokens is not None,
        BITS=fmt.bits, IS_FLOAT=fmt.is_float, BY_TOKEN=by_token, GROUP_SIZE=fmt.group_size,
        GROUP_PADDED=min(padded, next_power_of_2(fmt.group_size)), NUM_GROUPS=fmt.num_groups(head_dim),
        HEAD_DIM=head_dim, HEAD_DIM_PADDED=padded, TILE=tile, num_warps=8 if tile * padded > 2 * TILE_ELEMENTS else 4,
    )  # fmt: skip
    return codes, params


def _param_strides(params: torch.Tensor, paged: bool, head_is_block: bool) -> tuple[int, int, int]:
    """Outer, row and head stride in elements."""
    outer, second, third, _ = params.stride()
    return (outer, second, 0 if head_is_block else third) if paged else (outer, third, second)


@dataclass(frozen=True, kw_only=True)
class Shape(CacheShape):
    """element, groups and group_size: as in `QuantFormat`. Paged blocks must hold whole token groups."""

    element: str = "int4"
    groups: str = "channel"
    group_size: int = 64

    @property
    def fmt(self) -> QuantFormat:
        return QuantFormat(self.element, self.groups, self.group_size)


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device = "cpu") -> dict[str, Any]:
    inputs = make_cache(shape, rng, device)
    return {"x": inputs["k"], "lengths": inputs["lengths"], "fmt": shape.fmt, "block_table": inputs["block_table"]}


def bytes_moved(shape: Shape) -> float:
    """Each element read, codes and params written."""
    element = shape.torch_dtype.itemsize
    return float(sum(n * shape.head_dim * element + shape.fmt.stored_bytes(n, shape.head_dim) for n in shape.pair_lengths()))


def flops(shape: Shape) -> float:
    """Minimum, maximum, difference, product and rounding of each element."""
    return 5.0 * sum(shape.pair_lengths()) * shape.head_dim


TOLERANCE = {torch.float16: 1e-4, torch.bfloat16: 1e-4}
"""In codes: how close to a half a float64 quotient must be for fp32, off by 3 · 2^-24 · 255 at most, to round the other way.
Params are equal bit by bit."""


def compile_specs() -> list[CompileSpec]:
    specs = []
    for element, groups, group_size, head_dim, layout in (
        ("int2", "token", 32, 128, "contiguous"), ("int2", "channel", 32, 128, "paged"), ("int4", "token", 32, 256, "paged"),
        ("int4", "channel", 64, 96, "contiguous"), ("int8", "channel", 128, 128, "paged"), ("fp8", "channel", 80, 80, "contiguous"),
    ):  # fmt: skip
        shape = Shape(
            tokens=64, block_size=32, element=element, groups=groups, group_size=group_size, head_dim=head_dim, layout=layout
        )
        inputs = make_inputs(shape, np.random.default_rng(0))
        specs += recorded(f"{element} {groups} {group_size} d={head_dim} {layout}", lambda inputs=inputs: run(**inputs))
    return specs


assert torch.float16.itemsize == PARAM_BYTES
