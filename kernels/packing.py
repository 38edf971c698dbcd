"""How quantised keys and values lie in memory, and their packing and unpacking in plain torch.

**Codes** are uint8 rows in the place of a token's channels: `[batch, kv_heads, tokens, row_bytes]`, or paged
`[blocks, block_size, kv_heads, row_bytes]`, with row_bytes = head_dim · bits/8. Neighbouring channels share a byte, the first in
its lowest bits: in 4 bits byte j holds channels 2j and 2j+1, in 2 bits 4j … 4j+3. Kernels split a byte in registers without
moving anything between threads. Integer codes are unsigned, 0 … 2^bits − 1; fp8 codes are the bit patterns of e4m3 (1 sign, 4
exponent, 3 mantissa bits, largest 448, no infinity), kept as uint8 because sm_80 has no such type.

**Params** are fp16, a scale and a minimum for each group (fp8: a scale only): value = code · scale + minimum. Two kinds of groups:

| groups | share a scale | params row | rows of params | used by |
|---|---|---|---|---|
| `token` | `group_size` consecutive tokens of one channel | P · head_dim | one for `group_size` tokens | KIVI's keys |
| `channel` | `group_size` consecutive channels of one token | P · num_groups | one a token | KIVI's values; int8, int4, fp8 |

Rows of params take the place of tokens: `[batch, kv_heads, rows, row]`, or paged `[blocks, block_size/tokens_per_row, kv_heads, row]`.
P is 2 (first all scales of the row, then all its minima) or for fp8 1. `channel` groups of head_dim channels are one scale per
token. A scale for a whole tensor is a params tensor expanded with strides 0. The last group may be short. With one byte a
group and 16-bit params, 4 bits in groups of 32 take 5 bits an element, and 2 bits take 3 (KIVI, arXiv 2402.02750).

**Full-precision tokens** (KIVI's residual) lie in a ring of `residual_tokens` slots: token t in slot t mod residual_tokens of
`[batch, kv_heads, residual_tokens, head_dim]`, for keys and for values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvsim.kernels import checks
from kvsim.kernels.layouts import token_offsets

BITS = {"int2": 2, "int4": 4, "int8": 8, "fp8": 8}
GROUPS = ("token", "channel")
FP8_MAX = 448.0
"""Largest finite e4m3 number (Micikevicius et al., arXiv 2209.05433)."""
PARAM_BYTES = 2


@dataclass(frozen=True)
class QuantFormat:
    """How K or V is quantised: `element` of BITS, `groups` of GROUPS, and the tokens or channels of a group."""

    element: str
    groups: str
    group_size: int

    def __post_init__(self) -> None:
        checks.choice("element", self.element, tuple(BITS))
        checks.choice("groups", self.groups, GROUPS)
        checks.integer("group_size", self.group_size, 1)
        checks.require(
            self.group_size % 16 == 0, "group_size", self.group_size, "be a multiple of 16", "use 32, 64, 128 or the head_dim"
        )

    @property
    def bits(self) -> int:
        return BITS[self.element]

    @property
    def is_float(self) -> bool:
        return self.element == "fp8"

    @property
    def num_params(self) -> int:
        return 1 if self.is_float else 2

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def tokens_per_params(self) -> int:
        """Tokens that share a row of params."""
        return self.group_size if self.groups == "token" else 1

    def row_bytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8

    def num_groups(self, head_dim: int) -> int:
        """Groups of a row of params: one a channel, or one for each `group_size` channels."""
        return head_dim if self.groups == "token" else -(-head_dim // self.group_size)

    def params_per_row(self, head_dim: int) -> int:
        return self.num_params * self.num_groups(head_dim)

    def stored_bytes(self, num_tokens: int, head_dim: int) -> int:
        """Codes and params of that many tokens of one head."""
        rows = -(-num_tokens // self.tokens_per_params)
        return num_tokens * self.row_bytes(head_dim) + rows * self.params_per_row(head_dim) * PARAM_BYTES


def kivi_formats(bits: int, group_size: int = 32) -> tuple[QuantFormat, QuantFormat]:
    """Formats of K and V in KIVI (arXiv 2402.02750): K per channel in groups of tokens, V per token in groups of channels."""
    checks.choice("bits", bits, (2, 4))
    return QuantFormat(f"int{bits}", "token", group_size), QuantFormat(f"int{bits}", "channel", group_size)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes `[..., head_dim · bits/8]` of integer codes `[..., head_dim]` in 0 … 2^bits − 1."""
    per_byte = 8 // bits
    rows = codes.to(torch.int32).unflatten(-1, (-1, per_byte))
    return sum(rows[..., i] << (bits * i) for i in range(per_byte)).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 codes `[..., head_dim]` of bytes `[..., head_dim · bits/8]`."""
    planes = [(packed.to(torch.int32) >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(planes, dim=-1).flatten(-2)


def dequantize(codes: torch.Tensor, params: torch.Tensor, fmt: QuantFormat, head_dim: int) -> torch.Tensor:
    """float64 `[tokens, head_dim]` of the codes `[tokens, row_bytes]` and params `[rows, params_per_row]` of one head."""
    raw = codes.view(torch.float8_e4m3fn).double() if fmt.is_float else unpack(codes, fmt.bits).double()
    per_param = params.double().unflatten(-1, (fmt.num_params, fmt.num_groups(head_dim)))  # [rows, P, groups]
    if fmt.groups == "token":
        per_param = per_param.repeat_interleave(fmt.group_size, 0)[: codes.shape[0]]
    else:
        per_param = per_param.repeat_interleave(fmt.group_size, 2)[..., :head_dim]
    minimum = 0.0 if fmt.is_float else per_param[:, 1]
    return raw * per_param[:, 0] + minimum


@triton.jit
def unpack_fp16(packed, BITS: tl.constexpr, IS_FLOAT: tl.constexpr):
    """fp16 numbers `[rows, 8/BITS · bytes]` of a tile of bytes `[rows, bytes]`: codes 0 … 2^BITS − 1, or e4m3 divided by 256.

    No conversion from integer to float, which runs at a quarter of the rate of other instructions: the bits of a code below
    those of 1024.0 are 1024 + code. e4m3 moved to fp16's places has an exponent 8 too small, subnormals included.
    """
    wide = packed.to(tl.uint16)
    if IS_FLOAT:
        return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    elif BITS == 8:
        return _code_fp16(wide)
    elif BITS == 4:
        pair = tl.join(_code_fp16(wide & 15), _code_fp16(wide >> 4))
        return tl.reshape(pair, [packed.shape[0], 2 * packed.shape[1]])
    else:
        even = tl.join(_code_fp16(wide & 3), _code_fp16((wide >> 4) & 3))
        odd = tl.join(_code_fp16((wide >> 2) & 3), _code_fp16(wide >> 6))
        return tl.reshape(tl.join(even, odd), [packed.shape[0], 4 * packed.shape[1]])


@triton.jit
def _code_fp16(code):
    return (code | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def dequantized_tile(
    codes_ptr, params_ptr, table_ptr, token, start, exists, end, batch, head, table_stride_batch, table_stride_head,
    codes_outer, codes_token, codes_head, params_outer, params_row, params_head,
    BITS: tl.constexpr, IS_FLOAT: tl.constexpr, BY_TOKEN: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr, PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """fp16 [TILE, HEAD_DIM_PADDED] of the tokens that exist, 0 elsewhere. `start` is a multiple of TILE."""
    offsets = token_offsets(
        token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
        codes_outer, codes_token, codes_head, PAGED, BLOCK_SIZE,
    )  # fmt: skip
    byte = tl.arange(0, HEAD_DIM_PADDED * BITS // 8)
    mask = exists[:, None] & (byte < HEAD_DIM * BITS // 8)[None, :]
    codes = unpack_fp16(tl.load(codes_ptr + offsets[:, None] + byte[None, :], mask=mask, other=0), BITS, IS_FLOAT)
    if IS_FLOAT:
        codes = codes * 256.0
    if BY_TOKEN:
        GROUP: tl.constexpr = GROUP_SIZE if GROUP_SIZE < TILE else TILE
        NUM_GROUPS: tl.constexpr = TILE // GROUP
        row = start // GROUP_SIZE + tl.arange(0, NUM_GROUPS)
        row_exists = row * GROUP_SIZE < end
        row_offsets = token_offsets(
            row, row_exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            params_outer, params_row, params_head, PAGED, BLOCK_SIZE // GROUP_SIZE,
        )  # fmt: skip
        channel = tl.arange(0, HEAD_DIM_PADDED)
        pointers = params_ptr + row_offsets[:, None] + channel[None, :]
        used = row_exists[:, None] & (channel < HEAD_DIM)[None, :]
        grouped = tl.reshape(codes, [NUM_GROUPS, GROUP, HEAD_DIM_PADDED])
        grouped = grouped * tl.load(pointers, mask=used, other=0.0)[:, None, :]
        if not IS_FLOAT:
            grouped = grouped + tl.load(pointers + HEAD_DIM, mask=used, other=0.0)[:, None, :]
        values = tl.reshape(grouped, [TILE, HEAD_DIM_PADDED])
        # A row of params may reach past the tokens that exist: what it makes of their missing codes must not count.
        return tl.where(exists[:, None], values, 0.0)
    else:
        GROUP: tl.constexpr = GROUP_SIZE if GROUP_SIZE < HEAD_DIM else HEAD_DIM_PADDED  # type: ignore[no-redef]
        NUM_GROUPS: tl.constexpr = (HEAD_DIM + GROUP - 1) // GROUP  # type: ignore[no-redef]
        GROUPS_PADDED: tl.constexpr = HEAD_DIM_PADDED // GROUP
        row_offsets = token_offsets(
            token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            params_outer, params_row, params_head, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        group = tl.arange(0, GROUPS_PADDED)
        pointers = params_ptr + row_offsets[:, None] + group[None, :]
        used = exists[:, None] & (group < NUM_GROUPS)[None, :]
        grouped = tl.reshape(codes, [TILE, GROUPS_PADDED, GROUP])
        grouped = grouped * tl.load(pointers, mask=used, other=0.0)[:, :, None]
        if not IS_FLOAT:
            grouped = grouped + tl.load(pointers + NUM_GROUPS, mask=used, other=0.0)[:, :, None]
        return tl.reshape(grouped, [TILE, HEAD_DIM_PADDED])
