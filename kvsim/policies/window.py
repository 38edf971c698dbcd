"""A sliding window: the newest tokens and nothing else (the window attention baseline of arXiv 2309.17453)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, Dimension, HeadGroup, Policy, SequenceShape
from kvsim.policies.kernels import compact
from kvsim.policies.ramp import Ramp


class Window(Policy):
    """Keep the newest `window_tokens`; the slot of the oldest is taken by the step's own token.

    Positions inside the cache differ from those in the text by one constant, which rotary and ALiBi attention do not
    see: unlike StreamingLLM nothing is rotated again.
    """

    kind: Literal["window"] = "window"
    window_tokens: int = Field(1024, gt=0, description="as many as StreamingLLM keeps with its 4 sinks")

    dimension: ClassVar[Dimension] = "tokens"

    def stored(self, seq: SequenceShape, group: HeadGroup) -> int:
        return min(seq.prefill_tokens, self.window_tokens)

    def resident(self, seq: SequenceShape, group: HeadGroup, step: int) -> Ramp:
        return Ramp(seq.prefill_tokens + step, 1).at_most(Ramp(self.window_tokens))

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        if seq.prefill_tokens <= self.window_tokens:
            return ()
        return (compact(shape, self.window_tokens * shape.num_pairs),)

    def published_budget(self) -> dict[str, float]:
        return {"kept_tokens": self.window_tokens}

    def notes(self) -> tuple[str, ...]:
        return ("the window is compacted once at prefill end; a paged engine that frees old blocks would copy nothing",)
