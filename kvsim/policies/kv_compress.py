"""KV-Compress (arXiv 2410.00161; a fork of vLLM 0.6.0): paged eviction at a rate of its own for each head."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvsim.ops import Op, PolicyKernel
from kvsim.policies import kv_compress_paper as paper
from kvsim.policies.base import CacheShape, Dimension, HeadGroup, Needs, Policy, SequenceShape
from kvsim.policies.kernels import fill_holes, kept_slots, metric_pool, select, window_scores, write_probabilities
from kvsim.policies.ramp import Ramp
from kvsim.policies.shares import EXPONENTIAL_SHARES, HeadShares, class_tokens, head_classes

SORT_BYTES = 24
"""Scratch of a sort, per KV: fp32 metrics and int64 indices, in and out (code: metrics.py profiles a sort of the most
KVs).
"""
LONGEST_PERIOD_STEPS = 32
"""Sawtooths of longer intervals are followed tooth by tooth."""


class KVCompress(Policy):
    """Blocks whose largest squared-attention metric is smallest leave, over all layers and heads of a sequence.

    Each head is left with whole blocks, max(min_kept_tokens, prompt / compression_ratio) tokens on average, rounded to
    blocks. Compression precedes the step (code: scheduler.py), whose own token then opens a block: 128 kept tokens
    occupy 144 slots. It runs when the prefill ends and every `interval_steps` of decoding. Ratio 1 evicts nothing but
    keeps metadata and metrics.

    implementation: the paper's own engine compresses at the end of prefills and where it would preempt, with PyTorch
    calls, an eviction kernel of one thread a sequence and host loops (kv_compress_paper.py).
    """

    kind: Literal["kv_compress"] = "kv_compress"
    compression_ratio: float = Field(
        ge=1, description="prompt tokens over kept ones (paper: 1 to 64); 1 evicts nothing"
    )
    min_kept_tokens: int = Field(128, gt=0, description="least target per head (paper: 128)")
    window_tokens: int = Field(8, gt=0, description="w: last prompt queries that score (paper: 8)")
    pool_kernel_tokens: int = Field(7, gt=0, description="width of the max-pooling over metrics (paper: 7)")
    protected_tokens: int = Field(32, ge=0, description="newest tokens, never evicted (code: 32 to 64)")
    interval_steps: int = Field(1, gt=0, description="decode steps between compressions (code: 1)")
    max_kvs_per_compression: int = Field(5_000_000, gt=0, description="most KVs sorted at once (code: 5 M)")
    block_size_tokens: int = Field(16, gt=0, description="tokens of the engine's block (paper: 16)")
    block_rounding: Literal["up", "down"] = Field(
        "up", description="of the target; up: code (max_cache_tokens); down: the paper's benchmark script"
    )
    implementation: Literal["kernels", "paper"] = Field(
        "kernels", description="whose code compresses: kvsim's kernels, or the paper's PyTorch calls and host loops"
    )
    table_tokens: int = Field(
        0, ge=0, description="paper: max_model_len, whose block tables are copied in every step; 0: none"
    )
    head_shares: HeadShares = Field(
        EXPONENTIAL_SHARES, description="relative budgets above the protected window of equal head classes (assumed)"
    )

    dimension: ClassVar[Dimension] = "tokens"
    needs: ClassVar[Needs] = "decode_probabilities"
    per_head_lengths: ClassVar[bool] = True

    @model_validator(mode="after")
    def _window_protected(self) -> KVCompress:
        if self.protected_tokens > self.min_kept_tokens:
            raise ValueError(
                f"protected_tokens={self.protected_tokens} must be at most min_kept_tokens={self.min_kept_tokens}; "
                "try 32 and 128"
            )
        return self

    @model_validator(mode="after")
    def _fields_of_one_implementation(self) -> KVCompress:
        if self.table_tokens and self.implementation == "kernels":
            raise ValueError(
                f"table_tokens={self.table_tokens} must be 0 with implementation: kernels, which copies no block tables; "
                "leave it out, or set implementation: paper"
            )
        if self.interval_steps > 1 and self.implementation == "paper":
            raise ValueError(
                f"interval_steps={self.interval_steps} must be 1 with implementation: paper, whose compressions in decoding are "
                "not priced; leave it out, or set implementation: kernels"
            )
        return self

    @property
    def floor_tokens(self) -> int:
        """Tokens that every head keeps: the blocks of its protected window, at least one."""
        return max(1, -(-self.protected_tokens // self.block_size_tokens)) * self.block_size_tokens

    def target_tokens(self, seq: SequenceShape) -> int:
        """Mean tokens per head after a compression: whole blocks."""
        wanted = max(self.min_kept_tokens, int(seq.prompt_tokens / self.compression_ratio + 1e-9))
        size = self.block_size_tokens
        # benchmarks/benchmark_throughput.py: max(128, (int(input_len / compression_rate) - 1) // 16 * 16)
        down = max((wanted - 1) // size, self.min_kept_tokens // size)
        return max(self.floor_tokens, size * (-(-wanted // size) if self.block_rounding == "up" else down))

    def head_groups(self, shape: CacheShape) -> tuple[HeadGroup, ...]:
        classes = head_classes(self.head_shares, shape.num_pairs)
        return tuple(HeadGroup(0, shape.num_layers, pairs, share) for pairs, share in classes)

    def stored(self, seq: SequenceShape, group: HeadGroup) -> int:
        if self.compression_ratio == 1:
            return seq.prefill_tokens
        return class_tokens(
            group.budget_frac, self.head_shares, self.target_tokens(seq), self.floor_tokens,
            cap=seq.prefill_tokens, unit=self.block_size_tokens,
        )  # fmt: skip

    def _limit(self, seq: SequenceShape, group: HeadGroup) -> int:
        """Tokens of a head that a compression leaves once it evicts: a prompt that needs none grows alike in all heads.
        """
        fits = seq.prefill_tokens <= self.target_tokens(seq)
        return self.target_tokens(seq) if fits else self.stored(seq, group)

    def _first_action(self, seq: SequenceShape, group: HeadGroup) -> int:
        """The first compression in decoding that finds something to evict."""
        room = self._limit(seq, group) - self.stored(seq, group)
        return 1 + self.interval_steps * -(-(room + 1) // self.interval_steps)

    def resident(self, seq: SequenceShape, group: HeadGroup, step: int) -> Ramp:
        growing = Ramp(self.stored(seq, group) + step, 1)
        if self.compression_ratio == 1:
            return growing
        first = self._first_action(seq, group)
        if step < first:
            return growing._replace(steps=first - step)
        lowest, interval = self._limit(seq, group) + 1, self.interval_steps
        if interval == 1:
            return Ramp(lowest)
        phase = (step - 1) % interval
        return Ramp(lowest + phase, 1, interval - phase)

    def period_steps(self, seq: SequenceShape, step: int) -> int:
        """From the second tooth on: the first may rise higher than what a short prompt held before it."""
        interval = self.interval_steps
        if self.compression_ratio == 1 or not 1 < interval <= LONGEST_PERIOD_STEPS:
            return 0
        group = HeadGroup(0, 1, 1)  # all groups act in the same steps
        return interval if step > self._first_action(seq, group) else 0

    def acts_at(self, seq: SequenceShape, group: HeadGroup, step: int) -> int:
        """Longer intervals only: a compression in every step is part of the step."""
        if self.compression_ratio == 1 or self.interval_steps == 1 or (step - 1) % self.interval_steps:
            return 0
        return self.resident(seq, group, step - 1).value + 1 if step >= self._first_action(seq, group) else 0

    def _sort(self, shape: CacheShape, num_slots: int) -> PolicyKernel:
        """Metrics of all heads ranked together: the four passes of a selection for each max_kvs_per_compression of
        them.
        """
        launches = 4 * -(-num_slots // self.max_kvs_per_compression)
        return replace(select(shape, num_slots), num_launches=launches, variant="blocks")

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        """Metrics of the prompt, and the eviction: survivors in the tail of a head's blocks move into holes, one per
        hole at most.
        """
        own = self.implementation == "paper"
        scores = paper.prompt_scores if own else window_scores
        metrics = scores(shape, seq.prefill_tokens, self.window_tokens)
        whole, kept = seq.prefill_tokens * shape.num_pairs, kept_slots(self, shape, seq)
        if kept == whole:
            return (metrics,)
        moves = fill_holes(shape, min(kept, whole - kept), shape.num_layers)
        return (metrics, moves) if own else (metrics, self._sort(shape, whole), moves)

    def joint_compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        whole, kept = seq.prefill_tokens * shape.num_pairs, kept_slots(self, shape, seq)
        if self.implementation == "kernels" or kept == whole:
            return ()
        return paper.eviction(whole, whole - kept, self.max_kvs_per_compression)

    def action_ops(self, shape: CacheShape, num_slots: int) -> tuple[Op, ...]:
        return (self._sort(shape, num_slots),)

    def step_ops(self, shape: CacheShape, batch: int, num_slots: int) -> tuple[Op, ...]:
        """Probabilities for the metrics; one token a head and step goes, so at most one survivor a head moves into its
        place.
        """
        scores = write_probabilities(shape, num_slots)
        if self.implementation == "paper":
            return (scores, *paper.every_step(shape, batch, self.table_tokens))
        if self.compression_ratio == 1:
            return (scores,)
        sort = (self._sort(shape, num_slots),) if self.interval_steps == 1 else ()
        return (scores, *sort, fill_holes(shape, batch * shape.num_pairs, 1))

    def pool_ops(self, shape: CacheShape, pool_slots: int) -> tuple[Op, ...]:
        return (metric_pool(shape, pool_slots),)

    def state_bytes_per_slot(self, shape: CacheShape) -> float:
        """12 + 8r bytes, r query heads to a KV head: metric, position, and two fp32 per query head of the group."""
        return 12.0 + 8 * shape.group

    def state_bytes_per_block(self, shape: CacheShape) -> float:
        """21 bytes: sequence, layer, head and logical number of each block, among others."""
        return 21.0

    def scratch_bytes(self, shape: CacheShape, max_prefill_tokens: int) -> int:
        """A sort of the most KVs at once, and fp32 votes of one layer."""
        votes = 4 * shape.q_heads * self.window_tokens * max_prefill_tokens
        return votes + SORT_BYTES * self.max_kvs_per_compression

    def published_budget(self) -> dict[str, float]:
        """What min_kept_tokens adds for short prompts is left out: less is kept than is."""
        return {"compression_ratio": self.compression_ratio}

    def notes(self) -> tuple[str, ...]:
        own = (
            "implementation: paper is vLLM 0.6.0's fork as its code reads: no run of it was timed; of two eviction paths the "
            "one with a kernel of one thread a sequence; compressions are priced when prefills end, not the loops over sequences",
        ) if self.implementation == "paper" else ()  # fmt: skip
        return (
            *own,
            f"heads differ by {len(self.head_shares)} assumed classes (head_shares): real rates follow from the data",
            "the whole prompt is resident until it is compressed: a sequence must first fit uncompressed",
            "sorting more KVs than max_kvs_per_compression takes further passes; the code puts it off to the next step",
            "the reference engine has no tensor parallelism, chunked prefill, prefix cache or CUDA graphs",
        )
