"""Keyformer (arXiv 2403.09054, MLSys 2024): keep a recent window and the key tokens of a Gumbel-noised score."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, Dimension, HeadGroup, Needs, Policy, SequenceShape
from kvsim.policies.kernels import SCORE_BYTES, accumulate_scores, compact, prompt_scores, select
from kvsim.policies.ramp import Ramp

CODE_PERIOD_STEPS = 8
"""The reference code evicts where step % 8 == 0 (attention_keyformer_old_bias.py)."""
INDEX_BYTES = 8
"""The code keeps the original position of a token as int64."""
EAGER_SCORE_TENSORS = 4
"""[B, Hq, n, n] tensors alive in the code's prefill: logits, Gumbel noise, Gumbel softmax, softmax."""
ACTIVATION_BYTES = 2
WHOLE = 1e-9
"""Added before rounding down: 0.29 · 100 is 29 tokens, as in the code's integer per cents."""


class Keyformer(Policy):
    """Scores of a softmax with Gumbel noise, accumulated over prompt and decoding, choose k tokens of each head.

    k = int(prompt · kept_frac) is constant during generation: a recent window of recent_frac · k, and the best of the
    rest. With grouped queries the score is reduced over the group, one per KV head; the paper evaluates none.
    """

    kind: Literal["keyformer"] = "keyformer"
    kept_frac: float = Field(
        0.5, gt=0, le=1, description="tokens kept, as a share of the prompt (paper, Table 1: 50 %)"
    )
    recent_frac: float = Field(0.3, ge=0, lt=1, description="recent window as a share of k (paper: 20-30 %; code: 30)")
    schedule: Literal["paper", "code"] = Field(
        "paper", description="paper: evicts at prefill end and at every step; code: only where step % 8 == 0"
    )
    tau_init: float = Field(1.0, gt=0, description="first temperature of the noise; does not change how many stay")
    tau_end: float = Field(2.0, gt=0, description="last temperature (paper: 1 to 2); does not change how many stay")
    keep_original_index: bool = Field(False, description="8 B a slot for the original position, as in the code")

    dimension: ClassVar[Dimension] = "tokens"
    needs: ClassVar[Needs] = "decode_probabilities"

    def kept_tokens(self, seq: SequenceShape) -> int:
        """k of the paper: at least one token."""
        return max(1, int(seq.prompt_tokens * self.kept_frac + WHOLE))

    def recent_tokens(self, seq: SequenceShape) -> int:
        """The part of k that is the recent window; always below k."""
        return int(self.kept_tokens(seq) * self.recent_frac + WHOLE)

    def stored(self, seq: SequenceShape, group: HeadGroup) -> int:
        return seq.prefill_tokens if self.schedule == "code" else min(seq.prefill_tokens, self.kept_tokens(seq))

    def resident(self, seq: SequenceShape, group: HeadGroup, step: int) -> Ramp:
        kept = self.kept_tokens(seq)
        if self.schedule == "paper":
            return Ramp(seq.prefill_tokens + step, 1).at_most(Ramp(kept))
        phase = step % CODE_PERIOD_STEPS
        low = kept if step >= CODE_PERIOD_STEPS else seq.prefill_tokens
        return Ramp(low + phase, 1, CODE_PERIOD_STEPS - phase)

    def period_steps(self, seq: SequenceShape, step: int) -> int:
        return CODE_PERIOD_STEPS if self.schedule == "code" and step >= CODE_PERIOD_STEPS else 0

    def acts_at(self, seq: SequenceShape, group: HeadGroup, step: int) -> int:
        if self.schedule == "paper" or step % CODE_PERIOD_STEPS:
            return 0
        return self.resident(seq, group, step - 1).value + 1

    def prefill_ops(self, shape: CacheShape, new_tokens: int, prior_tokens: int) -> tuple[Op, ...]:
        """Two passes over QKᵀ: the noisy softmax has row sums of its own."""
        return (prompt_scores(shape, new_tokens, prior_tokens, passes=2),)

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        kept = self.kept_tokens(seq)
        if self.schedule == "code" or seq.prefill_tokens <= kept:
            return ()
        return select(shape, seq.prefill_tokens * shape.num_pairs), compact(shape, kept * shape.num_pairs)

    def action_ops(self, shape: CacheShape, num_slots: int) -> tuple[Op, ...]:
        """The gather-copy, charged on all tokens before it: k + 8 for k, but the whole prompt the first time."""
        return (compact(shape, num_slots),)

    def step_ops(self, shape: CacheShape, batch: int, num_slots: int) -> tuple[Op, ...]:
        """A second, Gumbel softmax; a score read-modify-write; a top-k. The evicted token's slot is overwritten."""
        return accumulate_scores(shape, num_slots, passes=2), select(shape, num_slots, one=self.schedule == "paper")

    def state_bytes_per_slot(self, shape: CacheShape) -> float:
        return SCORE_BYTES + (INDEX_BYTES if self.keep_original_index else 0)

    def scratch_bytes(self, shape: CacheShape, max_prefill_tokens: int) -> int:
        """The kept K and V of one layer beside the old ones: k tokens of the longest prompt."""
        kept = int(max_prefill_tokens * self.kept_frac + WHOLE)
        return int(kept * shape.kv_heads * shape.slot_bytes)

    def eager_scratch_bytes(self, shape: CacheShape, batch: int, tokens: int) -> int:
        """What the Hugging Face code materialises in a layer's prefill: about 4 tensors [batch, q_heads, tokens,
        tokens].
        """
        return EAGER_SCORE_TENSORS * ACTIVATION_BYTES * batch * shape.q_heads * tokens**2

    def published_budget(self) -> dict[str, float]:
        return {"kept_frac": self.kept_frac}

    def notes(self) -> tuple[str, ...]:
        notes = ["a token set for each sequence; the reference code sums scores over the batch, so all beams share one"]
        if self.schedule == "code":
            notes.append("evicts before the attention of every 8th step; the code after it, so it reads one token more")
        return (*notes, "grouped queries share one score per KV head (not evaluated in the paper)")
