"""LLMServingSim's profiler (MIT, KAIST): a folder with ``dense.csv``, ``per_sequence.csv`` and ``attention.csv`` of one model and tp.

Times are microseconds of one layer. `attention.csv`: a prompt chunk over cached tokens beside decoding sequences of equal length;
rows without a chunk are decode attention, rows without sequences prefill attention, the others one mixed launch. Weights and
cache are 16 bit.
"""

from __future__ import annotations

from pathlib import Path

from kvsim.calibrate.importers.cells import Cells, LeftOut, csv_rows, positive, whole
from kvsim.calibrate.rows import Import
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
GEMMS = {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
"""Layer there → weight matrix of `kvsim.model.Model.gemms`."""


def read(folder: Path, gpu: Gpu, model: Model, tp: int = 1, engine: str = "vllm", version: str = "0.19.0") -> Import:
    """Every file of the folder that is there. Raises InputError where none is, or where a column is absent."""
    present = [name for name in COLUMNS if (folder / name).is_file()]
    if not present:
        raise InputError("llmservingsim", str(folder), f"must be a folder that holds {', '.join(COLUMNS)}")
    model.check_tp(tp, "--tp")
    found = Import(engine, version, f"{SOURCE}, {model.name}, tp {tp}")
    for name in present:
        for number, cells in csv_rows("llmservingsim", folder / name, found):
            if not set(COLUMNS[name]) <= cells.keys():
                columns = ", ".join(COLUMNS[name])
                raise InputError("llmservingsim", str(folder / name), f"must have the columns {columns}; it has {', '.join(cells)}")
            try:
                op = _attention(cells, model, tp) if name == "attention.csv" else _layer(cells, model, tp)
                found.add(op, positive(cells, "time_us") * MICROSECOND, f"{name} {cells.get('layer', op.kind)}:{number}", gpu)
            except ValueError as error:
                found.rejected.append(LeftOut(f"{name}:{number}", str(error)))
    return found


def _layer(cells: Cells, model: Model, tp: int) -> Op:
    layer, hidden, wide = cells["layer"], model.hidden_size, -(-model.intermediate_size // tp)
    rows = whole(cells, "tokens" if "tokens" in cells else "sequences")
    if layer == "lm_head":
        head = model.lm_head(tp)
        return Gemm(rows, head.n, head.k, "bf16")
    for gemm in model.gemms(tp):
        if gemm.name == GEMMS.get(layer):
            return Gemm(rows, gemm.n, gemm.k, "bf16")
    widths = {"layernorm": 2 * hidden, "final_layernorm": 2 * hidden, "act_fn": (3 if model.gated_mlp else 2) * wide}
    if layer not in widths:
        raise ValueError(f"layer is {layer or 'empty'}: what it moves is not told by the model's shape")
    return Elementwise(layer, 2 * rows * widths[layer])


def _attention(cells: Cells, model: Model, tp: int) -> Op:
    chunk, prior, sequences, cached = (whole(cells, name, least=0) for name in COLUMNS["attention.csv"][:4])
    q_heads, kv_heads, dim = model.q_heads_per_gpu(tp), model.kv_heads_per_gpu(tp), model.head_dim
    if sequences and not cached:
        raise ValueError("kv_decode is 0, which must be at least 1 where n_decode is above 0")
    prefill = PrefillAttention(chunk, prior, q_heads, kv_heads, dim, "bf16")
    decode = DecodeAttention(sequences, q_heads, kv_heads, dim, sequences * kv_heads * cached, cached, 4.0 * dim)
    if chunk and sequences:
        return MixedAttention(prefill, decode)
    if not chunk and not sequences:
        raise ValueError("has neither a chunk nor sequences")
    return prefill if chunk else decode
