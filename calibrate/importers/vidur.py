"""Vidur's profiling CSVs (MIT, Microsoft): ``mlp.csv``, ``attention.csv`` and ``all_reduce.csv``, or folders of them.

Times are milliseconds, of kernels as torch's profiler sees them, in steps of 1 us: no launch is in them. The medians are taken.
Sizes in a row are the whole model's; the tensor-parallel degree beside them divides heads and widths. Everything is fp16.

All-reduce sizes are bytes per rank: Vidur writes two for each element it sends, and 8 MiB over two A100s take 95 us where NCCL's
own benchmark takes 87 (as elements they would be 16 MiB, for which it takes 128). They ran outside CUDA graphs.

Left out: rotary and token embeddings, whose bytes do not follow from the columns, and all-reduces over several nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from kvsim.calibrate.importers.cells import Cells, LeftOut, csv_rows, positive, whole
from kvsim.calibrate.rows import Import
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.ops import Collective, DecodeAttention, Elementwise, Gemm, Op, PrefillAttention

MILLISECOND = 1e-3
SOURCE = "microsoft/vidur (MIT)"
DTYPE, DTYPE_BYTES = "fp16", 2
ATTENTION = (
    "n_embd", "n_q_head", "n_kv_head", "num_tensor_parallel_workers", "batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill"
)  # fmt: skip
MLP = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp", "num_tokens", "num_tensor_parallel_workers")
ALL_REDUCE = ("time_stats.all_reduce.median", "size", "num_workers", "devices_per_node")



def read(path: Path, gpu: Gpu, engine: str = "vidur", version: str = "2024") -> Import:
    """One CSV, or every CSV of a folder and its folders; `path` must hold one GPU's.

    Raises InputError for a file that cannot be read or is in no layout of Vidur's; in a folder such files are left out, and told.
    """
    files = sorted(path.glob("**/*.csv")) if path.is_dir() else [path]
    found, known = Import(engine, version, SOURCE), 0
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        rows = list(csv_rows("vidur", file, found))
        reader = _layout(set(rows[0][1]) if rows else set())
        if reader is None:
            found.rejected.append(LeftOut(f"{name}:1", "is the header of no mlp.csv, attention.csv or all_reduce.csv"))
            continue
        known += 1
        for number, cells in rows:
            try:
                for layer, op, milliseconds in reader(cells):
                    found.add(op, milliseconds * MILLISECOND, f"{name} {layer}:{number}", gpu)
            except KeyError as error:
                raise InputError("vidur", str(file), f"must have the column {error.args[0]}") from None
            except ValueError as error:
                found.rejected.append(LeftOut(f"{name}:{number}", str(error)))
    if not known:
        columns = "; ".join(", ".join(layout) for layout in (MLP, ATTENTION, ALL_REDUCE))
        raise InputError("vidur", str(path), "must hold an mlp.csv, attention.csv or all_reduce.csv", f"their columns: {columns}")
    return found


Timed = tuple[str, Op, float]
"""(table, Op, milliseconds)."""


def _layout(columns: set[str]) -> Callable[[Cells], Iterator[Timed]] | None:
    for layout, reader in ((ALL_REDUCE, _all_reduce), (ATTENTION, _attention), (MLP, _mlp)):
        if set(layout) <= columns:
            return reader
    return None


def _all_reduce(cells: Cells) -> Iterator[Timed]:
    workers, per_node = whole(cells, "num_workers", least=2), whole(cells, "devices_per_node")
    if workers > per_node:
        raise ValueError(f"goes over {-(-workers // per_node)} nodes: num_workers is {workers}, devices_per_node {per_node}")
    op = Collective("all_reduce", whole(cells, "size"), workers, eager=True)
    yield "all_reduce", op, positive(cells, "time_stats.all_reduce.median")


def _attention(cells: Cells) -> Iterator[Timed]:
    q_heads, kv_heads, hidden, tp = (whole(cells, c) for c in ("n_q_head", "n_kv_head", "n_embd", "num_tensor_parallel_workers"))
    dim, q_heads, kv_heads = hidden // q_heads, _split(q_heads, tp, "n_q_head"), _split(kv_heads, tp, "n_kv_head")
    cached = whole(cells, "kv_cache_size", least=0)
    if cells["is_prefill"] in ("True", "1"):
        new, sequences = whole(cells, "prefill_chunk_size"), whole(cells, "batch_size")
        prefill = PrefillAttention(new, cached, q_heads, kv_heads, dim, DTYPE, sequences)
        yield "prefill", prefill, positive(cells, "time_stats.attn_prefill.median")
    else:
        batch, tokens = whole(cells, "batch_size"), cached + 1  # kv_cache_size is without the new token
        slots = batch * kv_heads * tokens
        decode = DecodeAttention(batch, q_heads, kv_heads, dim, slots, tokens, 2.0 * dim * DTYPE_BYTES, DTYPE)
        yield "decode", decode, positive(cells, "time_stats.attn_decode.median")


def _mlp(cells: Cells) -> Iterator[Timed]:
    q_heads, kv_heads, hidden, wide = (whole(cells, name) for name in MLP[:4])
    tokens, tp, gated = whole(cells, "num_tokens"), whole(cells, "num_tensor_parallel_workers"), cells["use_gated_mlp"] == "True"
    dim = hidden // q_heads
    q_width, kv_width = dim * _split(q_heads, tp, "n_head"), dim * _split(kv_heads, tp, "n_kv_head")
    wide = _split(wide, tp, "n_expanded_embd")
    norm = Elementwise("norm", 2 * DTYPE_BYTES * tokens * hidden)
    ops: dict[str, Op] = {
        "attn_pre_proj": Gemm(tokens, q_width + 2 * kv_width, hidden, DTYPE),
        "attn_post_proj": Gemm(tokens, hidden, q_width, DTYPE),
        "mlp_up_proj": Gemm(tokens, (2 if gated else 1) * wide, hidden, DTYPE),
        "mlp_down_proj": Gemm(tokens, hidden, wide, DTYPE),
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
        "mlp_act": Elementwise("activation", (3 if gated else 2) * DTYPE_BYTES * tokens * wide),
    }
    if cells.get("time_stats.post_attention_layernorm.median"):  # else one norm for both halves, and two additions in one time
        ops["add"] = Elementwise("add", 3 * DTYPE_BYTES * tokens * hidden)
    for layer, op in ops.items():
        if cells.get(f"time_stats.{layer}.median"):
            yield layer, op, positive(cells, f"time_stats.{layer}.median")


def _split(count: int, tp: int, name: str) -> int:
    if count % tp:
        raise ValueError(f"{name} is {count}, which num_tensor_parallel_workers {tp} must divide")
    return count // tp
