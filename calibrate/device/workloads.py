"""What runs for a point: inputs and a call in plain torch, as a `Bench` that `bench_timing` can time. Kernels are in `kernel_work`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from kvsim.calibrate.bench import EAGER, GRAPH, ISSUE, Bench, Inputs, Maker, Shape, no_flops
from kvsim.calibrate.device.host_layer import CACHED_TOKENS, HEAD_DIM, HIDDEN, Layer
from kvsim.calibrate.device.points import Point
from kvsim.calibrate.hf_bench import HF_OPS
from kvsim.dtypes import INT4_GROUP_SIZE
from kvsim.ops import Copy, DecodeAttention, Elementwise, Gemm, HostWork, LogitFilter, MixedAttention, PrefillAttention

FP8_MAX = 448.0
"""Largest number of e4m3."""
INT4_INNER_K_TILES = 8
"""Of torch's packed int4 weights on a GPU (tinygemm); 2, 4 or 8."""
LAYER_NORM_ROW = 4096
PAGE_TOKENS = 16
TOP_K, TOP_P = 50, 0.9
"""Of filters; a sort takes as long whatever they are."""


class NoSuchUnits(RuntimeError):
    """The device, or torch on it, lacks what a point needs."""


def bench_of(point: Point) -> Bench:
    """The benchmark of a point on the maker's device; its shape is the point's own, so it takes an empty one."""
    make, run, modes = WORKS[point.work](point)
    return Bench(point.work, (), (), lambda _, maker: make(maker), run, lambda _, size: num_bytes(point), no_flops, modes)


Work = tuple[Callable[[Maker], Inputs], Callable[[Inputs], Any], tuple[str, ...]]
DEVICE = (GRAPH, EAGER)
"""A graph's time where there are graphs."""


def num_bytes(point: Point) -> int:
    """Bytes of a call's inputs and outputs, about: whether it fits."""
    op = point.op
    if isinstance(op, Gemm):
        return 4 * (op.m * op.k + op.n * op.k + op.m * op.n)
    if isinstance(op, PrefillAttention):
        tokens = op.new_tokens + op.prior_tokens
        return 4 * op.head_dim * 2 * (op.q_heads * op.new_tokens + op.kv_heads * tokens)
    if isinstance(op, DecodeAttention):
        return int(op.bytes_moved)
    if isinstance(op, MixedAttention):
        return int(op.decode.bytes_moved) + 8 * op.prefill.q_heads * op.prefill.head_dim * (op.prefill.new_tokens + op.prefill.prior_tokens)
    if isinstance(op, LogitFilter):  # logits, what is sorted, int64 places, probabilities, what is put back
        return 24 * op.rows * op.vocab_size
    return 2 * op.num_bytes if isinstance(op, Copy) else int(getattr(op, "bytes_moved", 2**16))


# --- matrix products --------------------------------------------------------------------------------------------------
def gemm(point: Point) -> Work:
    op = _of(point, Gemm)
    return lambda make: (make.normal(op.m, op.k), make.normal(op.n, op.k)), lambda inputs: F.linear(*inputs), DEVICE


def gemm_fp8(point: Point) -> Work:
    """W8A8 with a scale of each tensor, bf16 out: torch's `_scaled_mm`, cuBLASLt underneath."""
    op = _of(point, Gemm)

    def make(maker: Maker) -> Inputs:
        x, w = (t.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn) for t in (maker.normal(op.m, op.k), maker.normal(op.n, op.k)))
        return x, w, torch.ones((), device=maker.device), torch.ones((), device=maker.device)

    def run(inputs: Inputs) -> Any:
        x, w, scale_x, scale_w = inputs
        return torch._scaled_mm(x, w.t(), scale_x, scale_w, out_dtype=torch.bfloat16)

    return make, run, DEVICE


def gemm_int4(point: Point) -> Work:
    """Weights of 4 bits in groups of 128 with scale and zero, bf16 activations: torch's packed product."""
    op = _of(point, Gemm)
    aten = torch.ops.aten

    def make(maker: Maker) -> Inputs:
        x, on_cpu = maker.normal(op.m, op.k), maker.device.type == "cpu"
        params = maker.normal(op.n, -(-op.k // INT4_GROUP_SIZE), 2)
        if on_cpu:
            codes = torch.randint(0, 16, (op.n, op.k), dtype=torch.int32, generator=maker.generator)
            return x, aten._convert_weight_to_int4pack_for_cpu(codes, 1), params.transpose(0, 1).contiguous()
        packed = aten._convert_weight_to_int4pack(maker.random_bytes(op.n * op.k // 2).view(op.n, -1), INT4_INNER_K_TILES)
        return x, packed, params.transpose(0, 1).contiguous()

    def run(inputs: Inputs) -> Any:
        x, packed, params = inputs
        product = aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else aten._weight_int4pack_mm
        return product(x, packed, INT4_GROUP_SIZE, params)

    return make, run, DEVICE


# --- attention --------------------------------------------------------------------------------------------------------
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """q [b, Hq, n, d] over k and v [b, Hkv, t, d]; causal: the last query sees all t tokens."""
    grouped = q.shape[1] != k.shape[1]
    if not causal:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)


def _prefill_inputs(op: PrefillAttention, make: Maker) -> Inputs:
    tokens = op.new_tokens + op.prior_tokens
    q = make.normal(op.num_sequences, op.q_heads, op.new_tokens, op.head_dim)
    return q, *(make.normal(op.num_sequences, op.kv_heads, tokens, op.head_dim) for _ in range(2))


def prefill(point: Point) -> Work:
    op = _of(point, PrefillAttention)
    return lambda make: _prefill_inputs(op, make), lambda inputs: attend(inputs[0], inputs[1], inputs[2], causal=True), DEVICE


def _decode_inputs(op: DecodeAttention, make: Maker) -> Inputs:
    """q, and K and V [batch, Hkv, tokens, d]: all sequences of one length."""
    tokens = op.kv_slots // (op.batch * op.kv_heads)
    q = make.normal(op.batch, op.q_heads, 1, op.head_dim)
    return q, *(make.normal(op.batch, op.kv_heads, tokens, op.head_dim) for _ in range(2))


def decode(point: Point) -> Work:
    """On a GPU the project's Triton kernel over paged blocks; on a CPU torch's attention."""
    op = _of(point, DecodeAttention)
    if op.layout == "paged":
        return _paged(op, point, None)
    return lambda make: _decode_inputs(op, make), lambda inputs: attend(*inputs), DEVICE


def decode_lengths(point: Point) -> Work:
    """Unlike lengths: one launch over paged blocks on a GPU, a call for each sequence on a CPU."""
    op, lengths = _of(point, DecodeAttention), dict(point.details)["lengths"]
    if op.layout == "paged":
        return _paged(op, point, lengths)

    def make(maker: Maker) -> Inputs:
        caches = [maker.normal(1, op.kv_heads, n, op.head_dim) for n in lengths for _ in range(2)]
        return maker.normal(op.batch, op.q_heads, 1, op.head_dim), *caches

    def run(inputs: Inputs) -> Any:
        q, *caches = inputs
        return [attend(q[i : i + 1], caches[2 * i], caches[2 * i + 1]) for i in range(op.batch)]

    return make, run, DEVICE


def _paged(op: DecodeAttention, point: Point, lengths: tuple[int, ...] | None) -> Work:
    from kvsim.kernels import decode_attention  # Triton's: on a GPU alone
    from kvsim.kernels.layouts import CacheShape, make_cache

    shape = CacheShape(
        batch=op.batch, kv_heads=op.kv_heads, tokens=op.max_kv_tokens, head_dim=op.head_dim, dtype=point.dtype, layout="paged",
        block_size=PAGE_TOKENS,
    )  # fmt: skip

    def make(maker: Maker) -> Inputs:
        cache = make_cache(shape, _numpy_rng(maker), maker.device)
        if lengths is not None:
            per_head = torch.tensor(lengths, dtype=torch.int32, device=maker.device)[:, None].expand(-1, op.kv_heads)
            cache["lengths"] = per_head.contiguous()
        q = maker.normal(op.batch, op.q_heads, op.head_dim)
        return q, cache["k"], cache["v"], cache["lengths"], cache["block_table"]

    return make, lambda inputs: decode_attention.run(*inputs, max_length=op.max_kv_tokens), DEVICE


def mixed(point: Point) -> Work:
    """A prompt chunk and decodes: one launch of torch's variable-length attention on a GPU, two calls on a CPU."""
    op = _of(point, MixedAttention)
    if op.decode.layout == "paged":
        return _variable_length(op)

    def run(inputs: Inputs) -> Any:
        q, k, v, *decode = inputs
        return attend(q, k, v, causal=True), attend(*decode)

    return lambda make: (*_prefill_inputs(op.prefill, make), *_decode_inputs(op.decode, make)), run, DEVICE


def _variable_length(op: MixedAttention) -> Work:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NoSuchUnits(f"torch {torch.__version__} has no torch.nn.attention.varlen") from error
    context = op.decode.kv_slots // (op.decode.batch * op.decode.kv_heads)
    queries = [op.prefill.new_tokens] + [1] * op.decode.batch
    keys = [op.prefill.new_tokens + op.prefill.prior_tokens] + [context] * op.decode.batch

    def make(maker: Maker) -> Inputs:
        starts = [torch.tensor([0, *counts], device=maker.device).cumsum(0, dtype=torch.int32) for counts in (queries, keys)]
        q = maker.normal(sum(queries), op.prefill.q_heads, op.prefill.head_dim)
        return q, *(maker.normal(sum(keys), op.prefill.kv_heads, op.prefill.head_dim) for _ in range(2)), *starts

    def run(inputs: Inputs) -> Any:
        grouped = op.prefill.q_heads != op.prefill.kv_heads
        q, k, v, query_starts, key_starts = inputs
        longest = max(queries), max(keys)
        return varlen_attn(q, k, v, query_starts, key_starts, *longest, window_size=(-1, 0), enable_gqa=grouped)

    return make, run, DEVICE


# --- streams, links, host ---------------------------------------------------------------------------------------------
def elementwise(point: Point) -> Work:
    op = _of(point, Elementwise)
    elements = op.bytes_moved // (3 if op.name == "add" else 2) // getattr(torch, point.dtype).itemsize
    if op.name == "add":
        return lambda make: (make.normal(elements), make.normal(elements)), lambda inputs: torch.add(*inputs), DEVICE
    if op.name == "silu":
        return lambda make: (make.normal(elements),), lambda inputs: F.silu(*inputs), DEVICE
    row = min(LAYER_NORM_ROW, elements)
    return lambda make: (make.normal(elements // row, row),), lambda inputs: F.layer_norm(inputs[0], (row,)), DEVICE


def logit_filter(point: Point) -> Work:
    """Top-k and top-p as servers on plain PyTorch find them: every row is sorted, masked, and put back."""
    op = _of(point, LogitFilter)

    def run(inputs: Inputs) -> Any:
        ordered, places = inputs[0].sort(dim=-1)
        if op.which.startswith("top_k"):
            ordered.masked_fill_(ordered < ordered[:, -TOP_K, None], -math.inf)
        if op.which.endswith("top_p"):
            unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - TOP_P
            unlikely[:, -1] = False
            ordered.masked_fill_(unlikely, -math.inf)
        return ordered.scatter(-1, places, ordered)

    return lambda make: (make.normal(op.rows, op.vocab_size),), run, DEVICE


def device_copy(point: Point) -> Work:
    size = _of(point, Copy).num_bytes
    return lambda make: (make.random_bytes(size), make.random_bytes(size)), lambda inputs: inputs[1].copy_(inputs[0]), DEVICE


def host_copy(point: Point) -> Work:
    """Pinned memory over the link. On a CPU the link is memory itself: what an offload costs there."""
    size, to_host = _of(point, Copy).num_bytes, dict(point.details)["direction"] == "to_host"

    def make(maker: Maker) -> Inputs:
        here, there = maker.random_bytes(size), maker.random_bytes(size).cpu()
        there = there.pin_memory() if maker.device.type == "cuda" else there
        return (here, there) if to_host else (there, here)

    return make, lambda inputs: inputs[1].copy_(inputs[0], non_blocking=True), (EAGER,)


def engine(point: Point) -> Work:
    """Ops of Hugging Face's eager decoding, which `kvsim.calibrate.measure` times too."""
    details = dict(point.details)
    bench = next(b for b in HF_OPS if b.name == details["bench"])
    shape: Shape = dict(details["shape"])
    return lambda make: bench.make_inputs(shape, make), bench.run, DEVICE


def eager_layers(point: Point) -> Work:
    """Host time to issue decoder layers kernel by kernel."""
    _of(point, HostWork)
    layers = dict(point.details)["layers"]

    def make(maker: Maker) -> Inputs:
        layer = Layer().to(maker.device).eval()
        rotary = (maker.normal(1, 1, 1, HEAD_DIM) for _ in range(2))
        mask = torch.zeros(1, 1, 1, CACHED_TOKENS + 1, device=maker.device)
        return layer, maker.normal(1, 1, HIDDEN), *rotary, mask, maker.normal(1, 1, CACHED_TOKENS, HEAD_DIM)

    def run(inputs: Inputs) -> Any:
        layer, x, *others = inputs
        for _ in range(layers):
            x = layer(x, *others)
        return x

    return make, run, (ISSUE,)


def _numpy_rng(maker: Maker) -> Any:
    import numpy as np

    return np.random.default_rng(int(torch.randint(0, 2**62, (), generator=maker.generator, device=maker.device)))


def _of(point: Point, kind: Any) -> Any:
    assert isinstance(point.op, kind), point
    return point.op


WORKS: dict[str, Callable[[Point], Work]] = {
    work.__name__: work
    for work in (
        gemm, gemm_fp8, gemm_int4, prefill, decode, decode_lengths, mixed, elementwise, logit_filter, device_copy, host_copy, engine,
        eager_layers,
    )
}  # fmt: skip
"""By `Point.work`; kernels and all-reduce are timed by `TorchTimer` itself."""
