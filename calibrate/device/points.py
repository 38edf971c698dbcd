"""What a calibration may measure: points, each an Op and what to run for it. Data only; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvsim.calibrate.device.op_json import compact, op_to_json
from kvsim.coordinates import locate
from kvsim.ops import DecodeAttention, Elementwise, Gemm, Op

SKEW = "decode_lengths"
"""Work of decode attention over unlike lengths: not fitted, it tells how wrong the rule for them is."""


class Heads(NamedTuple):
    """Attention of a model on one GPU."""

    q_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Point:
    """One thing to measure. work: which of `workloads.WORKS` runs. dtype: torch's name of it. details: what the Op lacks.

    weight: how much a unit of this point's error matters beside others, in the order of measuring.
    """

    op: Op
    work: str
    dtype: str
    details: tuple[tuple[str, Any], ...] = ()
    weight: float = field(default=1.0, compare=False)

    @property
    def key(self) -> str:
        """Equal for equal measurements."""
        return compact([self.work, self.dtype, op_to_json(self.op), dict(self.details)])

    @property
    def fitted(self) -> bool:
        """Whether its time goes into the profile's tables."""
        return self.work != SKEW

    def group(self, num_sms: int) -> str:
        """Points of a group share a table, and inform each other."""
        kind, variant, size, _ = locate(self.op, num_sms)
        return " ".join(str(part) for part in (kind, variant, size, self.work) if part)

    def coordinates(self, num_sms: int) -> tuple[float, ...]:
        """Where it lies among the points of its group."""
        at = locate(self.op, num_sms).at
        if isinstance(self.op, Gemm):
            return at[:3]  # tails follow from these
        if isinstance(self.op, DecodeAttention) and not self.fitted:
            return at[1], float(self.op.batch * self.op.kv_heads * self.op.max_kv_tokens / self.op.kv_slots)
        if isinstance(self.op, Elementwise):
            return (*at, float(ELEMENTWISE.index(self.op.name)))
        return at


ELEMENTWISE = ("add", "silu", "layer_norm")
"""Measured element-wise Ops: two reads and a write, a read and a write, a reduction over rows of 4,096."""
