"""AdaKV (arXiv 2407.11550, NeurIPS 2025): SnapKV whose heads compete for the budget of their layer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, Dimension, HeadGroup, Needs, Policy, SequenceShape
from kvsim.policies.kernels import compact, keep_by_window, keep_by_window_scratch, kept_slots
from kvsim.policies.shares import EXPONENTIAL_SHARES, HeadShares, class_tokens, head_classes


class AdaKV(Policy):
    """The top tokens of a whole layer stay, C per head on average; each head keeps its window and alpha of C − w.

    How far heads differ follows from the data: `head_shares` stands in for it. Runs once, when the prefill ends;
    generated tokens are never evicted.
    """

    kind: Literal["ada_kv"] = "ada_kv"
    budget_tokens: int = Field(
        1024, gt=0, description="C: prompt tokens kept per head, mean over heads (paper: 128-1024)"
    )
    window_tokens: int = Field(32, gt=0, description="last queries that vote; always kept (code: 32)")
    floor_frac: float = Field(0.2, ge=0, le=1, description="alpha: share of C − w that every head keeps (paper: 0.2)")
    pool_kernel_tokens: int = Field(7, gt=0, description="width of the pooling over votes (code: 7, maximum)")
    head_shares: HeadShares = Field(
        EXPONENTIAL_SHARES, description="relative budgets above the floor of equal classes of heads (assumed)"
    )
    flattened_copy: bool = Field(
        False, description="copy the flattened cache in every step, as the reference code does"
    )

    dimension: ClassVar[Dimension] = "tokens"
    needs: ClassVar[Needs] = "window_queries"
    per_head_lengths: ClassVar[bool] = True

    @model_validator(mode="after")
    def _window_fits(self) -> AdaKV:
        if self.window_tokens >= self.budget_tokens:
            raise ValueError(
                f"window_tokens={self.window_tokens} must be below budget_tokens={self.budget_tokens}; lower the window"
            )
        return self

    @property
    def floor_tokens(self) -> int:
        """Tokens that every head keeps, its window included."""
        return self.window_tokens + int(self.floor_frac * (self.budget_tokens - self.window_tokens))

    def head_groups(self, shape: CacheShape) -> tuple[HeadGroup, ...]:
        classes = head_classes(self.head_shares, shape.num_pairs)
        return tuple(HeadGroup(0, shape.num_layers, pairs, share) for pairs, share in classes)

    def stored(self, seq: SequenceShape, group: HeadGroup) -> int:
        return class_tokens(
            group.budget_frac, self.head_shares, self.budget_tokens, self.floor_tokens, cap=seq.prefill_tokens
        )

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        if seq.prefill_tokens <= self.budget_tokens:
            return ()
        return keep_by_window(shape, seq.prefill_tokens, self.window_tokens, kept_slots(self, shape, seq))

    def step_ops(self, shape: CacheShape, batch: int, num_slots: int) -> tuple[Op, ...]:
        return (compact(shape, num_slots),) if self.flattened_copy else ()

    def scratch_bytes(self, shape: CacheShape, max_prefill_tokens: int) -> int:
        return keep_by_window_scratch(shape, max_prefill_tokens, self.window_tokens, self.budget_tokens)

    def published_budget(self) -> dict[str, float]:
        return {"kept_tokens": self.budget_tokens}

    def notes(self) -> tuple[str, ...]:
        return (
            f"heads differ by {len(self.head_shares)} assumed classes (head_shares): real rates follow from the data",
            "classes spread over the heads of all layers; attention takes each layer to have the mean of them",
        )
