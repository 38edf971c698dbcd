"""What stops a higher rate: a resource that is used up, or the latency target alone.

Time is told apart by what each Op waits for: the larger of the roofline's own terms, traffic and arithmetic, for matrix products
and attention over the batches that the run really had; HBM for what only moves bytes; the links between GPUs; the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvsim.api import Deployment
from kvsim.datasheet import DatasheetProfile
from kvsim.forward import head_ops, linear_ops
from kvsim.ops import (
    Collective,
    Copy,
    DecodeAttention,
    Elementwise,
    Gemm,
    HostWork,
    LogitFilter,
    MixedAttention,
    PrefillAttention,
)
from kvsim.planning.result import Binding
from kvsim.planning.trial import Capacity, Sample
from kvsim.policies.compose import CachePlan

NEAR_CAPACITY_FRAC = 0.9
"""Of the throughput with a queue always there: above it no latency target would allow much more."""
POOL_FULL_FRAC = 0.97
"""Of the pool held at the most: the rest is less than a prompt takes."""
COMPUTE_BOUND_FRAC = 0.5
"""Of device time bound by arithmetic: a larger batch, which is what more KV memory gives, would not be faster then."""
COMPUTE: Binding = "compute"
HBM: Binding = "hbm_bandwidth"
LINK: Binding = "interconnect"
HOST: Binding = "host"
_LIMITS = ("max_num_seqs", "max_batch_size", "max_running_requests", "batch_size")


class Bound(NamedTuple):
    """share_frac: of device time, by the resource it waits for, the largest first."""

    binds: Binding
    share_frac: dict[str, float]
    notes: tuple[str, ...]


def binding(
    deployment: Deployment, plan: CachePlan, sample: Sample, failing: Sample | None, rate_per_s: float, capacity: Capacity,
    mean_tokens: float,
) -> Bound:  # fmt: skip
    """sample: a run at the rate found. failing: one at the lowest rate that misses, None where that is the capacity itself."""
    shares = resource_shares(deployment, plan, sample, mean_tokens)
    largest: Binding = max((COMPUTE, HBM, LINK, HOST), key=lambda name: shares.get(name, 0.0))
    pressed = failing or sample
    pool_full = pressed.num_preemptions > 0 or pressed.peak_pool_frac >= POOL_FULL_FRAC
    near = failing is None or rate_per_s >= NEAR_CAPACITY_FRAC * capacity.rate_per_s
    binds: Binding = "latency"
    if (pool_full or (near and capacity.pool_full)) and shares.get(COMPUTE, 0.0) < COMPUTE_BOUND_FRAC:
        binds = "kv_capacity"
    elif near:
        binds = largest
    notes = []
    name = next((name for name in _LIMITS if getattr(deployment.engine, name, None)), None)
    if name is not None and pressed.max_batch >= getattr(deployment.engine, name):
        notes.append(f"the batch reaches engine.{name}={getattr(deployment.engine, name)}: a higher limit may bear a higher rate")
    return Bound(binds, shares, tuple(notes))


def resource_shares(deployment: Deployment, plan: CachePlan, sample: Sample, mean_tokens: float) -> dict[str, float]:
    """Share of device time by resource. mean_tokens: cached tokens of a sequence in decode, on average."""
    physics = DatasheetProfile(deployment.gpu)
    compute_frac = {
        Gemm.kind: _gemm_compute_frac(physics, deployment, sample),
        **_attention_compute_frac(physics, plan, sample, mean_tokens),
    }
    shares: dict[str, float] = {}
    total = sum(sample.op_s.values()) or 1.0
    for label, op_s in sample.op_s.items():
        for resource, part in _split(label, compute_frac):
            shares[resource] = shares.get(resource, 0.0) + part * op_s / total
    return dict(sorted(((k, v) for k, v in shares.items() if v > 0), key=lambda item: (-item[1], item[0])))


def _split(label: str, compute_frac: Mapping[str, float]) -> Iterator[tuple[Binding, float]]:
    if label in compute_frac:
        yield COMPUTE, compute_frac[label]
        yield HBM, 1 - compute_frac[label]
    elif label == LogitFilter.kind:  # searches and sorts walk rows at the multiprocessors' pace
        yield COMPUTE, 1.0
    elif label in (Collective.kind, Copy.kind):
        yield LINK, 1.0
    elif label == HostWork.kind:
        yield HOST, 1.0
    else:  # element-wise work and the kernels of policies
        assert label == Elementwise.kind or ":" in label, label
        yield HBM, 1.0


def _gemm_compute_frac(physics: DatasheetProfile, deployment: Deployment, sample: Sample) -> float:
    """Of matrix products' time, what arithmetic sets the pace of, over the batches of the run."""
    by_arithmetic = by_traffic = 0.0
    for decodes, prompt_tokens, share in sample.loads:
        num_tokens = max(decodes + prompt_tokens, 1)
        ops = [*linear_ops(deployment.model, deployment.tp, deployment.weight_dtype, deployment.engine.padded(num_tokens))]
        ops += head_ops(deployment.model, deployment.tp, max(decodes, 1))
        step = [(times * max(terms), terms[1] > terms[0]) for times, op in ops if isinstance(op, Gemm) for terms in [physics.terms(op)]]
        total = sum(seconds for seconds, _ in step)
        bound = sum(seconds for seconds, arithmetic in step if arithmetic)
        by_arithmetic += share * bound / total
        by_traffic += share * (1 - bound / total)
    return by_arithmetic / ((by_arithmetic + by_traffic) or 1.0)


def _attention_compute_frac(
    physics: DatasheetProfile, plan: CachePlan, sample: Sample, mean_tokens: float
) -> dict[str, float]:
    """The same of attention: of prompts, of decodes, and of both in one launch."""
    shape = plan.shape
    decode_compute = decode_traffic = prefill_compute = prefill_traffic = 0.0
    for decodes, prompt_tokens, share in sample.loads:
        if decodes:
            units = plan.units_of_slots(0, round(decodes * mean_tokens * shape.kv_heads))
            memory_s, compute_s = physics.terms(plan.attention(0, decodes, round(units), units / decodes))
            decode_compute, decode_traffic = decode_compute + share * compute_s, decode_traffic + share * memory_s
        if prompt_tokens:
            op = PrefillAttention(prompt_tokens, 0, shape.q_heads, shape.kv_heads, shape.head_dim, plan.kv_dtype)
            memory_s, compute_s = physics.terms(op)
            prefill_compute, prefill_traffic = prefill_compute + share * compute_s, prefill_traffic + share * memory_s
    decode = float(decode_compute > decode_traffic)
    prefill = float(prefill_compute > prefill_traffic)
    prompts, decodes_s = max(prefill_compute, prefill_traffic), max(decode_compute, decode_traffic)
    mixed = (prefill * prompts + decode * decodes_s) / ((prompts + decodes_s) or 1.0)
    return {DecodeAttention.kind: decode, PrefillAttention.kind: prefill, MixedAttention.kind: mixed}
