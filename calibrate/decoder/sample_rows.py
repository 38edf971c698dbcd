"""Rows of Ops out of one timed step: which Op each mark's time belongs to, as the simulator counts them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from kvsim.calibrate.decoder.clock import OpClock
from kvsim.calibrate.decoder.decoder import Decoder
from kvsim.calibrate.decoder.sequence import CachedSequence
from kvsim.dtypes import activation_bytes
from kvsim.engines.torch_decoder import TorchDecoder
from kvsim.forward import head_ops, linear_ops
from kvsim.ops import Elementwise, Gemm, Op, PolicyKernel, PrefillAttention
from kvsim.policies.compose import CachePlan
from kvsim.pricing import one_by_one

LONG = 1 << 20
"""Tokens of a prompt that every policy compresses."""
KERNEL_LABELS = {"select", "compact", "decode_attention_scored", "kv_quantize"}
"""Marks of what policies do in a decode step."""
Rows = list[tuple[Op, float]]
"""An Op, and seconds of one launch of it (policies' kernels: of all their launches)."""


def _linear_rows(decoder: Decoder, num_tokens: int, clock: OpClock, weight_dtype: str) -> Iterator[tuple[Op, float]]:
    model, seconds = decoder.transformer.spec.model, clock.seconds
    names = [gemm.name for gemm in model.gemms()]
    for times, op in linear_ops(model, 1, weight_dtype, num_tokens):
        name = names.pop(0) if isinstance(op, Gemm) else op.name if isinstance(op, Elementwise) else ""
        if name in seconds:
            yield op, seconds[name] / times


def decode_rows(
    plan: CachePlan, decoder: Decoder, sequences: Sequence[CachedSequence], clock: OpClock, weight_dtype: str
) -> Rows:  # fmt: skip
    """Rows of one timed decode step."""
    batch, seconds, shape = len(sequences), clock.seconds, plan.shape
    rows: Rows = list(_linear_rows(decoder, batch, clock, weight_dtype))
    engine, model = TorchDecoder(attention=decoder.attention.name).for_plan(plan), decoder.transformer.spec.model
    rows += [(op, seconds["lm_head"]) for _, op in head_ops(model, 1, batch, weight_dtype=weight_dtype)]
    rows += [(op, seconds["sampler"]) for op in engine.sampler_ops(batch, model.vocab_size, activation_bytes(weight_dtype))]
    slots, resident, longest = _read_slots(plan, sequences)
    attention = replace(plan.attention(0, batch, 0, 0), kv_slots=round(slots), max_kv_tokens=longest)
    rows.append((attention, seconds["attention"] / shape.num_layers))
    ops = plan.step_ops(batch, resident)
    policies = policy_rows(one_by_one(ops, engine.one_by_one(plan), batch), clock)
    # What a policy does beyond its declared kernels, such as moving a ring on, is the step's own; not what it does in some steps alone.
    acts = (*ops, *(op for policy in plan.acting for op in policy.action_ops(shape, 1)))
    ((host,), *_) = engine.host_ops(batch, 0)
    return [*rows, (host, seconds["step"] + _rest(acts, seconds)), *policies]


def _rest(ops: Iterable[Op], seconds: Mapping[Hashable, float]) -> float:
    """Seconds of policies' work that none of their Ops tells."""
    told = {op.kernel for op in ops if isinstance(op, PolicyKernel)}
    return sum(value for label, value in seconds.items() if label in KERNEL_LABELS - told)


def _read_slots(plan: CachePlan, sequences: Sequence[CachedSequence]) -> tuple[float, int, int]:
    """(slots that one layer's attention reads, resident (token, layer, head) triples, longest head), as plans count them.

    Slots are bytes read over the bytes of a compressed slot: tokens in full precision count for several.
    """
    layers, resident = plan.shape.num_layers, sum(sum(row) for sequence in sequences for row in sequence.lengths())
    if plan.is_plain:
        slots = resident / layers
    else:
        slots = sum(plan.kv_bytes(s.shape.prompt_tokens, s.step) for s in sequences) / layers / plan.slot_bytes
    longest = max(max(row) for sequence in sequences for row in sequence.lengths())
    return slots, resident, max(longest, round(slots / len(sequences) / plan.shape.kv_heads))


def prefill_rows(decoder: Decoder, new_tokens: int, prior_tokens: int, clock: OpClock, weight_dtype: str) -> Rows:
    """Rows of one timed prompt chunk."""
    plan = decoder.plan
    shape = plan.shape
    rows: Rows = list(_linear_rows(decoder, new_tokens, clock, weight_dtype))
    stored = TorchDecoder(attention=decoder.attention.name).chunk_format(plan)
    op = PrefillAttention(new_tokens, prior_tokens, shape.q_heads, shape.kv_heads, shape.head_dim, plan.kv_dtype, stored=stored)
    ops = plan.prefill_ops(new_tokens, prior_tokens)
    told = (*ops, *plan.compress_ops(LONG, LONG))  # KIVI's codes are counted when a prompt ends, and written in its chunks
    rows.append((op, (clock.seconds["attention"] + _rest(told, clock.seconds)) / shape.num_layers))  # the cache is written in it
    return rows + policy_rows(ops, clock)


def policy_rows(ops: Sequence[Op], clock: OpClock) -> Rows:
    """One row for each kernel: several launches of one are one Op here."""
    by_kernel: dict[str, list[PolicyKernel]] = {}
    for op in ops:
        if isinstance(op, PolicyKernel):
            by_kernel.setdefault(op.kernel, []).append(op)
    rows: Rows = []
    for kernel, same in by_kernel.items():
        launches = sum(op.num_launches for op in same)
        if clock.seconds.get(kernel) and launches:
            whole = replace(same[0], bytes_moved=sum(o.bytes_moved for o in same), flops=sum(o.flops for o in same), num_launches=launches)
            rows.append((whole, clock.seconds[kernel]))
    return rows


def means(rows: Rows) -> Rows:
    """One row for each Op: the mean of its times. Medians of parts would add up to less than the whole."""
    times: dict[Op, list[float]] = {}
    for op, seconds in rows:
        times.setdefault(op, []).append(seconds)
    return [(op, fmean(values)) for op, values in times.items()]
