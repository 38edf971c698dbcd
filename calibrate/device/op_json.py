"""Ops as JSON and back: what a row of a calibration says it measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from kvsim.ops import (
    Collective,
    Copy,
    DecodeAttention,
    Elementwise,
    Gemm,
    HostWork,
    LogitFilter,
    MixedAttention,
    Op,
    PolicyKernel,
    PrefillAttention,
)

TYPES: dict[str, type] = {
    op.kind: op
    for op in (
        Gemm, PrefillAttention, DecodeAttention, MixedAttention, Elementwise, LogitFilter, Collective, Copy, PolicyKernel, HostWork
    )
}  # fmt: skip


def op_to_json(op: Op) -> dict[str, Any]:
    """{"kind": ..., and the fields}."""
    return {"kind": op.kind, **asdict(op)}


def op_from_json(content: dict[str, Any]) -> Op:
    """The Op again. Raises ValueError for an unknown kind, TypeError or KeyError where fields are missing or
    unknown; those with a default may be missing, as in rows older than they are."""
    values = dict(content)
    kind = values.pop("kind")
    if kind not in TYPES:
        raise ValueError(f"kind {kind!r} is no Op")
    if kind == MixedAttention.kind:
        return MixedAttention(PrefillAttention(**values["prefill"]), DecodeAttention(**values["decode"]))
    op: Op = TYPES[kind](**values)
    return op


def compact(content: Any) -> str:
    """One line without blanks, keys sorted: equal texts are equal contents."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
