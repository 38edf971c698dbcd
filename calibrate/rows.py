"""Measured Ops: what importers yield, what is wrong with some of them, and what a fit reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from kvsim.datasheet import sustained_rate
from kvsim.dtypes import matrix_bytes
from kvsim.hardware import Gpu
from kvsim.ops import (
    Collective,
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

IMPOSSIBLE = 1.05
"""A row this much faster than the datasheet's peak or bandwidth allows is mislabelled: boards run at most a few percent above."""
SUSPECT_FRAC = 0.05
"""A table with more impossible rows than this share is left out as a whole: what is wrong with them is wrong with the others."""


class MeasuredRow(NamedTuple):
    """One measurement. where: file and row, for messages."""

    op: Op
    seconds: float
    where: str


class Rejected(NamedTuple):
    """A row that was left out, and why."""

    where: str
    reason: str


@dataclass
class Import:
    """What an importer found."""

    engine: str  # "vllm", "sglang", "trtllm", "torch", ...
    engine_version: str
    source: str  # name, version and licence of the data
    rows: list[MeasuredRow] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def add(self, op: Op, seconds: float, where: str, gpu: Gpu) -> None:
        """Keeps a row, or says what is impossible about it."""
        reason = impossible(op, seconds, gpu)
        if reason:
            self.rejected.append(Rejected(where, reason))
        else:
            self.rows.append(MeasuredRow(op, seconds, where))

    def sha256(self) -> str:
        """Of the rows, in order. Fields that Ops have got since profiles were shipped are left out where they are empty."""
        digest = hashlib.sha256()
        for row in self.rows:
            text = repr(row.op).replace(", stored=''", "")
            if isinstance(row.op, HostWork):
                text = text.replace(", variant=''", "")
            digest.update(f"{text} {row.seconds!r}\n".encode())
        return digest.hexdigest()


def least_seconds(op: Op, gpu: Gpu) -> float:
    """What no GPU of this datasheet can be faster than: matrix peak, or a higher rate that its file says it sustains, and bandwidth where
    caches cannot hold the data."""
    bandwidth = gpu.hbm_bandwidth_bytes_per_s
    if isinstance(op, Gemm):
        compute_s = 2.0 * op.m * op.n * op.k / _highest(gpu, "bf16" if op.weight_dtype == "int4" else op.weight_dtype)
        weights = matrix_bytes(op.n, op.k, op.weight_dtype)
        return max(compute_s, weights / bandwidth if weights > 2 * gpu.l2_bytes else 0.0)
    if isinstance(op, DecodeAttention):
        moved = op.kv_slots * op.slot_bytes
        return moved / bandwidth if moved > 2 * gpu.l2_bytes else 0.0
    if isinstance(op, PrefillAttention):
        return op.flops / _highest(gpu, _attention_dtype(op.kv_dtype))
    if isinstance(op, MixedAttention):
        return op.prefill.flops / _highest(gpu, _attention_dtype(op.prefill.kv_dtype))
    if isinstance(op, Elementwise):
        return op.bytes_moved / bandwidth if op.bytes_moved > 4 * gpu.l2_bytes else 0.0
    if isinstance(op, LogitFilter):  # logits read, and what stays written or drawn from
        moved = 4.0 * op.rows * op.vocab_size
        return moved / bandwidth if moved > 4 * gpu.l2_bytes else 0.0
    if isinstance(op, Collective) and op.name == "all_reduce":
        return 2.0 * (op.num_gpus - 1) / op.num_gpus * op.message_bytes / gpu.gpu_link_bytes_per_s / 2.0  # in-switch sums halve it
    return 0.0


def _highest(gpu: Gpu, dtype: str) -> float:
    return max(gpu.peak_flops(dtype), sustained_rate(gpu, dtype) or 0.0)


def _attention_dtype(kv_dtype: str) -> str:
    """In which attention multiplies: 16 bits whatever the cache holds, unless that is fp32."""
    return "fp32" if kv_dtype == "fp32" else "bf16"


def impossible(op: Op, seconds: float, gpu: Gpu) -> str:
    """What is impossible about a row; "" where nothing is."""
    if not 0.0 < seconds < 1e3:
        return f"takes {seconds:g} s, which must lie between 0 and 1,000 s; is its unit right?"
    least_s = least_seconds(op, gpu)
    if seconds * IMPOSSIBLE < least_s:
        return f"takes {seconds * 1e6:.4g} us where the peak of {gpu.name} needs {least_s * 1e6:.4g} us; is its unit right?"
    return ""


def shape_group(op: Op) -> tuple[object, ...]:
    """Rows of one group share a shape that a user meets or not: held out together, so that errors are those of an unseen shape."""
    if isinstance(op, Gemm):
        return op.n, op.k
    if isinstance(op, DecodeAttention | PrefillAttention):
        return op.q_heads, op.kv_heads, op.head_dim
    if isinstance(op, MixedAttention):
        return op.prefill.new_tokens, op.decode.batch
    if isinstance(op, Collective):
        return (op.message_bytes,)
    return (op.bytes_moved,) if isinstance(op, Elementwise | PolicyKernel) else (op,)


def at_means(rows: Sequence[MeasuredRow]) -> list[MeasuredRow]:
    """The same rows, each with the mean time of all rows of its Op.

    Steps are sums, so a fit should give the mean of what an Op takes. Fitted to the logarithms of single times it gives less, the
    more they scatter.
    """
    times: dict[Op, list[float]] = {}
    for row in rows:
        times.setdefault(row.op, []).append(row.seconds)
    return [row._replace(seconds=fmean(times[row.op])) for row in rows]


def without_suspect(rows: Sequence[MeasuredRow], rejected: Iterable[Rejected]) -> tuple[list[MeasuredRow], list[str]]:
    """Rows without whole tables of which too many rows were impossible, and what was left out (by `where` up to its row)."""
    good: dict[str, int] = {}
    bad: dict[str, int] = {}
    for row in rows:
        name = _table(row.where)
        good[name] = good.get(name, 0) + 1
    for row_ in rejected:
        name = _table(row_.where)
        bad[name] = bad.get(name, 0) + 1
    suspect = {name for name, count in bad.items() if count > SUSPECT_FRAC * (count + good.get(name, 0))}
    kept = [row for row in rows if _table(row.where) not in suspect]
    return kept, [f"{name}: {bad[name]} of {bad[name] + good.get(name, 0)} rows" for name in sorted(suspect)]


def _table(where: str) -> str:
    return where.rpartition(":")[0]
