"""The grids of a calibration: every Op that the cost model asks for, over the shapes of the catalogue's models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from kvsim.calibrate.device.kernel_grids import engine_points, kernel_points
from kvsim.calibrate.device.points import ELEMENTWISE, SKEW, Heads, Point
from kvsim.dtypes import kv_bytes_per_element
from kvsim.model import Model, list_models, load_model
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
from kvsim.units import GIB, KIB, MIB

TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
GEMM_M = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Powers of two and the middles between them, where the last wave of tiles is half full."""
NEW_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PRIOR_TOKENS = (0, 512, 2048, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MAX_BATCH_TOKENS = 2**20
"""Largest batch x context: 4 GiB of K and V in 16 bits for 8 KV heads of 128."""
SMALL_MODEL_WIDTHS = (256, 512, 1024, 2048)
"""Hidden sizes of models that a CPU decodes, with MLPs four times as wide and Llama-2's vocabulary."""
SMALL_MODEL_HEADS = (Heads(4, 4, 64), Heads(8, 2, 64), Heads(8, 8, 64), Heads(16, 4, 64), Heads(32, 8, 64), Heads(14, 2, 64))
LLAMA_2_VOCABULARY = 32000
FILTERED_ROWS, VOCABULARIES = (1, 4, 16, 64, 127, 128, 256, 512), (LLAMA_2_VOCABULARY, 128_256, 151_936)
"""PyTorch sorts rows in another way from 128 on. Vocabularies of Llama 2, Llama 3 and Qwen2.5."""
CPU_MAX_FLOPS, CPU_MAX_BYTES, CPU_MAX_STREAM_BYTES = 5 * 10**10, 2**29, 64 * MIB
HF_LAUNCHES_PER_LAYER = 42
"""Launches that kvsim/engines/huggingface.py counts in a decoder layer of transformers, of which `host_layer.Layer` is one."""


@dataclass(frozen=True)
class Scope:
    """Where a calibration runs, and how much of it. num_gpus: that torch sees; all-reduce needs two."""

    device_type: str  # "cuda" or "cpu"
    plan: str  # "full" or "small"
    num_gpus: int = 1
    models: tuple[Model, ...] = ()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Activation dtypes, the device's usual one first."""
        return ("bf16", "fp16", "fp32") if self.device_type == "cuda" else ("fp32", "bf16")


def all_points(scope: Scope) -> list[Point]:
    """Every point of the plan, each once."""
    if scope.plan == "small":
        return list(dict.fromkeys(_small(scope)))
    models = [*scope.models, *(load_model(name) for name in list_models())]
    heads = list(dict.fromkeys(Heads(m.num_q_heads, m.num_kv_heads, m.head_dim) for m in models))
    weights = list(dict.fromkeys((g.n, g.k) for m in models for g in (*m.gemms(), m.lm_head())))
    if scope.device_type == "cpu":
        weights += [pair for width in SMALL_MODEL_WIDTHS for pair in _small_model_weights(width)]
        heads += SMALL_MODEL_HEADS
    found = [*_gemms(scope, weights), *_prefills(scope, heads), *_decodes(scope, heads), *_skewed(scope, heads)]
    found += [*_mixed(scope, heads), *_streams(scope, (4 * KIB, GIB)), *_filters(scope), *_collectives(scope), *_host()]
    found += [*engine_points(scope.dtypes[0]), *kernel_points(scope.device_type, scope.device_type == "cpu")]
    return [point for point in dict.fromkeys(found) if scope.device_type == "cuda" or _cpu_can_afford(point)]


def _cpu_can_afford(point: Point) -> bool:
    """A CPU takes about a second for so many FLOPs; inputs of more bytes take as long to make."""
    op = point.op
    if isinstance(op, Gemm):
        size = 4 if point.dtype == "float32" else 2
        return 2 * op.m * op.n * op.k <= CPU_MAX_FLOPS and size * op.n * op.k <= CPU_MAX_BYTES
    prefill = op.prefill if isinstance(op, MixedAttention) else op
    if isinstance(prefill, PrefillAttention) and prefill.flops > CPU_MAX_FLOPS:
        return False
    decode = op.decode if isinstance(op, MixedAttention) else op
    return getattr(decode, "bytes_moved", 0) <= CPU_MAX_BYTES


def _small(scope: Scope) -> Iterator[Point]:
    """The same kinds over tiny shapes: a self-test of seconds, whose profile serves toy models alone."""
    heads = (Heads(4, 2, 32), Heads(4, 4, 32), Heads(8, 2, 32))
    own = [(g.n, g.k) for m in scope.models for g in (*m.gemms(), m.lm_head())]
    small = Scope(scope.device_type, "small", 1)
    weights = [*own, *product((64, 128, 256), (64, 128))]
    yield from _gemms(small, weights, (1, 4, 16, 64), scope.dtypes[:1])
    yield from _prefills(small, heads, (16, 64), (0, 64), scope.dtypes[:1])
    yield from _decodes(small, heads, (1, 4, 8), (32, 128, 256), scope.dtypes[:1])
    yield from _skewed(small, heads[:1], (8,), (64,))
    yield from _mixed(small, heads[:2], (16, 64), (0,), (1, 4), (64,))
    yield from _streams(scope, (4 * KIB, 256 * KIB))
    yield from _filters(scope, (1, 4), (1000, 4000))
    yield from _host((1, 2, 4))
    yield from engine_points(scope.dtypes[0], (32, 64), (4,), Heads(4, 4, 16))
    yield from kernel_points(scope.device_type, True, sizes=(1, 2))


def _small_model_weights(width: int) -> Iterator[tuple[int, int]]:
    yield from ((3 * width, width), (width, width), (8 * width, width), (width, 4 * width), (LLAMA_2_VOCABULARY, width))


def _gemms(
    scope: Scope, weights: Iterable[tuple[int, int]], sizes: Sequence[int] = GEMM_M, dtypes: Sequence[str] = ()
) -> Iterator[Point]:  # fmt: skip
    first = scope.dtypes[0]
    for (n, k), m in product(weights, sizes):
        for dtype in dtypes or scope.dtypes:
            yield Point(Gemm(m, n, k, dtype), "gemm", TORCH_DTYPES[dtype], weight=1.0 if dtype == first else 0.2)
        if scope.plan == "full" and scope.device_type == "cuda":  # torch's products of such weights on a CPU are loops for tests
            yield Point(Gemm(m, n, k, "fp8"), "gemm_fp8", "bfloat16", weight=0.3)
            yield Point(Gemm(m, n, k, "int4"), "gemm_int4", "bfloat16", weight=0.3)


def _prefills(
    scope: Scope, heads: Iterable[Heads], new: Sequence[int] = NEW_TOKENS, prior: Sequence[int] = PRIOR_TOKENS,
    dtypes: Sequence[str] = (),
) -> Iterator[Point]:  # fmt: skip
    for h, new_tokens, prior_tokens in product(heads, new, prior):
        for dtype in dtypes or scope.dtypes[:2]:
            op = PrefillAttention(new_tokens, prior_tokens, h.q_heads, h.kv_heads, h.head_dim, dtype)
            yield Point(op, "prefill", TORCH_DTYPES[dtype], weight=1.0 if dtype == scope.dtypes[0] else 0.2)


def decode_op(batch: int, h: Heads, context: int, dtype: str, layout: str) -> DecodeAttention:
    """All sequences of one length in an unquantised cache."""
    slot_bytes = 2.0 * h.head_dim * kv_bytes_per_element(dtype)
    slots = batch * h.kv_heads * context
    return DecodeAttention(batch, h.q_heads, h.kv_heads, h.head_dim, slots, context, slot_bytes, dtype, layout)


def layout(scope: Scope) -> str:
    """Of the cache: blocks under the project's Triton kernel on a GPU, torch's own attention on a CPU."""
    return "paged" if scope.device_type == "cuda" else "contiguous"


def _decodes(
    scope: Scope, heads: Iterable[Heads], batches: Sequence[int] = BATCHES, contexts: Sequence[int] = CONTEXTS,
    dtypes: Sequence[str] = (),
) -> Iterator[Point]:  # fmt: skip
    for h, batch, context in product(heads, batches, contexts):
        if batch * context <= MAX_BATCH_TOKENS:
            for dtype in dtypes or scope.dtypes[:2]:
                op = decode_op(batch, h, context, dtype, layout(scope))
                yield Point(op, "decode", TORCH_DTYPES[dtype], weight=1.0 if dtype == scope.dtypes[0] else 0.2)


def _skewed(
    scope: Scope, heads: Sequence[Heads], batches: Sequence[int] = (8, 32), contexts: Sequence[int] = (512, 2048)
) -> Iterator[Point]:
    """Unlike lengths of one mean: one sequence long and the others short, or lognormal."""
    dtype = scope.dtypes[0]
    chosen = [h for h in heads if h in ((32, 8, 128), (8, 2, 64))] or heads[:1]
    patterns = [("one_long", ratio) for ratio in (2.0, 4.0, 7.0)] + [("lognormal", sigma) for sigma in (0.5, 1.0)]
    for h, batch, context, (pattern, amount) in product(chosen, batches, contexts, patterns):
        lengths = skewed_lengths(pattern, amount, batch, context)
        slots, slot_bytes = h.kv_heads * sum(lengths), 2.0 * h.head_dim * kv_bytes_per_element(dtype)
        op = DecodeAttention(batch, h.q_heads, h.kv_heads, h.head_dim, slots, max(lengths), slot_bytes, dtype, layout(scope))
        yield Point(op, SKEW, TORCH_DTYPES[dtype], (("pattern", pattern), ("lengths", lengths)), 0.5)


def skewed_lengths(pattern: str, amount: float, batch: int, mean_tokens: int) -> tuple[int, ...]:
    """Whole lengths, their mean within rounding `mean_tokens`. amount: longest / mean, or sigma of the logarithm."""
    if pattern == "one_long":
        longest = min(amount, batch / 2) * mean_tokens
        shares = [longest, *[(batch * mean_tokens - longest) / (batch - 1)] * (batch - 1)]
    else:
        from statistics import NormalDist

        normal = NormalDist()
        shares = [2.718281828459045 ** (amount * normal.inv_cdf((i + 0.5) / batch)) for i in range(batch)]
        shares = [mean_tokens * batch * share / sum(shares) for share in shares]
    return tuple(max(1, round(share)) for share in shares)


def _mixed(
    scope: Scope, heads: Sequence[Heads], new: Sequence[int] = (64, 256, 512, 2048), prior: Sequence[int] = (0, 2048),
    decodes: Sequence[int] = (1, 8, 32, 128), contexts: Sequence[int] = (512, 4096),
) -> Iterator[Point]:  # fmt: skip
    dtype = scope.dtypes[0]
    chosen = [h for h in heads if h in ((32, 8, 128), (32, 32, 128), (8, 2, 64))] or heads
    for h, new_tokens, prior_tokens, batch, context in product(chosen, new, prior, decodes, contexts):
        prefill = PrefillAttention(new_tokens, prior_tokens, h.q_heads, h.kv_heads, h.head_dim, dtype)
        op = MixedAttention(prefill, decode_op(batch, h, context, dtype, layout(scope)))
        yield Point(op, "mixed", TORCH_DTYPES[dtype], weight=0.7)


def _streams(scope: Scope, ends: tuple[int, int]) -> Iterator[Point]:
    """Element-wise Ops and copies of every power of two bytes."""
    dtype, size = TORCH_DTYPES[scope.dtypes[0]], ends[0]
    if scope.device_type == "cpu":
        ends = ends[0], min(ends[1], CPU_MAX_STREAM_BYTES)
    while size <= ends[1]:
        for name in ELEMENTWISE:
            yield Point(Elementwise(name, (3 if name == "add" else 2) * size), "elementwise", dtype, weight=0.6)
        for direction in ("to_device", "to_host") if scope.device_type == "cuda" else ("to_host",):
            yield Point(Copy("host", size), "host_copy", "uint8", (("direction", direction),), 0.5)
        yield Point(Copy("hbm", size), "device_copy", "uint8", weight=0.3)
        size *= 2


def _filters(scope: Scope, rows: Sequence[int] = FILTERED_ROWS, vocabularies: Sequence[int] = VOCABULARIES) -> Iterator[Point]:
    """Top-k and top-p by PyTorch; rows of other libraries come by `kvsim calibrate import`."""
    if scope.device_type == "cpu":
        rows, vocabularies = rows[:3], vocabularies[:2]
    for which, number, vocabulary in product(("top_k", "top_p", "top_k_top_p"), rows, vocabularies):
        yield Point(LogitFilter("pytorch", which, number, vocabulary), "logit_filter", "float32", weight=0.3)


def _collectives(scope: Scope) -> Iterator[Point]:
    for num_gpus in (2, 4, 8):
        if num_gpus <= scope.num_gpus:
            for power in range(10, 29, 2):
                yield Point(Collective("all_reduce", 2**power, num_gpus, True), "all_reduce", "float16", weight=0.7)


def _host(layers: Sequence[int] = (1, 2, 4, 8, 16, 32, 48, 64)) -> Iterator[Point]:
    for count in layers:
        op = HostWork("huggingface", "launch", count * HF_LAUNCHES_PER_LAYER)
        yield Point(op, "eager_layers", "float32", (("layers", count),), 0.4)
