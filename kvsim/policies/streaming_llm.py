"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, HeadGroup, Policy, SequenceShape
from kvsim.policies.kernels import compact, rerotate
from kvsim.policies.ramp import Ramp


class StreamingLLM(Policy):
    """Keep the first `sink_tokens` and the newest `window_tokens`; the slot of the oldest is taken by the step's own token.

    Positions are those inside the cache. The reference code (Hugging Face) stores keys before rotation and rotates all of them in
    every step, and so does TensorRT-LLM, in a kernel. It need not cost anything: a kernel may rotate keys as it reads them, or turn
    the query back for the sinks, since the newest tokens are as far from it in the cache as in the text.
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

    def step_ops(self, shape: CacheShape, batch: int, num_slots: int) -> tuple[Op, ...]:
        """Every key to its place in the cache, where attention does not do it."""
        return (rerotate(shape, num_slots),) if shape.rotation_passes else ()

    def published_budget(self) -> dict[str, float]:
        return {"kept_tokens": self.budget_tokens}

    def notes(self) -> tuple[str, ...]:
        return (
            "positions in the cache: huggingface and trtllm rotate all cached keys in every step, as their code does; attention of the "
            "other engines is assumed to do it as it reads, at no cost",
        )
