"""PyramidKV (arXiv 2406.02069): SnapKV with budgets that shrink from the first layer to the last."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, Dimension, HeadGroup, Needs, Policy, SequenceShape
from kvsim.policies.kernels import keep_by_window, keep_by_window_scratch, kept_slots


class PyramidKV(Policy):
    """Layer budgets fall linearly from max + w to min + w, with min = (C−w)/beta and max = 2(C−w) − min: C on average.

    Budgets are rounded symmetrically about C, so they sum to layers · C exactly. A prompt shorter than the first
    layer's budget flattens the pyramid until that layer just keeps the prompt, as in the reference code. Runs once,
    when the prefill ends.
    """

    kind: Literal["pyramid_kv"] = "pyramid_kv"
    budget_tokens: int = Field(
        2048, gt=0, description="C: prompt tokens kept per head, mean over layers, window included"
    )
    window_tokens: int = Field(32, gt=0, description="w: last queries that vote; always kept (SnapKV: 32)")
    beta: float = Field(20.0, ge=1, description="steepness (paper and code: 20); 1 keeps all layers alike")
    pool_kernel_tokens: int = Field(5, gt=0, description="width of the pooling over votes (code: 5)")

    dimension: ClassVar[Dimension] = "tokens"
    needs: ClassVar[Needs] = "window_queries"

    @model_validator(mode="after")
    def _window_fits(self) -> PyramidKV:
        if self.window_tokens >= self.budget_tokens:
            raise ValueError(
                f"window_tokens={self.window_tokens} must be below budget_tokens={self.budget_tokens}; lower the window"
            )
        return self

    @property
    def spread_tokens(self) -> float:
        """What the first layer keeps above C, and the last below it."""
        return (self.budget_tokens - self.window_tokens) * (1 - 1 / self.beta)

    def head_groups(self, shape: CacheShape) -> tuple[HeadGroup, ...]:
        """One group, and one attention launch, for each layer."""
        last = max(shape.num_layers - 1, 1)
        tilts = [(1 - 2 * layer / last) if shape.num_layers > 1 else 0.0 for layer in range(shape.num_layers)]
        return tuple(
            HeadGroup(layer, 1, shape.kv_heads, 1 + tilt * self.spread_tokens / self.budget_tokens)
            for layer, tilt in enumerate(tilts)
        )

    def stored(self, seq: SequenceShape, group: HeadGroup) -> int:
        above_mean = seq.prefill_tokens - self.budget_tokens
        if above_mean <= 0:
            return seq.prefill_tokens
        wanted = (group.budget_frac - 1) * self.budget_tokens
        flattened = wanted * min(1.0, above_mean / self.spread_tokens) if self.spread_tokens else 0.0
        return self.budget_tokens + round(round(flattened, 6))  # float dust goes first, so that halves stay halves

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        if seq.prefill_tokens <= self.budget_tokens:
            return ()
        return keep_by_window(shape, seq.prefill_tokens, self.window_tokens, kept_slots(self, shape, seq))

    def scratch_bytes(self, shape: CacheShape, max_prefill_tokens: int) -> int:
        largest = round(self.budget_tokens + self.spread_tokens)
        return keep_by_window_scratch(shape, max_prefill_tokens, self.window_tokens, largest)

    def published_budget(self) -> dict[str, float]:
        return {"kept_tokens": self.budget_tokens}
