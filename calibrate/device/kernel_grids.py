"""Points of compression kernels, described as the policies describe them (`kvsim/policies/kernels.py`), one layer each.

So a measured time answers the very Op that a policy launches, however the kernel itself counts its bytes. Attention over a
compressed cache is a DecodeAttention of its format. Names and fields of shapes are those of `kernels/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from kvsim.calibrate.device.points import Heads, Point
from kvsim.dtypes import kv_bytes_per_element
from kvsim.engines.huggingface import HuggingFace
from kvsim.ops import DecodeAttention, Op, PolicyKernel
from kvsim.policies import kernels as counted
from kvsim.policies.base import CacheShape
from kvsim.policies.kivi import KIVI
from kvsim.policies.kv_quant import KVQuant
from kvsim.policies.scissorhands import COUNTER_BYTES
from kvsim.policies.think import ThinK

WINDOW_TOKENS = 32
PAGE_TOKENS = 32
WEIGHT = 0.5
LLAMA_8B, TINY = Heads(32, 8, 128), Heads(4, 2, 64)
KIVI_RESIDUAL_TOKENS = KIVI().residual_tokens
ENGINE_TOKENS, ENGINE_BATCHES = (256, 512, 1024, 2048, 4096, 8192), (1, 4, 8)
MPT_7B = Heads(32, 32, 128)
Fields = dict[str, Any]


def kernel_points(device_type: str, tiny: bool, sizes: Sequence[int] = range(6)) -> Iterator[Point]:
    """Every kernel of `kernels/` over a ladder of sizes. tiny: of a few tokens, for torch references, which are slow.

    sizes: steps of the ladder, each twice as many tokens.
    """
    h = TINY if tiny else LLAMA_8B
    base, batches = (64, (1,)) if tiny else (1024, (1, 16))
    for size, batch in product(sizes, batches):
        tokens = base << size
        if batch * tokens > 2**18:
            continue
        cache = {"batch": batch, "kv_heads": h.kv_heads, "tokens": tokens, "head_dim": h.head_dim}
        for kernel, fields, op in (*_scores(h, cache), *_moves(h, cache), *_quantised(h, cache), *_attention(h, cache)):
            yield _point(kernel, fields, op, device_type)
        for kernel, fields, op in _rows(h, batch, tokens, tiny):
            yield _point(kernel, fields, op, device_type)


def _point(kernel: str, fields: Fields, op: Op, device_type: str) -> Point:
    work = "kernel_beside" if kernel == "decode_attention_scored" else "kernel"
    impl = "triton" if device_type == "cuda" else "reference"
    return Point(op, work, "bfloat16", (("kernel", kernel), ("shape", tuple(fields.items())), ("variant", impl)), WEIGHT)


def one_layer(h: Heads, element_bytes: float = 2.0) -> CacheShape:
    return CacheShape(1, h.q_heads, h.kv_heads, h.head_dim, element_bytes, 16)


def _scores(h: Heads, cache: Fields) -> Iterator[tuple[str, Fields, Op]]:
    """Scores that decode attention leaves, and scores of a prompt by its last queries or by all of them."""
    shape, group = one_layer(h), h.q_heads // h.kv_heads
    slots, tokens = cache["batch"] * h.kv_heads * cache["tokens"], cache["tokens"]
    whole = counted.SCORE_BYTES
    for statistic, passes, score_bytes in (("sum", 1, whole), ("threshold_count", 1, COUNTER_BYTES), ("gumbel", 2, whole)):
        fields = cache | {"group": group, "statistic": statistic}
        yield "decode_attention_scored", fields, counted.accumulate_scores(shape, slots, passes, score_bytes)
    if cache["batch"] == 1:
        window = cache | {"group": group, "num_queries": min(WINDOW_TOKENS, tokens), "pooling": "mean"}
        yield "prefill_scores", window, counted.window_scores(shape, tokens, window["num_queries"])
        if tokens <= 8192:  # a sum takes one of its two passes where FlashAttention's row sums are given, which are not here
            yield "prefill_scores", cache | {"group": group, "statistic": "gumbel"}, counted.prompt_scores(shape, tokens, 0, passes=2)


def _moves(h: Heads, cache: Fields) -> Iterator[tuple[str, Fields, Op]]:
    shape, batch, tokens = one_layer(h), cache["batch"], cache["tokens"]
    pairs = batch * h.kv_heads
    for kept_frac in (0.25, 0.5):
        kept = pairs * int(tokens * kept_frac)
        yield "compact", cache | {"kept_frac": kept_frac}, counted.compact(shape, kept)
    group = {"group": h.q_heads // h.kv_heads}
    yield "think_scores", cache | group, counted.think_scores(shape, batch * tokens)
    stored = ThinK().stored_key_channels(h.head_dim)
    yield "think_gather", cache, counted.think_gather(shape, batch * tokens, stored)
    yield "rerotate", cache, counted.rerotate(shape, pairs * tokens)


def _quantised(h: Heads, cache: Fields) -> Iterator[tuple[str, Fields, Op]]:
    vectors = cache["batch"] * h.kv_heads * cache["tokens"]
    for element, groups, bits in (("int2", "token", 2), ("int4", "channel", 4)):
        size = 32
        stored = h.head_dim * (bits / 8 + 4 / size)  # a 16-bit scale and minimum a group
        fields = cache | {"element": element, "groups": groups, "group_size": size}
        yield "kv_quantize", fields, counted.kv_quantize(one_layer(h), vectors, stored, 1)


def _attention(h: Heads, cache: Fields) -> Iterator[tuple[str, Fields, Op]]:
    """Decode attention over caches of fewer bits or channels, by the bytes that policies say it reads."""
    batch, tokens, d = cache["batch"], cache["tokens"], h.head_dim
    group = {"group": h.q_heads // h.kv_heads}
    wide = kv_bytes_per_element("bf16") * d
    for bits in (2, 4):
        policy = KIVI(bits=bits)
        key, value = policy.key_bytes(d, 2.0), policy.value_bytes(d, 2.0)
        keys, values = tokens // KIVI_RESIDUAL_TOKENS * KIVI_RESIDUAL_TOKENS, max(0, tokens - KIVI_RESIDUAL_TOKENS)
        read = keys * key + values * value + (2 * tokens - keys - values) * wide
        fields = cache | group | {"format": f"kivi{bits}", "block_size": PAGE_TOKENS}
        yield "kv_quant_decode_attention", fields, _decode(h, batch, read / (key + value), key + value, f"kivi{bits}")
    for dtype in ("int4", "int8", "fp8"):
        stored = 2 * KVQuant(dtype=dtype).vector_bytes(d)
        fields = cache | group | {"format": "fp8_token" if dtype == "fp8" else f"{dtype}_group64", "block_size": PAGE_TOKENS}
        yield "kv_quant_decode_attention", fields, _decode(h, batch, tokens, stored, dtype)
    think = ThinK()
    channels, kept = think.stored_key_channels(d), think.kept_channels(d)
    full = min(think.recent_tokens, tokens)
    read = (tokens - full) * (2.0 * channels + wide) + full * 2 * wide
    slot = 2.0 * channels + wide
    fields = cache | group | {"kept_channels": kept, "recent_tokens": think.recent_tokens}
    yield "think_decode_attention", fields, _decode(h, batch, read / slot, slot, think.format_name("bf16", d))


def _decode(h: Heads, batch: int, tokens: float, slot_bytes: float, kv_format: str) -> DecodeAttention:
    return DecodeAttention(
        batch, h.q_heads, h.kv_heads, h.head_dim, round(batch * h.kv_heads * tokens), round(tokens), slot_bytes, kv_format, "contiguous"
    )  # fmt: skip


def _rows(h: Heads, batch: int, tokens: int, tiny: bool) -> Iterator[tuple[str, Fields, Op]]:
    """Kernels whose shapes are rows of scores or a pool of slots."""
    rows = batch * h.kv_heads
    for one, budget in ((False, max(40, tokens // 4)), (True, tokens - 1)):  # 4 sinks and 32 recent tokens are among them
        op = counted.select(one_layer(h), rows * tokens, one)
        yield "select", {"num_rows": rows, "tokens": tokens, "budget_tokens": budget}, op
    slots, group = rows * tokens * (1 if tiny else 16), h.q_heads // h.kv_heads
    yield "metric_pool", {"num_slots": slots, "group": group}, counted.metric_pool(one_layer(h), slots)
    heads = 4 if tiny else 256
    pooled = min(tokens, 16384)
    fields = {"kind": "blocks", "num_pools": batch, "num_heads": heads, "tokens": pooled}
    whole = counted.select(one_layer(h), batch * heads * pooled)  # KV-Compress's sort, as it describes that itself
    yield "select_budgets", fields, replace(whole, num_launches=4, variant="blocks")


def engine_points(
    dtype: str, tokens: Sequence[int] = ENGINE_TOKENS, batches: Sequence[int] = ENGINE_BATCHES, h: Heads = MPT_7B
) -> Iterator[Point]:  # fmt: skip
    """What Hugging Face's eager decoding does to a contiguous cache, as kvsim/engines/huggingface.py describes it."""
    element_bytes, torch_dtype = kv_bytes_per_element(dtype), "float32" if dtype == "fp32" else "bfloat16"
    rotated = one_layer(h, element_bytes)._replace(rotation_passes=HuggingFace.rotation_passes)
    for batch, count in product(batches, tokens):
        half = batch * count * h.kv_heads * h.head_dim * element_bytes
        shape: Fields = {"batch": batch, "kv_tokens": count, "kv_heads": h.kv_heads, "head_dim": h.head_dim}
        scores = batch * count * h.q_heads * 4
        for kernel, op, extra in (
            ("cat_innermost", PolicyKernel("cat_innermost", 2 * half, 0.0, 1, "engine"), {"contiguous": 1}),
            ("cat_token", PolicyKernel("cat_token", 2 * half, 0.0, 1, "engine"), {}),
            ("index_select_beams", PolicyKernel("index_select_beams", 2 * half, 0.0, 1, "engine"), {}),
            ("rotate_chain", counted.rerotate(rotated, batch * count * h.kv_heads), {}),
            ("softmax_chain", PolicyKernel("softmax_chain", 10.0 * scores, 0.0, 5, "engine"), {"q_heads": h.q_heads, "fp32": 1}),
        ):
            yield Point(op, "engine", torch_dtype, (("bench", kernel), ("shape", tuple((shape | extra).items()))), 0.3)
