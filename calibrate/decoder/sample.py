"""One configuration of the decoder, run for real: what a step takes, and where the time goes, as rows of Ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from kvsim.calibrate.decoder.clock import NS, NoClock, OpClock, now_ns
from kvsim.calibrate.decoder.decoder import CachedSequence, Decoder
from kvsim.forward import head_ops, linear_ops
from kvsim.ops import Elementwise, Gemm, HostWork, Op, PolicyKernel, PrefillAttention
from kvsim.policies.compose import CachePlan

KERNEL_LABELS = {"select", "compact", "decode_attention_scored", "kv_quantize"}
"""Marks of what policies do in a decode step."""
Rows = list[tuple[Op, float]]
"""An Op, and seconds of one launch of it (policies' kernels: of all their launches)."""


@dataclass(frozen=True)
class DecodeSample:
    """Decode steps of equal sequences. step_s: the median of plain steps. rows: from steps timed mark by mark."""

    batch: int
    context_tokens: int
    step_s: float
    rows: Rows


def fill(decoder: Decoder, prompt_tokens: int, max_steps: int) -> CachedSequence:
    """A sequence as after the prefill of a prompt, compressed, its keys and values random: nothing is computed for them."""
    sequence = prompt(decoder, prompt_tokens, max_steps)
    with torch.inference_mode():
        decoder.compress(sequence)
    return sequence


def prompt(decoder: Decoder, prompt_tokens: int, max_steps: int) -> CachedSequence:
    """The same, not yet compressed."""
    shape, device, generator = decoder.plan.shape, decoder.device, decoder.generator

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    sequence = decoder.open(prompt_tokens, max_steps=max_steps)
    with torch.inference_mode():
        for layer in sequence.layers:
            k, v = (randn(shape.kv_heads, prompt_tokens, shape.head_dim) for _ in range(2))
            decoder.append(layer, k, v)
            if decoder.keeps_positions:
                layer.positions = torch.arange(prompt_tokens, device=device).expand(shape.kv_heads, -1)
            if decoder.window_queries:
                layer.window = randn(min(prompt_tokens, decoder.window_queries), shape.q_heads, shape.head_dim)
            if decoder.scoring is not None and decoder.scoring.prompt_statistic:
                layer.scores = torch.rand(shape.kv_heads, prompt_tokens, generator=generator, device=device)
    sequence.num_tokens = prompt_tokens
    return sequence


def sample_end(decoder: Decoder, prompt_tokens: int, repeats: int = 3) -> tuple[float, Rows]:
    """(median seconds, rows) of the compression of one prompt; no rows where the policies do nothing then."""
    seconds: list[float] = []
    rows: Rows = []
    ops = decoder.plan.compress_ops(prompt_tokens, prompt_tokens)
    for number in range(repeats + 1):
        sequence = prompt(decoder, prompt_tokens, 1)
        try:
            clock = OpClock(decoder.device)
            decoder.transformer.clock = clock
            begin = now_ns(decoder.device)
            clock.start()
            with torch.inference_mode():
                decoder.compress(sequence)
            if number:
                seconds.append((now_ns(decoder.device) - begin) * NS)
                rows += _policy_rows(ops, clock)
        finally:
            decoder.transformer.clock = NoClock()
            decoder.close(sequence)
    return median(seconds), _medians(rows)


def sample_decode(decoder: Decoder, batch: int, context_tokens: int, steps: int = 5, weight_dtype: str = "fp32") -> DecodeSample:
    """`steps` plain steps and as many timed ones, in turn, after one that warms up. Raises OutOfBlocks."""
    sequences = [fill(decoder, context_tokens, 2 * steps + 2) for _ in range(batch)]
    work = [(sequence, 1) for sequence in sequences]
    plain: list[float] = []
    rows: Rows = []
    try:
        decoder.step([], work)
        for _ in range(steps):
            begin = now_ns(decoder.device)
            decoder.step([], work).argmax(1).tolist()
            plain.append((now_ns(decoder.device) - begin) * NS)
            clock = OpClock(decoder.device)
            decoder.transformer.clock = clock
            clock.start()
            decoder.step([], work).argmax(1).tolist()
            clock.mark("sampler")
            decoder.transformer.clock = NoClock()
            rows += decode_rows(decoder.plan, decoder, sequences, clock, weight_dtype)
    finally:
        decoder.transformer.clock = NoClock()
        for sequence in sequences:
            decoder.close(sequence)
    return DecodeSample(batch, context_tokens, median(plain), _medians(rows))


def sample_prefill(
    decoder: Decoder, new_tokens: int, prior_tokens: int, repeats: int = 3, weight_dtype: str = "fp32"
) -> tuple[float, Rows]:
    """(median seconds, rows) of a chunk in the middle of a prompt: nothing is compressed after it."""
    vocab = decoder.transformer.spec.model.vocab_size
    seconds: list[float] = []
    rows: Rows = []
    for number in range(repeats + 1):
        sequence = decoder.open(prior_tokens + new_tokens + 1, max_steps=0)
        try:
            if prior_tokens:
                _seed_prior(decoder, sequence, prior_tokens)
            ids = torch.randint(0, vocab, (new_tokens,), generator=decoder.generator, device=decoder.device)
            clock = OpClock(decoder.device)
            decoder.transformer.clock = clock
            begin = now_ns(decoder.device)
            clock.start()
            decoder.step([(sequence, ids)], [])
            if number:  # the first warms up
                seconds.append((now_ns(decoder.device) - begin) * NS)
                rows += prefill_rows(decoder, new_tokens, prior_tokens, clock, weight_dtype)
        finally:
            decoder.transformer.clock = NoClock()
            decoder.close(sequence)
    return median(seconds), _medians(rows)


def _seed_prior(decoder: Decoder, sequence: CachedSequence, prior_tokens: int) -> None:
    shape = decoder.plan.shape
    with torch.inference_mode():
        for layer in sequence.layers:
            k, v = (torch.randn(shape.kv_heads, prior_tokens, shape.head_dim, generator=decoder.generator) for _ in range(2))
            decoder.append(layer, k.to(decoder.device), v.to(decoder.device))
            if decoder.scoring is not None and decoder.scoring.prompt_statistic:
                layer.scores = torch.zeros(shape.kv_heads, prior_tokens, device=decoder.device)
    sequence.num_tokens = prior_tokens


# -- rows -------------------------------------------------------------------------------------------------------------


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
    for _, op in head_ops(decoder.transformer.spec.model, 1, batch, weight_dtype=weight_dtype):
        name = "lm_head" if isinstance(op, Gemm) else "sampler"
        rows.append((op, seconds[name]))
    slots, resident, longest = _read_slots(plan, sequences)
    attention = replace(plan.attention(0, batch, 0, 0), kv_slots=round(slots), max_kv_tokens=longest)
    rows.append((attention, seconds["attention"] / shape.num_layers))
    ops = plan.step_ops(batch, resident)
    policies = _policy_rows([replace(op, num_launches=batch * op.num_launches) for op in ops if isinstance(op, PolicyKernel)], clock)
    # What a policy does beyond its declared kernels, such as moving a ring on, is the step's own.
    told = {op.kernel for op, _ in policies if isinstance(op, PolicyKernel)}
    rest = sum(value for label, value in seconds.items() if label in KERNEL_LABELS - told)
    rows.append((HostWork("torch_decoder", "step", batch), seconds["step"] + rest))
    return rows + policies


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
    op = PrefillAttention(new_tokens, prior_tokens, shape.q_heads, shape.kv_heads, shape.head_dim, plan.kv_dtype)
    rows.append((op, clock.seconds["attention"] / shape.num_layers))
    return rows + _policy_rows(plan.prefill_ops(new_tokens, prior_tokens), clock)


def _policy_rows(ops: Sequence[Op], clock: OpClock) -> Rows:
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


def _medians(rows: Rows) -> Rows:
    """One row for each Op: the median of its times."""
    times: dict[Op, list[float]] = {}
    for op, seconds in rows:
        times.setdefault(op, []).append(seconds)
    return [(op, median(values)) for op, values in times.items()]
