"""The Ops of any engine: copies, GEMM, attention, launches. One entry of `OPS` per Op."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from kvsim.calibrate.bench import EAGER, GRAPH, GRAPH_ISSUE, ISSUE, Bench, Inputs, Maker, Shape, grid, no_flops
from kvsim.units import KIB, MIB

# (n, k) of one layer's weights and the output head: rows = output features, from each model's config.json.
LLAMA_3_1_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))  # qkv o gate_up down lm_head
LLAMA_2_7B = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096))
WEIGHTS_NK = tuple(dict.fromkeys(LLAMA_3_1_8B + LLAMA_2_7B))
GEMM_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
HEADS = ((32, 8), (32, 32))  # (q_heads, kv_heads) of Llama-3.1-8B and Llama-2-7B
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
DECODE_KV_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DECODE_MAX_TOKENS = 2**20
"""Largest batch x KV length in the plan: 4 GiB of KV in 16 bits for 8 KV heads."""


def heads(q_heads: int, kv_heads: int) -> Shape:
    return {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": 128}


GEMM_SHAPES = tuple({"m": m, "n": n, "k": k} for (n, k), m in product(WEIGHTS_NK, GEMM_M))
PREFILL_SHAPES = tuple(
    {"batch": 1, "new_tokens": s} | heads(*pair)
    for s, pair in product((128, 256, 512, 1024, 2048, 4096, 8192, 16384), HEADS)
)
DECODE_SHAPES = tuple(
    {"batch": b, "kv_tokens": s} | heads(*pair)
    for b, s, pair in product(DECODE_BATCHES, DECODE_KV_TOKENS, HEADS)
    if b * s <= DECODE_MAX_TOKENS
)


# --- inputs -----------------------------------------------------------------------------------------------------------
def copy_inputs(shape: Shape, make: Maker) -> Inputs:
    source = make.random_bytes(shape["num_bytes"])
    return source, torch.empty_like(source)


def to_device_inputs(shape: Shape, make: Maker) -> Inputs:
    source = make.random_bytes(shape["num_bytes"])
    on_host = source.cpu()
    return (on_host.pin_memory() if shape["pinned"] else on_host), source


def to_host_inputs(shape: Shape, make: Maker) -> Inputs:
    on_host, on_device = to_device_inputs(shape, make)
    return on_device, on_host


def gemm_inputs(shape: Shape, make: Maker) -> Inputs:
    return make.normal(shape["m"], shape["k"]), make.normal(shape["n"], shape["k"])


def sdpa_inputs(shape: Shape, make: Maker) -> Inputs:
    b, d = shape["batch"], shape["head_dim"]
    causal = "new_tokens" in shape
    kv_tokens = shape["new_tokens"] if causal else shape["kv_tokens"]
    q = make.normal(b, shape["q_heads"], kv_tokens if causal else 1, d)
    return q, make.normal(b, shape["kv_heads"], kv_tokens, d), make.normal(b, shape["kv_heads"], kv_tokens, d), causal


def one_vector(shape: Shape, make: Maker) -> Inputs:
    return make.normal(shape.get("elements", 1)), shape.get("nodes", 1)


# --- what runs --------------------------------------------------------------------------------------------------------
def copy(inputs: Inputs) -> Any:
    source, target = inputs
    return target.copy_(source, non_blocking=True)


def gemm(inputs: Inputs) -> Any:
    return F.linear(*inputs)


def sdpa(inputs: Inputs) -> Any:
    """Grouped heads only where torch has `enable_gqa` (2.5); without it the call raises and the row says so."""
    q, k, v, causal = inputs
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def tiny_kernels(inputs: Inputs) -> Any:
    vector, nodes = inputs
    for _ in range(nodes):
        vector.add_(1.0)
    return vector


# --- bytes and FLOPs --------------------------------------------------------------------------------------------------
def gemm_bytes(s: Shape, e: int) -> int:
    return e * (s["m"] * s["k"] + s["n"] * s["k"] + s["m"] * s["n"])


def sdpa_bytes(s: Shape, e: int) -> int:
    """q and output, K and V: each once."""
    q_tokens = s.get("new_tokens", 1)
    kv_tokens = s.get("new_tokens", s.get("kv_tokens", 0))
    return e * s["batch"] * s["head_dim"] * 2 * (s["q_heads"] * q_tokens + s["kv_heads"] * kv_tokens)


def prefill_flops(s: Shape) -> int:
    """Two products over the causal half, diagonal included: n(n+1)/2 pairs, 2·head_dim FLOPs each."""
    pairs = s["new_tokens"] * (s["new_tokens"] + 1) // 2
    return 4 * s["batch"] * s["q_heads"] * s["head_dim"] * pairs


def decode_flops(s: Shape) -> int:
    return 4 * s["batch"] * s["q_heads"] * s["head_dim"] * s["kv_tokens"]


def vector_bytes(s: Shape, e: int) -> int:
    return 2 * e * s.get("elements", 1) * s.get("nodes", 1)


COPY_BYTES = tuple(MIB * 2**i for i in range(11))
LINK_BYTES = (64 * KIB, 256 * KIB, *(MIB * 4**i for i in range(6)))
NEEDS_LINK = "host-device copies need a CUDA device"
TINY_HEADS = {"q_heads": 4, "kv_heads": 2, "head_dim": 32}

OPS = (
    Bench(
        "copy", grid(num_bytes=COPY_BYTES), grid(num_bytes=(MIB, 4 * MIB)), copy_inputs, copy,
        bytes_moved=lambda s, e: 2 * s["num_bytes"], flops=no_flops, own_dtype="uint8",
    ),
    Bench(
        "copy_h2d", grid(num_bytes=LINK_BYTES, pinned=(1, 0)), grid(num_bytes=(MIB,), pinned=(1,)),
        to_device_inputs, copy, bytes_moved=lambda s, e: s["num_bytes"], flops=no_flops,
        modes=(EAGER,), own_dtype="uint8", needs=NEEDS_LINK,
    ),
    Bench(
        "copy_d2h", grid(num_bytes=LINK_BYTES, pinned=(1, 0)), grid(num_bytes=(MIB,), pinned=(1,)),
        to_host_inputs, copy, bytes_moved=lambda s, e: s["num_bytes"], flops=no_flops,
        modes=(EAGER,), own_dtype="uint8", needs=NEEDS_LINK,
    ),
    Bench(
        "gemm", GEMM_SHAPES, grid(m=(1, 16), n=(512,), k=(256,)), gemm_inputs, gemm,
        bytes_moved=gemm_bytes, flops=lambda s: 2 * s["m"] * s["n"] * s["k"],
    ),
    Bench(
        "sdpa_prefill", PREFILL_SHAPES, ({"batch": 1, "new_tokens": 128} | TINY_HEADS,), sdpa_inputs, sdpa,
        bytes_moved=sdpa_bytes, flops=prefill_flops,
    ),
    Bench(
        "sdpa_decode", DECODE_SHAPES, ({"batch": 2, "kv_tokens": 256} | TINY_HEADS,), sdpa_inputs, sdpa,
        bytes_moved=sdpa_bytes, flops=decode_flops,
    ),
    Bench(
        "launch", grid(elements=(1, 4096)), grid(elements=(1,)), one_vector, tiny_kernels,
        bytes_moved=vector_bytes, flops=lambda s: s["elements"],
        modes=(EAGER, GRAPH, ISSUE), cold=False, own_dtype="float32",
    ),
    Bench(
        "graph_replay", grid(nodes=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)), grid(nodes=(8,)), one_vector,
        tiny_kernels, bytes_moved=vector_bytes, flops=lambda s: s["nodes"], modes=(GRAPH, GRAPH_ISSUE), cold=False,
        own_dtype="float32", needs="CUDA graphs need a CUDA device", replays=True,
    ),
)
