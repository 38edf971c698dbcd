"""ThinK's gather-copy of keys: the kept channels of each head, ascending, padded with zeros to whole tiles of 16.

Of d channels a head keeps T = d − int(d·λ) (the authors' code; 77 of 128 at λ = 0.4) and stores T rounded up to a multiple of 16
(80), so that rows stay aligned and tensor cores see whole tiles (policies.md, ThinK; arXiv 2407.21018). A warp's loads fall
within one row of K, so whole sectors are used however channels are chosen.
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
from kvsim.kernels.runtime import CompileSpec, ceil_div, launch, next_power_of_2, recorded

CHANNEL_TILE = 16
"""Stored channels are a multiple of it: a tile of the tensor cores, and a 32 B sector (kvsim/policies/think.py)."""
GATHER_ELEMENTS = 2048


@triton.jit
def gather_kernel(
    k_ptr, out_ptr, table_ptr, lengths_ptr, channels_ptr, kv_heads,
    outer_stride, token_stride, head_stride, table_stride_batch, table_stride_head,
    out_outer_stride, out_token_stride, out_head_stride,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEPT: tl.constexpr, STORED: tl.constexpr,
    STORED_PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    length = tl.load(lengths_ptr + row)
    start = tl.program_id(0) * TILE
    if start < length:
        token = start + tl.arange(0, TILE)
        exists = token < length
        slot = tl.arange(0, STORED_PADDED)
        channel = tl.load(channels_ptr + row * KEPT + slot, mask=slot < KEPT, other=0)
        inside = tl.minimum(token, length - 1)  # a valid row for every thread: loads need no predicate
        source = token_offsets(
            inside, inside >= 0, batch, head, table_ptr, table_stride_batch, table_stride_head,
            outer_stride, token_stride, head_stride, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        target = token_offsets(
            token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head,
            out_outer_stride, out_token_stride, out_head_stride, PAGED, BLOCK_SIZE,
        )  # fmt: skip
        keys = tl.load(k_ptr + source[:, None] + channel[None, :])
        keys = tl.where(slot[None, :] < KEPT, keys, 0.0)
        tl.store(out_ptr + target[:, None] + slot[None, :], keys, mask=exists[:, None] & (slot[None, :] < STORED))


def kept_channels(head_dim: int, pruned_frac: float) -> int:
    """T: channels that stay, as the authors' code counts them; 1e-9 so that 0.3 · 10 prunes 3."""
    return head_dim - int(head_dim * pruned_frac + 1e-9)


def stored_channels(num_channels: int) -> int:
    """T rounded up to whole tiles."""
    return -(-num_channels // CHANNEL_TILE) * CHANNEL_TILE


def reference(
    k: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Rows of each (sequence, head), [length, stored channels], zeros in the padding; `out` is not touched."""
    gathered = []
    for sequence in range(lengths.shape[0]):
        for head in range(lengths.shape[1]):
            rows = tokens_of(k, block_table, sequence, head, int(lengths[sequence, head]))
            stored = rows.new_zeros(rows.shape[0], stored_channels(channels.shape[2]))
            for slot, channel in enumerate(channels[sequence, head].tolist()):
                stored[:, slot] = rows[:, channel]
            gathered.append(stored)
    return gathered


def run(
    k: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kept channels of each head's first `length` tokens (ThinK: the prompt less its newest 32), in a cache of their own.

    k, lengths, block_table: keys of a cache (kvsim.kernels.layouts). channels: [batch, kv_heads, T] int32, ascending in each
    head. out: a cache of k's layout and block table, its rows stored_channels(T) wide; None: allocated. Returns out; rows past
    a length are left as they are.
    """
    checks.tensor("k", k, checks.HALF_DTYPES, (None, None, None, None), contiguous=False)
    view = view_cache("k", k, lengths, block_table)
    checks.head_dim(view.head_dim)
    checks.tensor("channels", channels, torch.int32, (view.batch, view.kv_heads, None), k.device)
    num_channels = channels.shape[2]
    checks.integer("channels.shape[2]", num_channels, 1, view.head_dim)
    if channels.device.type == "cpu" and channels.numel():
        low, high = int(channels.min()), int(channels.max())
        in_head = 0 <= low <= high < view.head_dim
        checks.require(in_head, "channels", f"{low}..{high}", f"lie in 0..{view.head_dim - 1}", "check the selection")
        ascending = bool((channels.diff(dim=2) > 0).all())
        checks.require(ascending, "channels", "out of order", "ascend in each head without repeats", "sort them")
    stored = stored_channels(num_channels)
    shape = (*k.shape[:3], stored)
    out = torch.empty(shape, dtype=k.dtype, device=k.device) if out is None else out
    checks.tensor("out", out, k.dtype, shape, k.device)
    target = view_cache("out", out, lengths, block_table)
    padded = next_power_of_2(stored)
    tile = GATHER_ELEMENTS // padded
    launch(
        gather_kernel, (ceil_div(view.max_tokens, tile), view.batch * view.kv_heads),
        k, out, k if block_table is None else block_table, lengths, channels, view.kv_heads, *view.strides, *target.strides[:3],
        PAGED=view.paged, BLOCK_SIZE=view.block_size, KEPT=num_channels, STORED=stored, STORED_PADDED=padded, TILE=tile,
    )  # fmt: skip
    return out


@dataclass(frozen=True, kw_only=True)
class Shape(CacheShape):
    """pruned_frac: λ of the paper (0.4: 77 channels of 128 kept, 80 stored)."""

    pruned_frac: float = 0.4

    @property
    def num_channels(self) -> int:
        return kept_channels(self.head_dim, self.pruned_frac)


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device = "cpu") -> dict[str, Any]:
    inputs = make_cache(shape, rng, device)
    order = rng.random((shape.batch, shape.kv_heads, shape.head_dim)).argsort(-1)[..., : shape.num_channels]
    channels = torch.from_numpy(np.sort(order, -1)).to(torch.int32).to(device)
    return {"k": inputs["k"], "lengths": inputs["lengths"], "channels": channels, "block_table": inputs["block_table"]}


def bytes_moved(shape: Shape) -> float:
    """Whole rows read, since a sector holds 16 channels, and the stored channels written; channel numbers read."""
    row = (shape.head_dim + stored_channels(shape.num_channels)) * shape.torch_dtype.itemsize
    return float(sum(shape.pair_lengths()) * row + 4 * shape.batch * shape.kv_heads * shape.num_channels)


def flops(shape: Shape) -> float:
    """None: it copies."""
    return 0.0


TOLERANCE = {dtype: 0.0 for dtype in checks.HALF_DTYPES}
"""A copy is a copy, bit by bit."""


def compile_specs() -> list[CompileSpec]:
    specs = []
    for head_dim, layout in ((128, "paged"), (256, "contiguous"), (96, "paged_per_head")):
        shape = Shape(tokens=64, head_dim=head_dim, layout=layout)
        inputs = make_inputs(shape, np.random.default_rng(0))
        specs += recorded(f"d={head_dim} {layout}", lambda inputs=inputs: run(**inputs))
    return specs
