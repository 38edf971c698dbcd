"""The measured kernels of ../shared/measured as Ops with seconds: what the fit of the datasheet profile reads."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kvsim.hardware import Gpu
from kvsim.ops import Collective, DecodeAttention, Elementwise, Gemm, MixedAttention, Op, PrefillAttention

IMPOSSIBLE = 1.05
"""Rows this much faster than the datasheet's bandwidth (cold rows) or peak (all rows) are mislabelled and left out."""
GEMM_WEIGHTS = {"bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "sq": "int8", "int4_wo": "int4"}
"""Measured dtype → weight_dtype; TensorRT-LLM's "sq" is int8 W8A8. fp8_block (a trap) and int8_wo are not ours."""


class Row(NamedTuple):
    op: Op
    seconds: float
    gpu: str
    engine: str
    bound_s: float  # no GPU of this datasheet can be faster
    fits: bool  # whether it may inform the fit, or is only predicted


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def kernel_rows(folder: Path, gpus: Mapping[str, Gpu]) -> dict[str, list[Row]]:
    """Rows by kind; quantised ones under "gemm.fp8", "decode_attention.fp8" and the like."""
    found: dict[str, list[Row]] = {}
    dropped = 0
    for key, gpu in gpus.items():
        for cells in read_csv(folder / f"kernel_{key}.csv"):
            made = _kernel_op(cells, gpu)
            if made is None:
                continue
            name, op, bound_s, fits = made
            row = Row(op, float(cells["time_us"]) * 1e-6, key, cells["engine"], bound_s, fits)
            if row.seconds * IMPOSSIBLE < bound_s:
                dropped += 1
                continue
            found.setdefault(name, []).append(row)
    print(f"{sum(map(len, found.values()))} rows, {dropped} impossible ones left out")
    return found


def _kernel_op(cells: Mapping[str, str], gpu: Gpu) -> tuple[str, Op, float, bool] | None:
    def number(name: str) -> int:
        return int(float(cells[name]))

    bandwidth, peak = gpu.hbm_bandwidth_bytes_per_s, gpu.peak_flops("bf16")
    if cells["kind"] == "gemm":
        weights = GEMM_WEIGHTS.get(cells["dtype"])
        if weights is None:
            return None
        m, n, k = number("m"), number("n"), number("k")
        bound_s = 2.0 * m * n * k / gpu.peak_flops("bf16" if weights == "int4" else weights)
        return f"gemm.{'16bit' if weights == 'bf16' else weights}", Gemm(m, n, k, weights), bound_s, True
    if cells["kind"] == "decode_attention":
        batch, heads, tokens, dim = (number(c) for c in ("batch", "kv_heads", "context_tokens", "head_dim"))
        form, size = ("fp8", 1) if cells["kv_dtype"] == "fp8" else ("16bit", 2)
        slots, slot_bytes = batch * heads * tokens, 2.0 * dim * size
        kv_bytes = slots * slot_bytes
        stored = "fp8" if size == 1 else "bf16"
        op = DecodeAttention(batch, number("q_heads"), heads, dim, slots, tokens, slot_bytes, stored)
        # buffers were replayed: only these inform the fit, and those where bandwidth hardly counts
        cold = kv_bytes > 2 * gpu.l2_bytes
        return f"decode_attention.{form}", op, kv_bytes / bandwidth * cold, cold or kv_bytes < 0.1 * gpu.l2_bytes
    if cells["kind"] == "prefill_attention" and "fp8" not in (cells["dtype"], cells["kv_dtype"]):
        batch, q_heads, kv_heads = (number(c) for c in ("batch", "q_heads", "kv_heads"))
        if batch > 1 and number("context_tokens"):
            return None
        op_ = PrefillAttention(
            number("new_tokens"), number("context_tokens"), q_heads, kv_heads, number("head_dim"), "bf16", batch
        )
        return "prefill_attention", op_, op_.flops / peak, True
    if cells["kind"] == "mixed_attention":
        q_heads, kv_heads, dim, decodes, tokens = (
            number(c) for c in ("q_heads", "kv_heads", "head_dim", "n_decode", "decode_context_tokens")
        )
        prefill = PrefillAttention(number("new_tokens"), number("context_tokens"), q_heads, kv_heads, dim, "bf16")
        decode = DecodeAttention(decodes, q_heads, kv_heads, dim, decodes * kv_heads * tokens, tokens, 4.0 * dim)
        return "mixed_attention", MixedAttention(prefill, decode), prefill.flops / peak, True
    if cells["kind"] == "elementwise":
        tokens, hidden, wide = number("num_tokens"), number("hidden"), number("ffn") // number("tp")
        widths = {"add": 3 * hidden, "input_layernorm": 2 * hidden, "mlp_act": 3 * wide, "act_fn": 3 * wide,
                  "layernorm": 2 * hidden, "final_layernorm": 2 * hidden}  # fmt: skip
        if cells["op"] not in widths:  # rope, embedding, sampler: bytes uncertain
            return None
        moved = 2 * tokens * widths[cells["op"]]
        cold = moved > 2 * gpu.l2_bytes
        return "elementwise", Elementwise(cells["op"], moved), 0.0, cold or moved < 0.1 * gpu.l2_bytes
    return None


def collective_rows(folder: Path) -> dict[str, list[Row]]:
    """Switched NVLink in one node ("collective.link"), and 4 GPUs of which pairs are linked: PCIe binds ("…pcie")."""
    found: dict[str, list[Row]] = {"collective.link": [], "collective.pcie": []}
    for cells in read_csv(folder / "allreduce_a100_h100.csv"):
        size, num_gpus, eager = int(float(cells["message_bytes"])), int(cells["n_gpu"]), "eager" in cells["impl"]
        if size > 256 * 2**20:
            continue
        key = "a100" if cells["gpu"].startswith("A100") else "h100"
        if cells["interconnect"] == "pairwise-NVLink" and num_gpus == 4:
            op = Collective("all_reduce", size, num_gpus, eager=True)
            found["collective.pcie"].append(Row(op, float(cells["time_us"]) * 1e-6, key, cells["engine"], 0.0, True))
        elif cells["interconnect"].startswith("NVSwitch") and cells["impl"] != "NCCL":
            op = Collective("all_reduce", size, num_gpus, eager)
            found["collective.link"].append(Row(op, float(cells["time_us"]) * 1e-6, key, cells["engine"], 0.0, True))
    return found
