"""SnapKV (arXiv 2404.14469): at the end of prefill keep the tokens that the last queries look at."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, HeadGroup, Needs, Policy, SequenceShape
from kvsim.policies.kernels import compact, select, window_scores


class SnapKV(Policy):
    """Probabilities of the last `window_tokens` queries, summed and pooled, choose `budget_tokens` of the prompt.

    The window itself always stays. Runs once, when the prefill ends: the whole prompt is resident until then, and generated
    tokens are never evicted.
    """

    kind: Literal["snapkv"] = "snapkv"
    budget_tokens: int = Field(2048, gt=0, description="prompt tokens kept per head, window included")
    window_tokens: int = Field(32, gt=0, description="last queries that vote; always kept")
    pool_kernel_tokens: int = Field(5, gt=0, description="width of the pooling over votes")

    dimension: ClassVar = "tokens"
    needs: ClassVar[Needs] = "window_queries"

    @model_validator(mode="after")
    def _window_fits(self) -> SnapKV:
        if self.window_tokens >= self.budget_tokens:
            raise ValueError(
                f"window_tokens={self.window_tokens} must be below budget_tokens={self.budget_tokens}; lower the window"
            )
        return self

    def stored(self, seq: SequenceShape, group: HeadGroup) -> int:
        return min(seq.prefill_tokens, self.budget_tokens)

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        if seq.prefill_tokens <= self.budget_tokens:
            return ()
        kept_slots = self.budget_tokens * shape.num_pairs
        return (
            window_scores(shape, seq.prefill_tokens, self.window_tokens),
            select(shape, seq.prefill_tokens * shape.num_pairs),
            compact(shape, kept_slots),
        )

    def scratch_bytes(self, shape: CacheShape, max_prefill_tokens: int) -> int:
        """fp32 votes [q_heads, window, tokens] of one layer, and the kept K and V of one layer beside the old ones."""
        votes = 4 * shape.q_heads * self.window_tokens * max_prefill_tokens
        return votes + int(self.budget_tokens * shape.kv_heads * shape.slot_bytes)

    def published_budget(self) -> dict[str, float]:
        return {"kept_tokens": self.budget_tokens}
