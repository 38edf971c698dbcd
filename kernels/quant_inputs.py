"""Shapes and random inputs of `kv_quant_decode_attention`, and what it moves: named formats of a quantised cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvsim.kernels import checks, decode_attention
from kvsim.kernels.layouts import CacheShape, cache_dims, generator, make_block_table, make_lengths
from kvsim.kernels.packing import QuantFormat, kivi_formats
from kvsim.kernels.runtime import ceil_div
from kvsim.kernels.splits import parts_bytes

FORMATS = ("kivi2", "kivi4", "int4_group64", "int4_token", "int8_group64", "int8_token", "fp8_group64", "fp8_token")
KIVI_GROUP = 32
"""Tokens of a key group and channels of a value group (KIVI, arXiv 2402.02750)."""
POISON_CODE = 0x7F
"""NaN in e4m3; in integer codes of slots that no head holds, what its NaN params make NaN."""


def formats_of(name: str, head_dim: int) -> tuple[QuantFormat, QuantFormat]:
    """Formats of K and V by the name of one of FORMATS; groups of 64 channels are FlexGen's (arXiv 2303.06865)."""
    checks.choice("format", name, FORMATS)
    if name.startswith("kivi"):
        return kivi_formats(int(name.removeprefix("kivi")), KIVI_GROUP)
    element, scales = name.split("_")
    fmt = QuantFormat(element, "channel", head_dim if scales == "token" else 64)
    return fmt, fmt


@dataclass(frozen=True, kw_only=True)
class Shape(decode_attention.Shape):
    """A cache of `format` (FORMATS); of KIVI's, the newest tokens of each head are in full precision (paper: R = 128)."""

    format: str = "kivi4"
    residual_tokens: int = 128

    @property
    def formats(self) -> tuple[QuantFormat, QuantFormat]:
        return formats_of(self.format, self.head_dim)

    @property
    def has_ring(self) -> bool:
        return self.format.startswith("kivi")

    def quantized_lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of each head whose keys and whose values are codes: KIVI's keys leave R at a time, values one by one."""
        lengths, full = self.pair_lengths(), self.residual_tokens
        if not self.has_ring:
            return lengths, lengths
        return [n // full * full for n in lengths], [max(0, n - full) for n in lengths]


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device) -> dict[str, Any]:
    """Random codes and params whose values spread over about ±2, standard normal q and rings; unused slots are NaN."""
    gen = generator(rng, device)
    table, num_blocks = make_block_table(shape, rng, device)
    inputs: dict[str, Any] = {"lengths": make_lengths(shape, device), "block_table": table}
    counts = shape.quantized_lengths()
    for name, fmt, lengths in zip("kv", shape.formats, counts, strict=True):
        codes, params = _random_codes(shape, fmt, gen)
        inputs[f"{name}_format"] = fmt
        inputs[f"{name}_codes"] = _in_layout(codes, shape, lengths, table, num_blocks, 1, POISON_CODE)
        inputs[f"{name}_params"] = _in_layout(params, shape, lengths, table, num_blocks, fmt.tokens_per_params, float("nan"))
    options: dict[str, Any] = {"generator": gen, "device": device, "dtype": shape.torch_dtype}
    inputs["q"] = torch.randn(shape.batch, shape.kv_heads * shape.group, shape.head_dim, **options)
    if shape.has_ring:
        for name, lengths in zip("kv", counts, strict=True):
            dims = (shape.batch, shape.kv_heads)
            inputs[f"{name}_quantized"] = torch.tensor(lengths, dtype=torch.int32, device=device).reshape(dims)
            ring = torch.randn(*dims, shape.residual_tokens, shape.head_dim, **options)
            for pair, (quantized, length) in enumerate(zip(lengths, shape.pair_lengths(), strict=True)):
                used = torch.arange(quantized, length) % shape.residual_tokens
                unused = torch.ones(shape.residual_tokens, dtype=torch.bool).index_fill(0, used, False)
                ring[divmod(pair, shape.kv_heads)][unused.to(device)] = float("nan")
            inputs[f"{name}_ring"] = ring
    return inputs


def _random_codes(shape: Shape, fmt: QuantFormat, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense `[batch, kv_heads, rows, row]` codes and params of all tokens, whole blocks and groups of them."""
    tokens = ceil_div(max(1, shape.tokens), shape.block_size) * shape.block_size
    rows = ceil_div(tokens, fmt.tokens_per_params)
    pairs, groups = (shape.batch, shape.kv_heads), fmt.num_groups(shape.head_dim)
    device = gen.device
    spread = 0.75 + 0.5 * torch.rand(*pairs, rows, groups, generator=gen, device=device)
    if fmt.is_float:
        numbers = torch.randn(*pairs, tokens, shape.head_dim, generator=gen, device=device)
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8), spread.half()
    codes = torch.randint(0, 256, (*pairs, tokens, fmt.row_bytes(shape.head_dim)), generator=gen, device=device, dtype=torch.uint8)
    return codes, torch.cat([spread * (4 / fmt.max_code), -2 * spread], dim=-1).half()


def _in_layout(
    dense: torch.Tensor, shape: CacheShape, lengths: list[int], table: torch.Tensor | None, num_blocks: int,
    tokens_per_row: int, fill: float,
) -> torch.Tensor:
    """The rows that heads hold, in the shape's layout; every other row is `fill`."""  # fmt: skip
    out = dense.new_full(cache_dims(shape, num_blocks, dense.shape[-1], tokens_per_row), fill)
    rows_per_block = shape.block_size // tokens_per_row
    for pair, length in enumerate(lengths):
        batch, head = divmod(pair, shape.kv_heads)
        rows = ceil_div(length, tokens_per_row)
        if table is None:
            out[batch, head, :rows] = dense[batch, head, :rows]
        elif rows:
            per_head = table.dim() == 3
            blocks = (table[batch, head] if per_head else table[batch])[: ceil_div(length, shape.block_size)].long()
            held = dense[batch, head, : len(blocks) * rows_per_block].clone()
            held[rows:] = fill
            out[blocks, :, 0 if per_head else head] = held.reshape(len(blocks), rows_per_block, -1)
    return out


def bytes_moved(shape: Shape) -> int:
    """Codes and params of quantised tokens, the others in full; q, output, log-sum-exp, block table and parts of splits."""
    pairs = shape.batch * shape.kv_heads
    stored = 0
    for fmt, lengths in zip(shape.formats, shape.quantized_lengths(), strict=True):
        stored += sum(fmt.stored_bytes(n, shape.head_dim) for n in lengths)
        stored += 2 * shape.head_dim * (sum(shape.pair_lengths()) - sum(lengths))
    table = 0 if shape.layout == "contiguous" else sum(4 * ceil_div(n, shape.block_size) for n in shape.pair_lengths())
    parts = parts_bytes(pairs, shape.group, shape.head_dim, shape.tokens, decode_attention.tile_tokens(shape.head_dim))
    return stored + table + pairs * shape.group * (2 * shape.head_dim * 2 + 4) + parts


def flops(shape: Shape) -> int:
    """QKᵀ and PV as in plain attention; turning codes into numbers is not counted."""
    return decode_attention.flops(shape)
