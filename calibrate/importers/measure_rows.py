"""Rows that ``python -m kvsim.calibrate.measure`` wrote, as Ops: GEMM, attention, and copies as the element-wise Op of their bytes.

Graph rows stand for what a captured graph replays; where a row was measured eagerly only, that one is taken. Rows that were not
measured cold, were skipped or failed are left out with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvsim.calibrate.rows import Import, Rejected
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.ops import DecodeAttention, Elementwise, Gemm, Op, PrefillAttention

DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
MODES = ("graph", "eager")
SCHEMA_VERSION = 1


def read(path: Path, gpu: Gpu, engine: str = "torch", version: str = "") -> Import:
    """The file measure.json, or the folder that holds it."""
    file = path / "measure.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        header, rows = content["header"], content["rows"]
        if header["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {header['schema_version']}, not {SCHEMA_VERSION}")
    except OSError as error:
        raise InputError("measure", str(file), f"must be a file that can be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("measure", str(file), f"must be a file that kvsim.calibrate.measure wrote ({error})") from error
    found = Import(engine, version or "measured", f"kvsim.calibrate.measure on {header.get('device_name', 'a device')}")
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for number, row in enumerate(rows):
        where = f"{file.name} {row.get('op')} {row.get('dtype')}:{number}"
        if row.get("status") != "ok":
            found.rejected.append(Rejected(where, str(row.get("status"))))
        elif not row.get("cold", True):
            found.rejected.append(Rejected(where, "was measured with warm caches"))
        elif row.get("mode") in MODES and (op := _op(row)) is not None:
            key = (row["op"], row["dtype"], repr(op))
            before = best.get(key)
            if before is None or MODES.index(row["mode"]) < MODES.index(before["row"]["mode"]):
                best[key] = {"row": row, "op": op, "where": where}
    for chosen in best.values():
        found.add(chosen["op"], float(chosen["row"]["p50_us"]) * 1e-6, chosen["where"], gpu)
    return found


def _op(row: dict[str, Any]) -> Op | None:
    if row["op"] == "copy":
        return Elementwise("copy", 2 * row["num_bytes"])
    dtype = DTYPES.get(row["dtype"])
    if dtype is None:
        return None
    if row["op"] == "gemm":
        return Gemm(row["m"], row["n"], row["k"], dtype)
    if row["op"] == "sdpa_prefill":
        return PrefillAttention(
            row["new_tokens"], 0, row["q_heads"], row["kv_heads"], row["head_dim"], dtype, row["batch"]
        )
    if row["op"] == "sdpa_decode":
        batch, heads, dim, tokens = (row[name] for name in ("batch", "kv_heads", "head_dim", "kv_tokens"))
        return DecodeAttention(
            batch, row["q_heads"], heads, dim, batch * heads * tokens, tokens, 4.0 * dim, dtype, "contiguous"
        )
    return None
