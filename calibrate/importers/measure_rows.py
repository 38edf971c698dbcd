"""Rows that ``python -m kvsim.calibrate.measure`` wrote, as Ops: GEMM, attention, and copies as the element-wise Op of their bytes.

Graph rows stand for what a captured graph replays; where a shape was measured eagerly only, that row is taken. Rows that were not
measured cold, were skipped or failed, and benchmarks that no table of a profile holds (links, launches, chains of kernels) are
left out with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvsim.calibrate.importers.cells import Cells, LeftOut, positive, whole
from kvsim.calibrate.rows import Import
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.ops import DecodeAttention, Elementwise, Gemm, Op, PrefillAttention

DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
MODES = ("graph", "eager")
"""In order of preference; the others time the host."""
SCHEMA_VERSION = 1
FILE_NAME = "measure.json"


def read(path: Path, gpu: Gpu, engine: str = "torch", version: str = "") -> Import:
    """The file measure.json, or the folder that holds it. version: by default that of torch, as the file states it.

    Raises InputError for a file that measure did not write, or wrote on a CPU.
    """
    file = path / FILE_NAME if path.is_dir() else path
    header, rows = _content(file)
    if header["device_type"] != "cuda":
        raise InputError("measure", str(file), f"must have been measured on a GPU; its device is {header['device_name']}")
    found = Import(engine, version or _torch_version(file, header), f"kvsim.calibrate.measure on {header['device_name']}")
    timed: list[tuple[int, int, Op, float, str]] = []
    for number, row in enumerate(rows):
        try:
            op, seconds, order = _timed(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            found.rejected.append(LeftOut(f"{file.name}:{number}", reason))
        else:
            timed.append((order, number, op, seconds, f"{file.name} {row['op']} {row['dtype']}"))
    taken: set[Op] = set()
    for _, number, op, seconds, table in sorted(timed, key=lambda entry: entry[:2]):
        if op in taken:
            found.rejected.append(LeftOut(f"{file.name}:{number}", "is eager where a graph of the same shape was measured"))
        else:
            taken.add(op)
            found.add(op, seconds, f"{table}:{number}", gpu)
    return found


def _content(file: Path) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        header, rows = content["header"], content["rows"]
        if header["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {header['schema_version']}, not {SCHEMA_VERSION}")
        if not isinstance(rows, list) or not {"device_type", "device_name", "sessions"} <= header.keys():
            raise ValueError("the header lacks the device, or rows are no list")
    except OSError as error:
        raise InputError("measure", str(file), f"must be a file that can be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError("measure", str(file), f"must be a file that kvsim.calibrate.measure wrote ({what})") from error
    return header, rows


def _torch_version(file: Path, header: Mapping[str, Any]) -> str:
    versions = sorted({str(session.get("torch", "")) for session in header["sessions"] if isinstance(session, dict)} - {""})
    if len(versions) != 1:
        what = f"of several ({', '.join(versions)})" if versions else "which its sessions do not state"
        raise InputError("--engine", None, f"must name a version for {file}, {what}", "try --engine torch==2.6")
    return versions[0].partition("+")[0]


def _timed(row: Mapping[str, Any]) -> tuple[Op, float, int]:
    """(Op, seconds, rank of its mode); ValueError says why a row is left out."""
    if row["status"] != "ok":
        raise ValueError(f"is {row['status']}")
    if row["op"] not in _MAKERS:
        raise ValueError(f"is {row['op']}, of which profiles hold no table")
    if row["mode"] not in MODES:
        raise ValueError(f"is mode {row['mode']}, the host's time")
    if not row["cold"]:
        raise ValueError("was measured with a warm cache (cold is false)")
    if row["op"] != "copy" and row["dtype"] not in DTYPES:
        raise ValueError(f"is {row['dtype']}, which no table holds")
    cells = {name: str(value) for name, value in row.items()}
    return _MAKERS[row["op"]](cells), positive(cells, "p50_us") * 1e-6, MODES.index(row["mode"])


def _gemm(cells: Cells) -> Op:
    return Gemm(whole(cells, "m"), whole(cells, "n"), whole(cells, "k"), DTYPES[cells["dtype"]])


def _prefill(cells: Cells) -> Op:
    new, q_heads, kv_heads, dim, batch = (whole(cells, name) for name in ("new_tokens", "q_heads", "kv_heads", "head_dim", "batch"))
    return PrefillAttention(new, 0, q_heads, kv_heads, dim, DTYPES[cells["dtype"]], batch)


def _decode(cells: Cells) -> Op:
    batch, q_heads, kv_heads, dim, tokens = (
        whole(cells, name) for name in ("batch", "q_heads", "kv_heads", "head_dim", "kv_tokens")
    )
    slots = batch * kv_heads * tokens
    return DecodeAttention(batch, q_heads, kv_heads, dim, slots, tokens, 4.0 * dim, DTYPES[cells["dtype"]], "contiguous")


_MAKERS: dict[str, Callable[[Cells], Op]] = {
    "gemm": _gemm,
    "sdpa_prefill": _prefill,
    "sdpa_decode": _decode,
    "copy": lambda cells: Elementwise("copy", 2 * whole(cells, "num_bytes")),  # read and written once each
}
