"""LLMServingSim's profiler (MIT, KAIST): a folder with ``dense.csv``, ``per_sequence.csv`` and ``attention.csv`` of one model and tp.

Times are microseconds of one layer. `attention.csv`: a prompt chunk over cached tokens beside decoding sequences of equal length;
rows without a chunk are decode attention, rows without sequences prefill attention, the others one mixed launch.
"""

from __future__ import annotations

import csv
from pathlib import Path

from kvsim.calibrate.rows import Import, Rejected
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.model import Model
from kvsim.ops import DecodeAttention, Elementwise, Gemm, MixedAttention, Op, PrefillAttention

MICROSECOND = 1e-6
SOURCE = "LLMServingSim (MIT, casys-kaist)"
COLUMNS = {
    "dense.csv": ("layer", "tokens", "time_us"),
    "per_sequence.csv": ("layer", "sequences", "time_us"),
    "attention.csv": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
}


def read(folder: Path, gpu: Gpu, model: Model, tp: int = 1, engine: str = "vllm", version: str = "0.19.0") -> Import:
    """Every file of the folder that is there. Raises InputError where none is, or where a column is absent."""
    present = [name for name in COLUMNS if (folder / name).is_file()]
    if not present:
        raise InputError("llmservingsim", str(folder), f"must hold {', '.join(COLUMNS)}")
    model.check_tp(tp, "--tp")
    found = Import(engine, version, SOURCE)
    for name in present:
        with (folder / name).open(encoding="utf-8", newline="") as text:
            table = list(csv.DictReader(text))
        absent = [column for column in COLUMNS[name] if not table or column not in table[0]]
        if absent:
            raise InputError("llmservingsim", str(folder / name), f"must have the columns {', '.join(COLUMNS[name])}")
        for number, cells in enumerate(table, 2):
            where = f"{name} {cells.get('layer', '')}:{number}"
            try:
                op = _attention(cells, model, tp) if name == "attention.csv" else _layer(cells, model, tp)
                if op is not None:
                    found.add(op, float(cells["time_us"]) * MICROSECOND, where, gpu)
            except ValueError as error:
                found.rejected.append(Rejected(where, f"holds a number that is none ({error})"))
    return found


def _layer(cells: dict[str, str], model: Model, tp: int) -> Op | None:
    layer, hidden, wide = cells["layer"], model.hidden_size, -(-model.intermediate_size // tp)
    rows = int(cells.get("tokens") or cells["sequences"])
    if layer == "lm_head":
        head = model.lm_head(tp)
        return Gemm(rows, head.n, head.k, "bf16")
    q_width, kv_width = (heads * model.head_dim for heads in (model.q_heads_per_gpu(tp), model.kv_heads_per_gpu(tp)))
    shapes = {
        "qkv_proj": (q_width + 2 * kv_width, hidden), "o_proj": (hidden, q_width),
        "gate_up_proj": ((2 if model.gated_mlp else 1) * wide, hidden), "down_proj": (hidden, wide),
    }  # fmt: skip
    if layer in shapes:
        n, k = shapes[layer]
        return Gemm(rows, n, k, "bf16")
    moved = {"layernorm": 2 * hidden, "final_layernorm": 2 * hidden, "act_fn": 3 * wide}.get(layer)
    return None if moved is None else Elementwise(layer, 2 * rows * moved)  # rotary embedding, sampler: bytes uncertain


def _attention(cells: dict[str, str], model: Model, tp: int) -> Op | None:
    chunk, prior, sequences, tokens = (int(float(cells[name])) for name in COLUMNS["attention.csv"][:4])
    q_heads, kv_heads, dim = model.q_heads_per_gpu(tp), model.kv_heads_per_gpu(tp), model.head_dim
    prefill = PrefillAttention(chunk, prior, q_heads, kv_heads, dim, "bf16") if chunk else None
    decode = None
    if sequences:
        decode = DecodeAttention(sequences, q_heads, kv_heads, dim, sequences * kv_heads * tokens, tokens, 4.0 * dim)
    if prefill is not None and decode is not None:
        return MixedAttention(prefill, decode)
    return prefill or decode
