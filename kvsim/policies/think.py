"""ThinK (arXiv 2407.21018, ICLR 2025): prune the channels of keys, not the tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, Dimension, Needs, Policy, SequenceShape
from kvsim.policies.kernels import think_gather, think_scores
from kvsim.policies.ramp import Ramp

CHANNEL_TILE = 16
"""Stored channels are a multiple of 16: a tile of the tensor cores, and a 32 B sector of 16-bit elements."""
WHOLE = 1e-9
"""Added before rounding down: (1 − 0.5) · 128 is 64 channels."""


class ThinK(Policy):
    """Channels of least ‖q_j‖·‖k_j‖ over the last 32 queries leave the prompt's keys, once, at prefill end.

    The newest `recent_tokens` of the prompt and all generated tokens keep full keys; values are untouched, and logits
    are still divided by √head_dim. About 1 − pruned_frac/2 of the cache stays. Attention runs on split keys: the pruned
    part with gathered queries, the recent part in full.
    """

    kind: Literal["think"] = "think"
    pruned_frac: float = Field(0.4, ge=0, lt=1, description="λ: share of the key channels to prune (paper: 0.4-0.5)")
    recent_tokens: int = Field(32, ge=0, description="newest prompt tokens with full keys (paper: 32)")
    rounding: Literal["code", "paper"] = Field(
        "code", description="kept channels of d: code d − int(d·λ) (77 of 128 at 0.4), paper floor((1−λ)·d) (76)"
    )

    dimension: ClassVar[Dimension] = "channels"
    needs: ClassVar[Needs] = "window_queries"

    def kept_channels(self, head_dim: int) -> int:
        """Channels that stay in a pruned key, before alignment: the count the paper reports."""
        if self.rounding == "code":
            return head_dim - int(head_dim * self.pruned_frac + WHOLE)
        return max(1, int(head_dim * (1 - self.pruned_frac) + WHOLE))

    def stored_key_channels(self, head_dim: int) -> int:
        """Kept channels rounded up to whole tiles: what memory holds and attention reads."""
        return min(head_dim, -(-self.kept_channels(head_dim) // CHANNEL_TILE) * CHANNEL_TILE)

    def full_key_tokens(self, seq: SequenceShape, step: int) -> Ramp:
        return Ramp(min(self.recent_tokens, seq.prefill_tokens) + step, 1)

    def format_name(self, kv_dtype: str, head_dim: int) -> str:
        stored = self.stored_key_channels(head_dim)
        return kv_dtype if stored == head_dim else f"{kv_dtype}+think{stored}"

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        pruned_tokens = seq.prefill_tokens - self.recent_tokens
        stored = self.stored_key_channels(shape.head_dim)
        if pruned_tokens <= 0 or stored == shape.head_dim:
            return ()
        return think_scores(shape, seq.prefill_tokens), think_gather(shape, pruned_tokens, stored)

    def state_bytes_per_sequence(self, shape: CacheShape) -> int:
        """A bool for each channel of each (layer, KV head): 32 KiB for Llama-3.1-8B, a quarter of one token's KV."""
        return shape.num_pairs * shape.head_dim

    def scratch_bytes(self, shape: CacheShape, max_prefill_tokens: int) -> int:
        """The pruned keys of one layer beside the whole ones."""
        stored = self.stored_key_channels(shape.head_dim)
        return int(max_prefill_tokens * shape.kv_heads * stored * shape.element_bytes)

    def notes(self) -> tuple[str, ...]:
        return (
            "channels are chosen per KV head (mean over its query group); the code repeats keys for each query head",
            "assumes a split-key attention kernel: the public one re-inflates keys with zeros and gains no speed",
        )
