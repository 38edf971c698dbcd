"""KIVI (arXiv 2402.02750, ICML 2024): keys quantised per channel, values per token, the newest left in full precision.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvsim.ops import Op
from kvsim.policies.base import CacheShape, Dimension, HeadGroup, Policy, SequenceShape
from kvsim.policies.kernels import kv_quantize
from kvsim.policies.ramp import Ramp

SCALE_BYTES = 4
"""An fp16 scale and an fp16 minimum for each group of elements (code: new_pack.py)."""


class KIVI(Policy):
    """Keys in groups of tokens of one channel, values in groups of channels of one token: 3 or 5 bits with scales.

    Keys pile up in full precision until there are `residual_tokens`, then all of them are quantised; of the values the
    newest `residual_tokens` stay in full precision, and one token is quantised in every step. Tokens count as they are
    seen, evicted ones too. The step that completes a residual quantises it before its attention; the code does so after
    it.
    """

    kind: Literal["kivi"] = "kivi"
    bits: Literal[2, 4] = Field(2, description="bits of an element (paper: 2 and 4)")
    group_size_tokens: int = Field(32, gt=0, description="tokens of a key group, channels of a value group (paper: 32)")
    residual_tokens: int = Field(128, gt=0, description="R: newest tokens in full precision (paper: 128)")

    dimension: ClassVar[Dimension] = "bits"

    @model_validator(mode="after")
    def _whole_groups(self) -> KIVI:
        if self.residual_tokens % self.group_size_tokens:
            raise ValueError(
                f"group_size_tokens={self.group_size_tokens} must divide residual_tokens={self.residual_tokens}; "
                "try 32 or 64, and a residual of 128"
            )
        if self.bits + 8 * SCALE_BYTES / self.group_size_tokens >= 16:
            raise ValueError(
                f"group_size_tokens={self.group_size_tokens} must be larger, or scales outweigh what {self.bits} bits save; try 32"
            )
        return self

    def key_bytes(self, channels: int, element_bytes: float) -> float:
        return channels * (self.bits / 8 + SCALE_BYTES / self.group_size_tokens)

    def value_bytes(self, channels: int, element_bytes: float) -> float:
        return channels * self.bits / 8 + SCALE_BYTES * -(-channels // self.group_size_tokens)

    def wide_key_tokens(self, seq: SequenceShape, step: int) -> Ramp:
        wide = (seq.prefill_tokens + step) % self.residual_tokens
        return Ramp(wide, 1, self.residual_tokens - wide)

    def wide_value_tokens(self, seq: SequenceShape, step: int) -> Ramp:
        return Ramp(seq.prefill_tokens + step, 1).at_most(Ramp(self.residual_tokens))

    def wide_window_tokens(self) -> int:
        return self.residual_tokens

    def format_name(self, kv_dtype: str, head_dim: int) -> str:
        return f"kivi{self.bits}"

    def compress_ops(self, shape: CacheShape, seq: SequenceShape) -> tuple[Op, ...]:
        tokens, residual = seq.prefill_tokens, self.residual_tokens
        return self._quantize(shape, tokens // residual * residual, max(0, tokens - residual))

    def acts_at(self, seq: SequenceShape, group: HeadGroup, step: int) -> int:
        """A full residual of keys, once every residual_tokens steps."""
        return 0 if (seq.prefill_tokens + step) % self.residual_tokens else self.residual_tokens

    def action_ops(self, shape: CacheShape, num_slots: int) -> tuple[Op, ...]:
        return (kv_quantize(shape, num_slots, self.key_bytes(shape.head_dim, shape.element_bytes)),)

    def step_ops(self, shape: CacheShape, batch: int, num_slots: int) -> tuple[Op, ...]:
        """One token's values leave the residual of each sequence."""
        stored = self.value_bytes(shape.head_dim, shape.element_bytes)
        return (kv_quantize(shape, batch * shape.num_pairs, stored),)

    def scratch_bytes(self, shape: CacheShape, max_prefill_tokens: int) -> int:
        """The quantised K and V of one layer beside those in full precision."""
        slot = sum(f(shape.head_dim, shape.element_bytes) for f in (self.key_bytes, self.value_bytes))
        return int(max_prefill_tokens * shape.kv_heads * slot)

    def published_budget(self) -> dict[str, float]:
        return {"bits": self.bits}

    def notes(self) -> tuple[str, ...]:
        return (
            "one token's values are quantised in every step, also where a sequence is shorter than the residual",
            "the residual is a ring buffer: the code's concatenations of the cache are the engine's matter",
        )

    def _quantize(self, shape: CacheShape, key_tokens: int, value_tokens: int) -> tuple[Op, ...]:
        d, e = shape.head_dim, shape.element_bytes
        widths = ((key_tokens, self.key_bytes(d, e)), (value_tokens, self.value_bytes(d, e)))
        return tuple(kv_quantize(shape, tokens * shape.num_pairs, stored) for tokens, stored in widths if tokens)
