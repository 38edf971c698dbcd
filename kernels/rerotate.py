"""Keys rotated from the position they were computed at to the position inside the cache (StreamingLLM, arXiv 2309.17453).

Rotary embeddings (RoPE) turn the pair of channels j of a key at position p by p · inv_freq[j]; rotations add, so a key moves to
another position by one further turn of (new − old) · inv_freq[j]. Pairs are (j, j + rotary_dim/2) in the half-split
convention (Llama, Qwen, GPT-NeoX) and (2j, 2j + 1) in the interleaved one (GPT-J). Channels past rotary_dim stay.

Angles are kept in turns as 48-bit fixed point, because fp32 is too coarse: at 128k tokens, fp32 positions times
frequencies are wrong by up to 0.008 rad. The integer product wraps exactly where angles do. Sine and cosine are polynomials
on an eighth of a turn: the library's own handle arguments of any size with a stack frame, which this kernel has no need of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks
from kvsim.kernels.layouts import CacheShape, make_cache, token_offsets, tokens_of, view_cache
from kvsim.kernels.runtime import CompileSpec, ceil_div, launch, next_power_of_2, recorded

PHASE_BITS = 48
"""Fixed-point bits of a turn: an error of 2^-49 turns a position is below fp32's own at 2^24 positions."""
TILE_PAIRS = 1024
MAX_POSITION = 131072
CONVENTIONS = ("half_split", "interleaved")


@triton.jit
def sine_and_cosine_of_turns(turns):
    """sin and cos of 2π·turns for |turns| <= 1/2, to 1e-7: Taylor series on an eighth of a turn either side of a quarter."""
    quarter = tl.floor(turns * 4.0 + 0.5)
    x = (turns - quarter * 0.25) * 6.283185307179586  # |x| <= π/4
    square = x * x
    sine = x * (1.0 + square * (-1.0 / 6 + square * (1.0 / 120 + square * (-1.0 / 5040 + square * (1.0 / 362880)))))
    cosine = 1.0 + square * (
        -0.5 + square * (1.0 / 24 + square * (-1.0 / 720 + square * (1.0 / 40320 - square * (1.0 / 3628800))))
    )
    which = quarter.to(tl.int32) & 3
    swapped = (which & 1) != 0
    sine_turned = tl.where(swapped, cosine, sine)
    cosine_turned = tl.where(swapped, sine, cosine)
    return (
        tl.where((which & 2) != 0, -sine_turned, sine_turned),
        tl.where((which == 1) | (which == 2), -cosine_turned, cosine_turned),
    )


@triton.jit
def rerotate_kernel(
    keys_ptr, table_ptr, lengths_ptr, old_ptr, new_ptr, phase_ptr,
    kv_heads, outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head, max_tokens,
    half, PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, NEW_IS_SLOT: tl.constexpr,
    HALF_PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys of one head, TILE tokens: rotated in place."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    length = tl.load(lengths_ptr + row)
    start = tl.program_id(0) * TILE
    if start < length:
        token = start + tl.arange(0, TILE)
        exists = token < length
        old = tl.load(old_ptr + row * max_tokens + token, mask=exists, other=0)
        new = token
        if not NEW_IS_SLOT:
            new = tl.load(new_ptr + row * max_tokens + token, mask=exists, other=0)
        pair = tl.arange(0, HALF_PADDED)
        phase = tl.load(phase_ptr + pair, mask=pair < half, other=0)
        # The product wraps modulo 2^64, a whole number of turns; its top 24 of 48 bits are a signed fraction of a turn.
        product = (new - old).to(tl.int64)[:, None] * phase[None, :]
        turns = ((product << 16) >> 40).to(tl.float32) * (1.0 / 16777216.0)
        sine, cosine = sine_and_cosine_of_turns(turns)
        row_offsets = token_offsets(
            token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        if INTERLEAVED:
            channel = tl.arange(0, 2 * HALF_PADDED)
            pointers = keys_ptr + row_offsets[:, None] + channel[None, :]
            mask = exists[:, None] & (channel[None, :] < 2 * half)
            keys = tl.load(pointers, mask=mask, other=0.0)
            real, imaginary = tl.split(tl.reshape(keys.to(tl.float32), [TILE, HALF_PADDED, 2]))
            turned = tl.join(real * cosine - imaginary * sine, imaginary * cosine + real * sine)
            tl.store(pointers, tl.reshape(turned, [TILE, 2 * HALF_PADDED]).to(keys.dtype), mask=mask)
        else:
            pointers = keys_ptr + row_offsets[:, None] + pair[None, :]
            mask = exists[:, None] & (pair[None, :] < half)
            first = tl.load(pointers, mask=mask, other=0.0)
            real, imaginary = first.to(tl.float32), tl.load(pointers + half, mask=mask, other=0.0).to(tl.float32)
            tl.store(pointers, (real * cosine - imaginary * sine).to(first.dtype), mask=mask)
            tl.store(pointers + half, (imaginary * cosine + real * sine).to(first.dtype), mask=mask)


def phase_per_token(inverse_frequencies: torch.Tensor) -> torch.Tensor:
    """int64 turns a position, times 2^48, of each channel pair: what the kernel multiplies positions by.

    inverse_frequencies: radians a position, [rotary_dim / 2], as the model's rotary embedding has them (scaled RoPE too).
    """
    return (inverse_frequencies.double() / (2 * math.pi) * 2**PHASE_BITS).round().long()


def reference(
    k: torch.Tensor,
    lengths: torch.Tensor,
    old_positions: torch.Tensor,
    phases: torch.Tensor,
    *,
    new_positions: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    convention: str = "half_split",
) -> list[torch.Tensor]:
    """Rotated keys of each (sequence, head), [length, head_dim] float64, by complex numbers; k is left as it is."""
    half = phases.shape[0]
    rotated = []
    for sequence in range(lengths.shape[0]):
        for head in range(lengths.shape[1]):
            length = int(lengths[sequence, head])
            rows = tokens_of(k, block_table, sequence, head, length).double()
            new = torch.arange(length, device=k.device) if new_positions is None else new_positions[sequence, head, :length]
            by = new.double() - old_positions[sequence, head, :length].double()
            angle = by[:, None] * phases.double() / 2**PHASE_BITS * 2 * math.pi
            turn = torch.polar(torch.ones_like(angle), angle)
            first, second = (slice(half), slice(half, 2 * half))
            if convention == "interleaved":
                first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
            turned = torch.complex(rows[:, first], rows[:, second]) * turn
            rows = rows.clone()
            rows[:, first], rows[:, second] = turned.real, turned.imag
            rotated.append(rows)
    return rotated


def run(
    k: torch.Tensor,
    lengths: torch.Tensor,
    old_positions: torch.Tensor,
    phases: torch.Tensor,
    *,
    new_positions: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    convention: str = "half_split",
) -> torch.Tensor:
    """Turns the keys of each head from old to new positions, in place, and returns k.

    k, lengths, block_table: keys of a cache (kvsim.kernels.layouts). old_positions, new_positions: [batch, kv_heads, tokens]
    int32; new_positions None: the slot in the cache. phases: `phase_per_token` of the model's frequencies, [rotary_dim / 2].
    Positions differ by less than 2^24.
    """
    checks.tensor("k", k, checks.HALF_DTYPES, (None, None, None, None), contiguous=False)
    view = view_cache("k", k, lengths, block_table)
    checks.head_dim(view.head_dim)
    checks.choice("convention", convention, CONVENTIONS)
    checks.tensor("phases", phases, torch.int64, (None,), k.device)
    half = phases.shape[0]
    checks.integer("phases.shape[0]", half, 1, view.head_dim // 2)
    shape = (view.batch, view.kv_heads, view.max_tokens)
    checks.tensor("old_positions", old_positions, torch.int32, shape, k.device)
    if new_positions is not None:
        checks.tensor("new_positions", new_positions, torch.int32, shape, k.device)
    padded = next_power_of_2(half)
    tile = max(1, TILE_PAIRS // padded)
    launch(
        rerotate_kernel, (ceil_div(view.max_tokens, tile), view.batch * view.kv_heads),
        k, k if block_table is None else block_table, lengths, old_positions,
        old_positions if new_positions is None else new_positions, phases, view.kv_heads, *view.strides, view.max_tokens, half,
        PAGED=view.paged, BLOCK_SIZE=view.block_size, INTERLEAVED=convention == "interleaved",
        NEW_IS_SLOT=new_positions is None, HALF_PADDED=padded, TILE=tile,
    )  # fmt: skip
    return k


@dataclass(frozen=True, kw_only=True)
class Shape(CacheShape):
    convention: str = "half_split"


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Positions that ascend from 0 to 128k, of which the cache holds a few; Llama 3's base of 500,000."""
    inputs = make_cache(shape, rng, device)
    max_tokens = shape.tokens if inputs["block_table"] is None else inputs["block_table"].shape[-1] * shape.block_size
    gaps = rng.integers(1, max(2, MAX_POSITION // max_tokens), (shape.batch, shape.kv_heads, max_tokens))
    pairs = torch.arange(shape.head_dim // 2, dtype=torch.float64)
    return {
        "k": inputs["k"], "lengths": inputs["lengths"], "block_table": inputs["block_table"],
        "old_positions": torch.from_numpy(gaps.cumsum(-1)).to(torch.int32).to(device),
        "phases": phase_per_token(500000.0 ** (-2 * pairs / shape.head_dim)).to(device), "convention": shape.convention,
    }  # fmt: skip


def bytes_moved(shape: Shape) -> float:
    """Keys read and written, positions read."""
    return float(sum(shape.pair_lengths()) * (2 * shape.head_dim * shape.torch_dtype.itemsize + 4))


def flops(shape: Shape) -> float:
    """Three a channel: two products and a sum (kvsim/policies/kernels.py); those of the angles are not counted."""
    return 3.0 * sum(shape.pair_lengths()) * shape.head_dim


TOLERANCE = {torch.float16: 2**-11 + 2e-6, torch.bfloat16: 2**-8 + 2e-6}
"""Relative to the length of the pair: half a unit in the last place of the stored type, and 2e-6 of fp32 angles."""


def compile_specs() -> list[CompileSpec]:
    specs = []
    for convention, head_dim, layout in (("half_split", 128, "paged"), ("half_split", 96, "contiguous"), ("interleaved", 256, "paged")):
        shape = Shape(tokens=64, head_dim=head_dim, layout=layout, convention=convention)
        inputs = make_inputs(shape, np.random.default_rng(0))
        specs += recorded(f"{convention} d={head_dim} {layout}", lambda inputs=inputs: run(**inputs))
    return specs
