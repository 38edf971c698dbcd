"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, HeadGroup, Policy, SequenceShape
from kvsim.policies.kernels import compact
from kvsim.policies.ramp import Ramp


class StreamingLLM(Policy):
    """Keep the first `sink_tokens` and the newest `window_tokens`; the slot of the oldest is taken by the step's own token.

    Positions are those inside the cache. Keys are stored before rotation and rotated as attention reads them, as in the
    reference code, so a step launches nothing extra.
    """

    kind: Literal["streaming_llm"] = "streaming_llm"
    sink_tokens: int = Field(4, ge=0, description="first tokens, always kept (paper: 4)")
    window_tokens: int = Field(1020, gt=0, description="newest tokens kept")

    dimension: ClassVar = "tokens"
    moves_positions: ClassVar[bool] = True

    @property
    def budget_tokens(self) -> int:
        return self.sink_tokens + self.window_tokens

    def stored(self, seq: SequenceShape, group: HeadGroup) -> int:
        return min(seq.prefill_tokens, self.budget_tokens)

    def resident(self, seq: SequenceShape, group: HeadGroup, step: int) -> Ramp:
        return Ramp(seq.prefill_tokens + step, 1).at_most(Ramp(self.budget_tokens))

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        if seq.prefill_tokens <= self.budget_tokens:
            return ()
        return (compact(shape, self.budget_tokens * shape.num_pairs),)

    def published_budget(self) -> dict[str, float]:
        return {"kept_tokens": self.budget_tokens}
