"""The two layouts of a KV cache, and caches of random numbers for tests and benchmarks.

| layout | K and V | block_table |
|---|---|---|
| contiguous | `[batch, kv_heads, tokens, head_dim]` | None |
| paged | `[blocks, block_size, kv_heads, head_dim]` | int32 `[batch, max_blocks]`: a block holds all heads of its tokens |
| paged per head | `[blocks, block_size, 1, head_dim]` | int32 `[batch, kv_heads, max_blocks]`: a block belongs to one head |

The third is how heads of one sequence can free blocks by themselves (KV-Compress, arXiv 2410.00161). In all three `lengths`,
int32 `[batch, kv_heads]`, says how many tokens each head of each sequence holds: slots 0 … length−1, in any order of position. A length may
be 0. Entries of a block table past a length, and slots past it, may hold anything, NaN included. Channels lie side by side;
other strides are free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks

LAYOUTS = ("contiguous", "paged", "paged_per_head")
RAGGED_STEP = 0.6180339887498949  # the golden ratio's fraction spreads lengths evenly over (0, 1)


@triton.jit
def token_offsets(
    token, exists, batch, head, table_ptr, table_stride_batch, table_stride_head, outer_stride, token_stride, head_stride,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Element offset (int64) of channel 0 of each of `token`; `batch` and `head` are int64. Blocks are looked up where `exists`."""
    if PAGED:
        entry = table_ptr + batch * table_stride_batch + head * table_stride_head + token // BLOCK_SIZE
        block = tl.load(entry, mask=exists, other=0).to(tl.int64)
        return block * outer_stride + head * head_stride + (token % BLOCK_SIZE) * token_stride
    else:
        return batch * outer_stride + head * head_stride + token.to(tl.int64) * token_stride


@dataclass(frozen=True)
class CacheView:
    """Sizes and strides (elements) of a checked cache, as kernels take them."""

    batch: int
    kv_heads: int
    head_dim: int
    max_tokens: int
    """Most tokens a head can hold here: grid sizes come from it, since lengths live on the device."""
    paged: bool
    block_size: int
    outer_stride: int
    token_stride: int
    head_stride: int
    table_stride_batch: int
    table_stride_head: int

    @property
    def strides(self) -> tuple[int, int, int, int, int]:
        """In the order kernels take them: outer, token, head, and of the block table batch, head."""
        return self.outer_stride, self.token_stride, self.head_stride, self.table_stride_batch, self.table_stride_head


def view_cache(name: str, cache: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor | None) -> CacheView:
    """Check one tensor of a cache (last dimension of any size) against its lengths and table; raises ValueError."""
    checks.tensor("lengths", lengths, torch.int32, (None, None), cache.device)
    batch, kv_heads = lengths.shape
    checks.require(cache.dim() == 4, f"{name}.shape", tuple(cache.shape), "have 4 dimensions", "see kvsim.kernels.layouts")
    checks.last_dim_dense(name, cache)
    if block_table is None:
        checks.tensor(name, cache, cache.dtype, (batch, kv_heads, None, None), contiguous=False)
        checks.lengths(lengths, cache.shape[2])
        outer, head, token, _ = cache.stride()
        return CacheView(batch, kv_heads, cache.shape[3], cache.shape[2], False, 1, outer, token, head, 0, 0)
    per_head = block_table.dim() == 3
    shape = (batch, kv_heads, None) if per_head else (batch, None)
    checks.tensor("block_table", block_table, torch.int32, shape, cache.device)
    checks.tensor(name, cache, cache.dtype, (None, None, 1 if per_head else kv_heads, None), contiguous=False)
    block_size = cache.shape[1]
    checks.require(
        block_size & (block_size - 1) == 0, f"{name}.shape[1]", block_size, "be a power of two (the block size)", "use 16 or 32"
    )
    outer, token, head, _ = cache.stride()
    tables = (block_table.stride(0), block_table.stride(1) if per_head else 0)
    max_tokens = block_table.shape[-1] * block_size
    checks.lengths(lengths, max_tokens)
    return CacheView(
        batch, kv_heads, cache.shape[3], max_tokens, True, block_size, outer, token, 0 if per_head else head, *tables
    )


def view_kv(k: Any, v: Any, lengths: torch.Tensor, block_table: torch.Tensor | None) -> CacheView:
    """Check K and V of 16-bit elements that share one layout, and a head_dim that kernels support; raises ValueError."""
    checks.tensor("k", k, checks.HALF_DTYPES, contiguous=False)
    checks.tensor("v", v, k.dtype, tuple(k.shape), k.device, contiguous=False)
    view = view_cache("k", k, lengths, block_table)
    checks.head_dim(view.head_dim)
    checks.require(v.stride() == k.stride(), "v.stride()", v.stride(), f"equal those of k, {k.stride()}", "copy one of them")
    return view


def tokens_of(
    cache: torch.Tensor, block_table: torch.Tensor | None, batch: int, head: int, num_tokens: int
) -> torch.Tensor:
    """`[num_tokens, last]` of one head, token after token: slow and obvious, for references."""
    if block_table is None:
        return cache[batch, head, :num_tokens]
    per_head = block_table.dim() == 3
    table = block_table[batch, head] if per_head else block_table[batch]
    size = cache.shape[1]
    rows = [cache[int(table[t // size]), t % size, 0 if per_head else head] for t in range(num_tokens)]
    return torch.stack(rows) if rows else cache.new_empty(0, cache.shape[-1])


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """A cache of `tokens` per head, or with `ragged` of lengths from 0 to `tokens`; the base of the kernels' shapes."""

    batch: int = 1
    kv_heads: int = 1
    tokens: int = 1
    head_dim: int = 128
    dtype: str = "bfloat16"
    layout: str = "contiguous"
    block_size: int = 16
    ragged: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float16": torch.float16, "bfloat16": torch.bfloat16}[self.dtype]

    def pair_lengths(self) -> list[int]:
        """Tokens of each (sequence, KV head). Ragged: the first empty, the last full, the others spread between."""
        pairs = self.batch * self.kv_heads
        if not self.ragged:
            return [self.tokens] * pairs
        return [0, *(int(self.tokens * (i * RAGGED_STEP % 1)) for i in range(1, pairs - 1)), self.tokens][-pairs:]


def generator(rng: np.random.Generator, device: str | torch.device) -> torch.Generator:
    """A torch generator on the device, seeded from `rng`: gigabytes of inputs should not be drawn on the host."""
    return torch.Generator(device).manual_seed(int(rng.integers(2**62)))


def make_lengths(shape: CacheShape, device: str | torch.device) -> torch.Tensor:
    return torch.tensor(shape.pair_lengths(), dtype=torch.int32, device=device).reshape(shape.batch, shape.kv_heads)


def make_block_table(
    shape: CacheShape, rng: np.random.Generator, device: str | torch.device
) -> tuple[torch.Tensor | None, int]:
    """A table of blocks in random order, with entries past each length out of range, and the number of blocks."""
    checks.choice("layout", shape.layout, LAYOUTS)
    if shape.layout == "contiguous":
        return None, 0
    max_blocks = max(1, -(-shape.tokens // shape.block_size))
    rows = shape.batch * (shape.kv_heads if shape.layout == "paged_per_head" else 1)
    num_blocks = rows * max_blocks + 1  # block 0 belongs to nobody
    table = 1 + torch.from_numpy(rng.permutation(rows * max_blocks)).to(torch.int32).reshape(rows, max_blocks)
    lengths = torch.tensor(shape.pair_lengths()).reshape(rows, -1).amax(1)
    table[torch.arange(max_blocks) * shape.block_size >= lengths[:, None]] = 2**30
    dims = (shape.batch, shape.kv_heads) if shape.layout == "paged_per_head" else (shape.batch,)
    return table.reshape(*dims, max_blocks).to(device), num_blocks


def cache_dims(shape: CacheShape, num_blocks: int, last: int, tokens_per_row: int = 1) -> tuple[int, ...]:
    """Dimensions of a cache tensor of that layout with `last` elements a row, a row for every `tokens_per_row` tokens."""
    if shape.layout == "contiguous":
        return shape.batch, shape.kv_heads, max(1, -(-shape.tokens // tokens_per_row)), last
    heads = 1 if shape.layout == "paged_per_head" else shape.kv_heads
    return num_blocks, shape.block_size // tokens_per_row, heads, last


def make_cache(shape: CacheShape, rng: np.random.Generator, device: str | torch.device) -> dict[str, Any]:
    """Standard normal `k` and `v`, `lengths` and `block_table`; slots that no head holds are NaN."""
    gen = generator(rng, device)
    lengths = make_lengths(shape, device)
    table, num_blocks = make_block_table(shape, rng, device)
    dims = cache_dims(shape, num_blocks, shape.head_dim)
    k, v = (torch.randn(dims, generator=gen, device=device, dtype=shape.torch_dtype) for _ in range(2))
    for cache in (k, v):
        poison_unused(cache, shape, table)
    return {"k": k, "v": v, "lengths": lengths, "block_table": table}


def poison_unused(cache: torch.Tensor, shape: CacheShape, block_table: torch.Tensor | None) -> None:
    """NaN in every slot that no head holds, so that a kernel that uses one shows it."""
    unused = torch.ones(cache.shape[:3], dtype=torch.bool, device=cache.device)
    for pair, length in enumerate(shape.pair_lengths()):
        batch, head = divmod(pair, shape.kv_heads)
        if block_table is None:
            unused[batch, head, :length] = False
            continue
        per_head = block_table.dim() == 3
        table = (block_table[batch, head] if per_head else block_table[batch]).long()
        whole, rest = divmod(length, shape.block_size)
        column = 0 if per_head else head
        unused[table[:whole], :, column] = False
        if rest:
            unused[table[whole], :rest, column] = False
    cache[unused] = float("nan")
