"""Scissorhands (arXiv 2305.17118, NeurIPS 2023): tokens that were pivotal of late stay pivotal; drop the others by the
half.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, Dimension, HeadGroup, Needs, Policy, SequenceShape
from kvsim.policies.kernels import accumulate_scores, compact, kept_slots, select, window_scores
from kvsim.policies.ramp import Ramp

COUNTER_BYTES = 2
"""A counter of at most history_window_tokens steps, per (layer, head, token) (policies.md, Scissorhands)."""


class Scissorhands(Policy):
    """Where the cache would exceed B tokens, the drop_frac · B that mattered least often of late leave at once.

    A token mattered in a step if its attention was above the mean, 1/t. The cache is a sawtooth from B/2 to B, 0.75 B
    on average, and acts every B/2 steps. The paper gives later layers more without saying how much: later_layer_weight
    is 1, even, unless set.
    """

    kind: Literal["scissorhands"] = "scissorhands"
    budget_tokens: int = Field(gt=0, description="B: the most tokens of a head, mean over layers")
    drop_frac: float = Field(0.5, gt=0, lt=1, description="m: share of B dropped at once (paper: 0.5)")
    history_window_tokens: int = Field(
        400, gt=0, description="w: last steps in which importance is counted (paper: 400)"
    )
    recent_tokens: int = Field(10, ge=0, description="r: newest tokens, never dropped (paper: 10)")
    later_layer_weight: float = Field(
        1.0, gt=0, description="budget of the last layer over the first's, linear between (paper: above 1, no number)"
    )
    recompute: bool = Field(
        False, description="keep no counters: one extra attention over the last w queries at each compaction"
    )

    dimension: ClassVar[Dimension] = "tokens"
    needs: ClassVar[Needs] = "decode_probabilities"

    @model_validator(mode="after")
    def _smallest_budget_drops_and_protects(self) -> Scissorhands:
        smallest = self._budget(2 * min(1.0, self.later_layer_weight) / (1 + self.later_layer_weight))
        if not self._dropped(smallest):
            raise ValueError(
                f"drop_frac={self.drop_frac} must drop at least one token of the smallest budget, {smallest}; try 0.5"
            )
        if self.recent_tokens > smallest - self._dropped(smallest):
            raise ValueError(
                f"recent_tokens={self.recent_tokens} must be at most what a drop leaves of the smallest budget, "
                f"{smallest - self._dropped(smallest)}; try a larger budget_tokens than {self.budget_tokens}"
            )
        return self

    def head_groups(self, shape: CacheShape) -> tuple[HeadGroup, ...]:
        """One group for all heads, or one for each layer where layers differ."""
        weight, last = self.later_layer_weight, shape.num_layers - 1
        if weight == 1 or not last:
            return super().head_groups(shape)
        return tuple(
            HeadGroup(layer, 1, shape.kv_heads, 2 / (1 + weight) * (1 + (weight - 1) * layer / last))
            for layer in range(shape.num_layers)
        )

    def _budget(self, budget_frac: float) -> int:
        return round(self.budget_tokens * budget_frac)

    def _dropped(self, budget_tokens: int) -> int:
        return int(self.drop_frac * budget_tokens + 1e-9)

    def stored(self, seq: SequenceShape, group: HeadGroup) -> int:
        budget = self._budget(group.budget_frac)
        return seq.prefill_tokens if seq.prefill_tokens <= budget else budget - self._dropped(budget)

    def resident(self, seq: SequenceShape, group: HeadGroup, step: int) -> Ramp:
        budget = self._budget(group.budget_frac)
        tokens = self.stored(seq, group) + step
        if tokens > budget:
            dropped = self._dropped(budget)
            tokens = budget - dropped + 1 + (tokens - budget - 1) % dropped
        return Ramp(tokens, 1, budget - tokens + 1)

    def acts_at(self, seq: SequenceShape, group: HeadGroup, step: int) -> int:
        budget = self._budget(group.budget_frac)
        over = self.stored(seq, group) + step - budget - 1
        return 0 if over < 0 or over % self._dropped(budget) else budget + 1

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        """Counts over the prompt's last w queries; where it exceeds the budget, selection and one gather."""
        count = window_scores(shape, seq.prefill_tokens, self.history_window_tokens)
        whole, kept = seq.prefill_tokens * shape.num_pairs, kept_slots(self, shape, seq)
        if kept == whole:
            return () if self.recompute else (count,)
        return count, select(shape, whole), compact(shape, kept)

    def action_ops(self, shape: CacheShape, num_slots: int) -> tuple[Op, ...]:
        stay = round(num_slots * (1 - self._dropped(self.budget_tokens) / (self.budget_tokens + 1)))
        ops: tuple[Op, ...] = (select(shape, num_slots), compact(shape, stay))
        if self.recompute:
            tokens = num_slots / shape.num_pairs
            ops = (window_scores(shape, tokens, self.history_window_tokens), *ops)
        return ops

    def step_ops(self, shape: CacheShape, batch: int, num_slots: int) -> tuple[Op, ...]:
        """Probabilities compared with 1/t and counted."""
        return () if self.recompute else (accumulate_scores(shape, num_slots, score_bytes=COUNTER_BYTES),)

    def state_bytes_per_slot(self, shape: CacheShape) -> float:
        return 0.0 if self.recompute else COUNTER_BYTES

    def scratch_bytes(self, shape: CacheShape, max_prefill_tokens: int) -> int:
        """fp32 votes of one layer's last w queries over the prompt, and its kept K and V beside the old ones."""
        votes = 4 * shape.q_heads * min(self.history_window_tokens, max_prefill_tokens) * max_prefill_tokens
        kept = min(self.budget_tokens, max_prefill_tokens)
        return votes + int(kept * shape.kv_heads * shape.slot_bytes)

    def published_budget(self) -> dict[str, float]:
        return {"kept_tokens": self.budget_tokens}

    def notes(self) -> tuple[str, ...]:
        notes = ["a 4-bit cache on top takes scales: a fifth of the tokens is 17.8x smaller, not 20x"]
        if self.recompute:
            notes.append("the last w queries that recomputation needs are not charged to memory")
        else:
            notes.append("counters reset outside the last w steps at no cost")
        return tuple(notes)
