"""H2O, heavy-hitter oracle (arXiv 2306.14048, NeurIPS 2023): accumulated attention chooses who stays beside the recent.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, Dimension, HeadGroup, Needs, Policy, SequenceShape
from kvsim.policies.kernels import SCORE_BYTES, accumulate_scores, compact, prompt_scores, select
from kvsim.policies.ramp import Ramp

WHOLE = 1e-9
"""Added before rounding down: 0.29 · 100 is 29 tokens."""


class H2O(Policy):
    """Half of the kept tokens have the largest accumulated softmax, half are the most recent; one leaves at every step.

    Acts from the end of the prompt on, on a constant number of tokens given either as a share of the prompt or
    outright. The flexgen variant counts as the authors' FlexGen fork does: hh_k = int(prompt · ratio) heavy hitters and
    a cache of 2·hh_k, where its ratio is kept_frac / 2 here (the 20 % of its logs at equal prompt and output is
    kept_frac 0.4).
    """

    kind: Literal["h2o"] = "h2o"
    kept_frac: float | None = Field(
        None, gt=0, le=1, description="tokens kept, heavy and recent, as a share of the prompt"
    )
    budget_tokens: int | None = Field(None, gt=1, description="tokens kept in each head, heavy and recent")
    heavy_frac: float = Field(0.5, ge=0, le=1, description="heavy hitters among the kept (paper: half)")
    variant: Literal["paper", "flexgen"] = Field(
        "paper", description="how tokens are counted: as the paper, or as the authors' FlexGen fork"
    )

    dimension: ClassVar[Dimension] = "tokens"
    needs: ClassVar[Needs] = "decode_probabilities"

    @model_validator(mode="after")
    def _one_budget(self) -> H2O:
        if self.kept_frac is None and self.budget_tokens is None:
            raise ValueError("must have kept_frac or budget_tokens; try kept_frac: 0.2")
        if self.kept_frac is not None and self.budget_tokens is not None:
            raise ValueError(f"kept_frac={self.kept_frac} must be given without budget_tokens={self.budget_tokens}; drop one")
        if self.variant == "flexgen" and (self.kept_frac is None or self.heavy_frac != 0.5):
            raise ValueError("variant='flexgen' must have kept_frac and heavy_frac=0.5; try variant: paper")
        return self

    def kept_tokens(self, seq: SequenceShape) -> int:
        """The constant number of resident tokens, at least one."""
        if self.kept_frac is None:
            assert self.budget_tokens is not None
            return self.budget_tokens
        if self.variant == "flexgen":
            return max(2, 2 * int(seq.prompt_tokens * self.kept_frac / 2 + WHOLE))
        return max(1, int(seq.prompt_tokens * self.kept_frac + WHOLE))

    def heavy_tokens(self, seq: SequenceShape) -> int:
        """Heavy hitters among the kept; the rest are recent."""
        return int(self.kept_tokens(seq) * self.heavy_frac + WHOLE)

    def stored(self, seq: SequenceShape, group: HeadGroup) -> int:
        return min(seq.prefill_tokens, self.kept_tokens(seq))

    def resident(self, seq: SequenceShape, group: HeadGroup, step: int) -> Ramp:
        return Ramp(seq.prefill_tokens + step, 1).at_most(Ramp(self.kept_tokens(seq)))

    def prefill_ops(self, shape: CacheShape, new_tokens: int, prior_tokens: int) -> tuple[Op, ...]:
        return (prompt_scores(shape, new_tokens, prior_tokens),)

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        kept = self.kept_tokens(seq)
        if seq.prefill_tokens <= kept:
            return ()
        return select(shape, seq.prefill_tokens * shape.num_pairs), compact(shape, kept * shape.num_pairs)

    def step_ops(self, shape: CacheShape, batch: int, num_slots: int) -> tuple[Op, ...]:
        """Scores accumulated and the lowest found; the step's own token takes its slot, so nothing is copied."""
        return accumulate_scores(shape, num_slots), select(shape, num_slots, one=True)

    def state_bytes_per_slot(self, shape: CacheShape) -> float:
        return SCORE_BYTES

    def scratch_bytes(self, shape: CacheShape, max_prefill_tokens: int) -> int:
        """The kept K and V of one layer beside the old ones."""
        kept = self.kept_tokens(SequenceShape(max_prefill_tokens, max_prefill_tokens))
        return int(min(kept, max_prefill_tokens) * shape.kv_heads * shape.slot_bytes)

    def published_budget(self) -> dict[str, float]:
        if self.kept_frac is not None:
            return {"kept_frac": self.kept_frac}
        assert self.budget_tokens is not None
        return {"kept_tokens": self.budget_tokens}

    def notes(self) -> tuple[str, ...]:
        return ("grouped queries share one accumulated score per KV head (the paper's models have none)",)
