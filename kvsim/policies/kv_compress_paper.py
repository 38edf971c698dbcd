"""What KV-Compress costs in the paper's own engine, a fork of vLLM 0.6.0 (code: github.com/IsaacRe/vllm-kvcompress).

It compresses with PyTorch calls, an eviction kernel of one thread a sequence, and loops over the sequences in Python. Counts of
launches, waits and bytes are read off its code; prices are those of any launch, wait and byte.
"""

from __future__ import annotations

from kvsim.ops import Copy, HostWork, Op, PolicyKernel
from kvsim.policies.base import CacheShape

_ENGINE = "vllm_v0"
_BLOCK_COUNTS_PER_STEP = 3
"""New blocks of a sequence are counted in must_preempt and twice in _batch_schedule_running (core/scheduler.py)."""
_LAUNCHES_PER_COUNT, _WAITS_PER_COUNT = 4, 1
"""Lengths + 1, % block size, == 1, sum; then int() waits for the device (kvcompress/block_manager.py)."""
_TABLE_PASSES = 21
"""Reads, and as many writes, of a byte an entry: two masks of allocated blocks and what is new between them, the int32 tables
gathered, filled in and put back, and gathered twice more for attention (kvcompress/block.py, attention/backends/flash_attn.py).
"""
_LOADS_PER_EVICTED_KV = 3
"""schedule_cache_evictions_kernel walks the sorted KVs: block to layer and head, then the KV's position, each from the L2
cache; index, lengths and counters come from L1, with arithmetic another latency's worth (csrc/kvcompress_eviction_kernels.cu).
"""
_SCORE_BYTES = 48
"""Per query head, window query and key: 16-bit logits written and read twice, then fp32: widened, masked, softmax, squared,
masked again, summed (_naive_kvc_masked_attention in attention/backends/flash_attn.py).
"""
_SCORE_LAUNCHES = 20
"""A layer, as above."""
_SORTED_BYTES, _SORT_LAUNCHES = 500, 40
"""Per KV of a prompt: gathered with its indices, sorted by metric (radix, four passes over 12 B) and, stable, by sequence."""
_WORKSPACE_BYTES = 340
"""Per KV that a compression may sort, used or not: two more sorts and the gathers between them (kvcompress/scheduler.py)."""


def prompt_scores(shape: CacheShape, prompt_tokens: int, window_tokens: int) -> PolicyKernel:
    """Eager attention of the last queries over keys and values repeated for every query head."""
    keys = prompt_tokens * shape.kv_heads * shape.head_dim * shape.element_bytes
    repeated = prompt_tokens * shape.q_heads * shape.head_dim * shape.element_bytes
    logits = _SCORE_BYTES * shape.q_heads * window_tokens * prompt_tokens
    return PolicyKernel(
        "prefill_scores", variant="eager", bytes_moved=shape.num_layers * (2 * keys + 3 * repeated + logits),
        flops=2.0 * window_tokens * prompt_tokens * shape.q_heads * shape.head_dim * shape.num_layers,
        num_launches=_SCORE_LAUNCHES * shape.num_layers,
    )  # fmt: skip


def eviction(num_slots: int, num_evicted: int, most_kvs: int) -> tuple[Op, ...]:
    """Sorts, and the walk of one thread over what it evicts. most_kvs: of the workspace."""
    sorts = PolicyKernel(
        "select", variant="sorts", bytes_moved=float(_SORTED_BYTES * num_slots + _WORKSPACE_BYTES * most_kvs),
        num_launches=_SORT_LAUNCHES,
    )  # fmt: skip
    walk = PolicyKernel(
        "select", variant="one thread", bytes_moved=0.0, num_launches=1,
        dependent_loads=float(_LOADS_PER_EVICTED_KV * num_evicted),
    )  # fmt: skip
    return sorts, walk


def every_step(shape: CacheShape, batch: int, table_tokens: int) -> tuple[Op, ...]:
    """Each sequence's new blocks counted on the device and waited for, and block tables of table_tokens copied."""
    counts = batch * _BLOCK_COUNTS_PER_STEP
    entries = batch * shape.num_pairs * -(-table_tokens // shape.block_size_tokens)
    return (
        HostWork(_ENGINE, "torch_call", counts * _LAUNCHES_PER_COUNT),
        HostWork(_ENGINE, "sync", counts * _WAITS_PER_COUNT),
        Copy("hbm", _TABLE_PASSES * entries),
    )
