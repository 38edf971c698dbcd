"""Bytes and FLOPs of the compression kernels, one formula each, shared by the policies that launch them.

Names are those of the files in `kernels/`. `num_slots` counts (token, layer, KV head) triples over the sequences acted
upon; every kernel is launched once a layer. Scores are fp32.
"""

from __future__ import annotations

from kvsim.ops import Op, PolicyKernel
from kvsim.policies.base import CacheShape, Policy, SequenceShape

SCORE_BYTES = 4


def kept_slots(policy: Policy, shape: CacheShape, seq: SequenceShape) -> int:
    """(token, layer, KV head) triples of a sequence that a policy keeps at the end of its prefill."""
    return sum(group.num_pairs * policy.stored(seq, group) for group in policy.head_groups(shape))


def keep_by_window(shape: CacheShape, prompt_tokens: int, window_tokens: int, num_kept_slots: int) -> tuple[Op, ...]:
    """What SnapKV and its kin launch at the end of prefill: votes of the last queries, a top-k, one gather."""
    return (
        window_scores(shape, prompt_tokens, window_tokens),
        select(shape, prompt_tokens * shape.num_pairs),
        compact(shape, num_kept_slots),
    )


def keep_by_window_scratch(shape: CacheShape, prompt_tokens: int, window_tokens: int, kept_tokens: int) -> int:
    """Bytes: fp32 votes [q_heads, window, tokens] of one layer, and its kept K and V beside the old ones."""
    votes = SCORE_BYTES * shape.q_heads * window_tokens * prompt_tokens
    return votes + int(min(kept_tokens, prompt_tokens) * shape.kv_heads * shape.slot_bytes)


def window_scores(shape: CacheShape, prompt_tokens: float, window_tokens: int) -> PolicyKernel:
    """Votes of the last queries over the prompt: one read of K, 2·w·n·Hq·d FLOPs a layer, pooled scores per KV head.

    prompt_tokens: the mean over (layer, KV head) pairs where they differ.
    """
    keys = prompt_tokens * shape.num_pairs * shape.head_dim * shape.element_bytes
    votes = window_tokens * prompt_tokens * shape.q_heads * shape.num_layers * SCORE_BYTES
    return PolicyKernel(
        "prefill_scores",
        variant="window",
        bytes_moved=keys + 2 * votes + prompt_tokens * shape.num_pairs * SCORE_BYTES,  # votes are written and pooled
        flops=2.0 * window_tokens * prompt_tokens * shape.q_heads * shape.head_dim * shape.num_layers,
        num_launches=2 * shape.num_layers,
    )


def prompt_scores(shape: CacheShape, new_tokens: int, prior_tokens: int, passes: int = 1) -> PolicyKernel:
    """Column sums of attention over every prompt query: QKᵀ recomputed, as FlashAttention keeps no probabilities.

    passes: how often QKᵀ is recomputed. One where FlashAttention's row sums serve; two for other row sums.
    """
    pairs = new_tokens * prior_tokens + new_tokens * (new_tokens + 1) / 2
    resident = prior_tokens + new_tokens
    keys = resident * shape.num_pairs * shape.head_dim * shape.element_bytes
    queries = new_tokens * shape.q_heads * shape.num_layers * shape.head_dim * shape.element_bytes
    return PolicyKernel(
        "prefill_scores",
        variant="sum" if passes == 1 else "gumbel",
        bytes_moved=passes * (keys + queries) + 2 * resident * shape.num_pairs * SCORE_BYTES,
        flops=2.0 * passes * pairs * shape.q_heads * shape.head_dim * shape.num_layers,
        num_launches=passes * shape.num_layers,
    )


def accumulate_scores(
    shape: CacheShape, num_slots: int, passes: int = 1, score_bytes: int = SCORE_BYTES
) -> PolicyKernel:
    """Logits of a decode step reduced into scores: raw logits per query head written and read, scores updated.

    passes: softmax-like passes over the logits (Keyformer runs a second, Gumbel one). score_bytes: fewer than SCORE_BYTES: a counter,
    of probabilities above a threshold (Scissorhands).
    """
    logits = num_slots * shape.group * SCORE_BYTES
    one_pass = "sum" if score_bytes == SCORE_BYTES else "count"
    return PolicyKernel(
        "decode_attention_scored",
        variant=one_pass if passes == 1 else "gumbel",
        bytes_moved=2 * passes * logits + 2 * num_slots * score_bytes,
        num_launches=passes * shape.num_layers,
    )


def select(shape: CacheShape, num_slots: int, one: bool = False) -> PolicyKernel:
    """Exact top-k per head by radix selection: four 8-bit passes over fp32 scores, indices of the kept written.

    one: all but one are kept, as steady states do in every step.
    """
    return PolicyKernel("select", bytes_moved=5.0 * num_slots * SCORE_BYTES, num_launches=shape.num_layers, variant="one" if one else "")


def compact(shape: CacheShape, kept_slots: int) -> PolicyKernel:
    """Gather-copy of the kept K and V: read once and written once."""
    return PolicyKernel("compact", bytes_moved=2.0 * kept_slots * shape.slot_bytes, num_launches=shape.num_layers)


def fill_holes(shape: CacheShape, moved_slots: int, num_launches: int) -> PolicyKernel:
    """The same of survivors that move into what others have left, one by one."""
    return PolicyKernel("compact", bytes_moved=2.0 * moved_slots * shape.slot_bytes, num_launches=num_launches, variant="holes")


def rerotate(shape: CacheShape, num_slots: int) -> PolicyKernel:
    """Keys rotated to their position inside the cache: read and written once by a kernel, pass by pass by a chain of eager launches."""
    passes, bytes_moved, flops = max(1, shape.rotation_passes), num_slots * shape.slot_bytes, 3.0 * num_slots * shape.head_dim
    if passes == 1:
        return PolicyKernel("rerotate", bytes_moved=bytes_moved, flops=flops, num_launches=shape.num_layers)
    return PolicyKernel(
        "rotate_chain", bytes_moved=passes * bytes_moved, flops=flops, num_launches=passes * shape.num_layers, owner="engine"
    )


def write_probabilities(shape: CacheShape, num_slots: int) -> PolicyKernel:
    """Decode attention that also stores each query head's probabilities; it runs anyway, so no launch is added."""
    return PolicyKernel(
        "decode_attention_scored", bytes_moved=float(num_slots * shape.group * SCORE_BYTES), num_launches=0, variant="written"
    )


def metric_pool(shape: CacheShape, pool_slots: int) -> PolicyKernel:
    """KV-Compress's pass over all metrics of the pool, used or not: (16r+8) B a slot (policies.md, KV-Compress).

    Probabilities of the r query heads of a group are zeroed, squared and summed by four library calls.
    """
    return PolicyKernel("metric_pool", bytes_moved=float(pool_slots * (16 * shape.group + 8)), num_launches=4)


def think_scores(shape: CacheShape, prompt_tokens: int) -> PolicyKernel:
    """Norms of the key channels over the prompt: one read of K, 2·n·Hkv·d FLOPs a layer."""
    elements = prompt_tokens * shape.num_pairs * shape.head_dim
    return PolicyKernel(
        "think_scores", bytes_moved=elements * shape.element_bytes, flops=2.0 * elements, num_launches=shape.num_layers
    )


def think_gather(shape: CacheShape, pruned_tokens: int, stored_channels: int) -> PolicyKernel:
    """Gather-copy of K: whole rows are read, since a sector holds 16 channels, and the stored channels written."""
    rows = pruned_tokens * shape.num_pairs
    channels = shape.head_dim + stored_channels
    return PolicyKernel(
        "think_gather", bytes_moved=rows * channels * shape.element_bytes, num_launches=shape.num_layers
    )


def kv_quantize(shape: CacheShape, num_vectors: int, stored_bytes: float, num_launches: int = 0) -> PolicyKernel:
    """Key or value vectors read in the engine's precision and written in `stored_bytes` each, scales included."""
    return PolicyKernel(
        "kv_quantize",
        bytes_moved=num_vectors * (shape.head_dim * shape.element_bytes + stored_bytes),
        num_launches=num_launches or shape.num_layers,
    )
