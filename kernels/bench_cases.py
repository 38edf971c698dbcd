"""What the benchmark times: shapes of each kernel, and the torch calls that do a comparable thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import kvsim.kernels
from kvsim.kernels.quant_inputs import FORMATS

Baseline = Callable[[dict[str, Any]], Any]
LLAMA_8B = {"kv_heads": 8, "group": 4, "head_dim": 128}
"""Grouped-query attention of Llama-3.1-8B (its config.json); KV of 512 B a token and head in bf16."""
DECODE = (
    {"batch": 32, "tokens": 4096, "layout": "paged"},
    {"batch": 32, "tokens": 4096, "layout": "contiguous"},
    {"batch": 64, "tokens": 4096, "layout": "contiguous"},
    {"batch": 1, "tokens": 131072, "layout": "paged"},
    {"batch": 8, "tokens": 32768, "layout": "paged"},
    {"batch": 32, "tokens": 4096, "layout": "paged_per_head", "ragged": True},
    {"batch": 8, "tokens": 4096, "layout": "contiguous", "kv_heads": 32, "group": 1},
    {"batch": 32, "tokens": 4096, "layout": "contiguous", "group": 16},
    {"batch": 32, "tokens": 4096, "layout": "paged", "head_dim": 64},
    {"batch": 32, "tokens": 4096, "layout": "paged", "head_dim": 256, "kv_heads": 4},
)
SCORED = (
    {"statistic": "sum", "batch": 32, "tokens": 4096, "layout": "contiguous"},
    {"statistic": "sum", "batch": 8, "tokens": 4096, "layout": "contiguous", "kv_heads": 32, "group": 1},
    {"statistic": "sum", "batch": 32, "tokens": 4096, "layout": "contiguous", "group": 16},
    {"statistic": "squared_sum", "batch": 32, "tokens": 4096, "layout": "paged_per_head", "ragged": True},
    {"statistic": "threshold_count", "batch": 32, "tokens": 4096, "layout": "paged"},
    {"statistic": "gumbel", "batch": 32, "tokens": 4096, "layout": "contiguous"},
    {"statistic": "gumbel", "batch": 8, "tokens": 4096, "layout": "contiguous", "kv_heads": 32, "group": 1},
)
QUANT = tuple({"format": name, "batch": 64, "tokens": 4096, "layout": "contiguous", "block_size": 32} for name in FORMATS)
ROWS = {"batch": 8, "kv_heads": 8, "tokens": 32768}
SHAPES: dict[str, tuple[dict[str, Any], ...]] = {
    "decode_attention": tuple({**LLAMA_8B, **case} for case in DECODE),
    "decode_attention_scored": tuple({**LLAMA_8B, **case} for case in SCORED),
    "think_decode_attention": tuple(
        {**LLAMA_8B, "batch": 32, "tokens": 4096, "layout": layout} for layout in ("contiguous", "paged")
    ),
    "kv_quant_decode_attention": (
        *({**LLAMA_8B, **case} for case in QUANT),
        {**LLAMA_8B, "format": "int4_group64", "batch": 64, "tokens": 4096, "layout": "paged", "block_size": 32},
    ),
    "prefill_scores": (
        {**LLAMA_8B, "tokens": 8192},
        {**LLAMA_8B, "tokens": 32768, "num_queries": 32, "pooling": "mean"},
        {**LLAMA_8B, "tokens": 32768, "num_queries": 8, "statistic": "square", "pooling": "max"},
        {**LLAMA_8B, "tokens": 4096, "statistic": "gumbel"},
    ),
    "select": tuple(
        {"num_rows": rows, "tokens": 32768, "budget_tokens": 2048, "method": method}
        for rows in (8, 256)
        for method in ("exact", "threshold")
    ),
    "select_budgets": tuple({"kind": kind, "num_heads": 256, "tokens": 8192} for kind in ("blocks", "pooled")),
    "compact": tuple({**ROWS, "kept_frac": kept, "layout": layout} for kept in (0.25, 0.5) for layout in ("contiguous", "paged")),
    "metric_pool": ({"num_slots": 2**24, "group": 4}, {"num_slots": 2**24, "group": 8}),
    "think_scores": ({**ROWS, "group": 4}, {**ROWS, "group": 4, "layout": "paged"}),
    "think_gather": (ROWS, {**ROWS, "layout": "paged"}),
    "kv_quantize": tuple(
        {**ROWS, "element": element, "groups": groups, "group_size": size}
        for element, groups, size in (
            ("int2", "token", 32), ("int4", "token", 32), ("int4", "channel", 32), ("int4", "channel", 64), ("int8", "channel", 128),
            ("fp8", "channel", 128),
        )
    ),
    "rerotate": (ROWS, {**ROWS, "layout": "paged"}),
}  # fmt: skip
SMALL = {"batch": 1, "kv_heads": 2, "tokens": 64, "num_rows": 4, "num_heads": 4, "budget_tokens": 40, "num_slots": 1024}
"""Sizes on a CPU, where the slow references are timed and only the benchmark itself is being checked."""


def cases(kernel: str, small: bool) -> Iterator[Any]:
    """Shapes of a kernel; `small` reduces their sizes, leaving what kind of case each is."""
    module = kvsim.kernels.load(kernel)
    for fields in SHAPES[kernel]:
        shape = module.Shape(**fields)
        if small:
            sizes = {name: min(most, getattr(shape, name)) for name, most in SMALL.items() if hasattr(shape, name)}
            shape = replace(shape, **sizes)
        yield shape


def baseline(kernel: str, shape: Any) -> tuple[str, Baseline] | None:
    """A torch call on the same inputs that moves what the kernel moves, where torch has one."""
    if kernel == "decode_attention" and shape.layout == "contiguous" and not shape.ragged:
        return "torch scaled_dot_product_attention", _sdpa
    if kernel == "select":
        return "torch topk", lambda inputs: inputs["scores"].topk(min(inputs["budgets"], inputs["scores"].shape[1]), dim=1)
    if kernel == "compact" and shape.layout == "contiguous" and not shape.ragged:
        return "torch index_select", _index_select
    return None


def _sdpa(inputs: dict[str, Any]) -> torch.Tensor:
    q = inputs["q"].unsqueeze(2)
    return torch.nn.functional.scaled_dot_product_attention(q, inputs["k"], inputs["v"], enable_gqa=True)


def _index_select(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Rows of all heads in one index_select each of K and V; the indices are made in the call, as an engine would."""
    k, kept = inputs["k"], inputs["kept"]
    heads = torch.arange(kept.shape[0] * kept.shape[1], device=k.device, dtype=kept.dtype)
    rows = (kept.flatten(0, 1) + heads[:, None] * k.shape[2]).flatten()
    return [cache.view(-1, cache.shape[3]).index_select(0, rows) for cache in (k, inputs["v"])]
