"""Vidur's profiling CSVs (MIT, Microsoft): ``mlp.csv`` of single layers by tensor-parallel degree, and ``all_reduce.csv``.

Times are milliseconds; the medians are taken. Layers belong to a model whose sizes stand in every row. All-reduce sizes are bytes
per rank: as bytes a 2-GPU A100 all-reduce of 15.6 MB takes 134 us, 117 GB/s of the 300 GB/s link; as elements it would be 233.
Rotary embedding and token embedding are left out: what they move does not follow from the columns.
"""

from __future__ import annotations

import csv
from pathlib import Path

from kvsim.calibrate.rows import Import, Rejected
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.ops import Collective, Elementwise, Gemm, Op

MILLISECOND = 1e-3
SOURCE = "Vidur (MIT, Microsoft)"
SIZES = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp", "num_tokens", "num_tensor_parallel_workers")
LAYERS = (
    "attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj", "input_layernorm", "post_attention_layernorm", "mlp_act",
    "add",
)  # fmt: skip


def read(path: Path, gpu: Gpu, engine: str = "vidur", version: str = "2024") -> Import:
    """One CSV, or every CSV of a folder. Raises InputError where there is none in one of the two layouts."""
    files = sorted(path.glob("**/*.csv")) if path.is_dir() else [path]
    found = Import(engine, version, SOURCE)
    for file in files:
        try:
            with file.open(encoding="utf-8", newline="") as text:
                table = list(csv.DictReader(text))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("vidur", str(file), f"must be a CSV that can be read ({error})") from error
        columns = set(table[0]) if table else set()
        if {"time_stats.all_reduce.median", "size", "num_workers"} <= columns:
            reader = _all_reduce
        elif set(SIZES) <= columns:
            reader = _layers
        else:
            absent = ", ".join(sorted(set(SIZES) - columns))
            raise InputError("vidur", str(file), f"must be an mlp.csv or all_reduce.csv of Vidur; it lacks {absent}")
        for number, cells in enumerate(table, 2):
            try:
                for op, milliseconds in reader(cells):
                    found.add(op, milliseconds * MILLISECOND, f"{file.name} {op.kind}:{number}", gpu)
            except (ValueError, KeyError) as error:
                found.rejected.append(Rejected(f"{file.name}:{number}", f"holds a number that is none ({error})"))
    if not files:
        raise InputError("vidur", str(path), "must hold CSV files")
    return found


def _all_reduce(cells: dict[str, str]) -> list[tuple[Op, float]]:
    if int(cells["num_workers"]) > int(cells["devices_per_node"]):  # over the network between nodes
        return []
    op = Collective("all_reduce", int(cells["size"]), int(cells["num_workers"]), eager=True)
    return [(op, float(cells["time_stats.all_reduce.median"]))]


def _layers(cells: dict[str, str]) -> list[tuple[Op, float]]:
    heads, kv_heads, hidden, ffn = (int(float(cells[name])) for name in SIZES[:4])
    gated, tokens, tp = cells["use_gated_mlp"] == "True", int(cells["num_tokens"]), int(cells["num_tensor_parallel_workers"])
    head_dim = hidden // heads
    ops: dict[str, Op] = {
        "attn_pre_proj": Gemm(tokens, (heads + 2 * kv_heads) * head_dim // tp, hidden, "fp16"),
        "attn_post_proj": Gemm(tokens, hidden, hidden // tp, "fp16"),
        "mlp_up_proj": Gemm(tokens, (2 if gated else 1) * ffn // tp, hidden, "fp16"),
        "mlp_down_proj": Gemm(tokens, hidden, ffn // tp, "fp16"),
        "input_layernorm": Elementwise("norm", 4 * tokens * hidden),
        "post_attention_layernorm": Elementwise("norm", 4 * tokens * hidden),
        "mlp_act": Elementwise("activation", 2 * (3 if gated else 2) * tokens * ffn // tp),
        "add": Elementwise("add", 6 * tokens * hidden),
    }
    measured = ((name, cells.get(f"time_stats.{name}.median", "")) for name in LAYERS)
    return [(ops[name], float(text)) for name, text in measured if text]
