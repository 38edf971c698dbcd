"""Where an Op lies in a measured table: the table's key and the Op's place on its axes.

Fitting (`calibrate/`) and answering (`kvsim/measured.py`) both ask here, so they cannot disagree. Axes are base-2 logarithms:
kernels behave alike over ratios of sizes, and the physics underneath (`kvsim/datasheet.py`) is what follows straight lines.
"""

from __future__ import annotations

from math import ceil, log2
from typing import NamedTuple

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

AXES = {
    Gemm.kind: ("m", "n", "k", "tail_128x128", "tail_128x256"),
    DecodeAttention.kind: ("lanes", "context", "group", "kv_heads"),
    PrefillAttention.kind: ("heads", "new_tokens", "group", "sequences", "total_over_new"),
    MixedAttention.kind: ("new_tokens", "total_over_new", "decodes", "decode_context"),
    Elementwise.kind: ("bytes",),
    LogitFilter.kind: ("rows", "vocab_size"),
    Collective.kind: ("bytes",),
    PolicyKernel.kind: ("bytes", "flops_per_byte"),
    Copy.kind: ("bytes",),
    HostWork.kind: ("count",),
}
"""Axis names of each kind that tables can hold.

lanes: sequences x KV heads, the pieces of work that a decode kernel starts with. context: mean tokens of one. group: query heads
per KV head. heads: query heads x sequences. total_over_new: (prior + new) / new tokens, 1 where nothing is cached.
tail_AxB: waves of A x B output tiles over the multiprocessors, rounded up, over their number; 1 below half a wave.
Of policy kernels: bytes of one launch, and 1 + FLOPs / bytes. count: sequences, or launches, of host work.
"""

OWN_KINDS = (LogitFilter.kind, PolicyKernel.kind, Copy.kind, HostWork.kind)
"""Kinds that only a device's own calibration holds. No other GPU's tables are asked, and errors are kept by variant."""

POOLED = ""
"""Variant of the table that all element-wise kernels share, whatever their name."""
ELEMENTWISE_NAMES = ("norm", "qk_norm", "rope_and_kv_write", "activation", "embedding", "sampler")
"""Kernels of a forward pass, which may have tables of their own beside it."""
GEMM_CLASSES = {"fp32": "fp32", "fp16": "16bit", "bf16": "16bit", "fp8": "fp8", "int8": "int8", "int4": "int4"}
KV_CLASSES = {"fp16": "16bit", "bf16": "16bit", "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}
"""Formats that share tables; others (fp32, int4, kivi2, bf16+think80) have their own, or are carried from 16 bits by the physics."""

LAYOUTS = ("paged", "contiguous")
"""Of a cache; they share tables. Other ways of attending have their own."""


class Place(NamedTuple):
    """kind, then what splits its rows into tables: dtype class, head_dim, or collective and number of GPUs."""

    kind: str
    variant: str  # "16bit", "fp32 padded", ...; of element-wise Ops a name, or POOLED; "all_reduce graph" for collectives; else what runs
    size: int  # head_dim, or number of GPUs; 0 where neither matters
    at: tuple[float, ...]  # log2 along AXES[kind]


def locate(op: Op, num_sms: int) -> Place:
    """The Op's place on a GPU of so many multiprocessors."""
    if isinstance(op, Gemm):
        tails = (_tail(op, rows, columns, num_sms) for rows, columns in ((128, 128), (128, 256)))
        return Place(op.kind, GEMM_CLASSES[op.weight_dtype], 0, (log2(op.m), log2(op.n), log2(op.k), *tails))
    if isinstance(op, DecodeAttention):
        lanes = op.batch * op.kv_heads
        at = (log2(lanes), log2(max(op.kv_slots / lanes, 1.0)), log2(op.q_heads / op.kv_heads), log2(op.kv_heads))
        stored = KV_CLASSES.get(op.kv_format, op.kv_format)
        return Place(op.kind, stored if op.layout in LAYOUTS else f"{stored} {op.layout}", op.head_dim, at)
    if isinstance(op, PrefillAttention):
        at_prefill = (
            log2(op.q_heads * op.num_sequences), log2(op.new_tokens), log2(op.q_heads / op.kv_heads),
            log2(op.num_sequences), log2(1 + op.prior_tokens / op.new_tokens),
        )  # fmt: skip
        computed = KV_CLASSES.get(op.kv_dtype, op.kv_dtype)
        return Place(op.kind, f"{computed} {op.stored}".rstrip(), op.head_dim, at_prefill)
    if isinstance(op, MixedAttention):
        prefill, decode = op.prefill, op.decode
        context = max(decode.kv_slots / (decode.batch * decode.kv_heads), 1.0)
        at_mixed = (
            log2(prefill.new_tokens), log2(1 + prefill.prior_tokens / prefill.new_tokens), log2(decode.batch), log2(context)
        )  # fmt: skip
        return Place(op.kind, KV_CLASSES.get(decode.kv_format, decode.kv_format), decode.head_dim, at_mixed)
    if isinstance(op, Elementwise):
        name = op.name if op.name in ELEMENTWISE_NAMES else POOLED
        return Place(op.kind, name, 0, (log2(max(op.bytes_moved, 1)),))
    if isinstance(op, LogitFilter):
        return Place(op.kind, f"{op.library} {op.which}", 0, (log2(max(op.rows, 1)), log2(op.vocab_size)))
    if isinstance(op, Collective):
        mode = "eager" if op.eager else "graph"
        return Place(op.kind, f"{op.name} {mode}", op.num_gpus, (log2(max(op.message_bytes, 1)),))
    if isinstance(op, PolicyKernel):
        at_policy = log2(max(op.bytes_moved / max(op.num_launches, 1), 1.0)), log2(1 + op.flops / max(op.bytes_moved, 1.0))
        return Place(op.kind, f"{op.kernel} {op.variant}".rstrip(), 0, at_policy)
    if isinstance(op, Copy):
        return Place(op.kind, op.link, 0, (log2(max(op.num_bytes, 1)),))
    return Place(op.kind, f"{op.engine} {op.part} {op.variant}".rstrip(), 0, (log2(max(op.batch, 1)),))


def error_class(place: Place, size_class: str) -> str:
    """The class of a place whose answers share one bias: by variant for `OWN_KINDS`, else by size."""
    return place.variant if place.kind in OWN_KINDS else size_class


def _tail(op: Gemm, rows: int, columns: int, num_sms: int) -> float:
    waves = -(-op.m // rows) * -(-op.n // columns) / num_sms
    return log2(ceil(waves) / waves) if waves > 0.5 else 0.0
