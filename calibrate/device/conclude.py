"""From rows to what the user keeps: device.yaml, profile.json with errors on points it had not seen, kernels.json, report.md."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsim.calibrate.build import build, write_profile
from kvsim.calibrate.device.device_file import write_device
from kvsim.calibrate.device.op_json import op_from_json
from kvsim.calibrate.device.points import SKEW
from kvsim.calibrate.device.rows_file import OK, Row, RowFile
from kvsim.calibrate.device.session import measured_rows
from kvsim.calibrate.rows import Import
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.measured import MeasuredProfile
from kvsim.ops import DecodeAttention
from kvsim.profile_file import ProfileFile

PROFILE_FILE, KERNELS_FILE = "profile.json", "kernels.json"
KERNELS_SCHEMA = 1
"""That of `kvsim.kernels.bench`, whose layout the file has."""
SKEW_EDGES = (1.5, 3.0, 6.0)
"""Of longest over mean length: classes of the report."""


@dataclass(frozen=True)
class SkewError:
    """How wrong the rule for unlike lengths is, within a range of longest / mean. bias: mean of predicted / measured - 1."""

    name: str
    num_rows: int
    mape: float
    bias: float


@dataclass(frozen=True)
class Conclusion:
    """What came of a calibration."""

    gpu: Gpu
    profile: ProfileFile
    file: RowFile
    rejected: list[str]
    skew: list[SkewError]


def conclude(folder: Path, command: str, gpu_name: str | None = None) -> Conclusion:
    """Fits the folder's rows and writes device.yaml, profile.json and kernels.json. Raises InputError where rows do not suffice."""
    file = RowFile(folder)
    rows = measured_rows(file)
    gpu = write_device(folder, file.header, rows, gpu_name)
    name = file.header["device_name"]
    found = Import("torch", str(file.header["torch"]).partition("+")[0], f"kvsim calibrate device on {name}")
    for op, seconds, where in rows:
        found.add(op, seconds, where, gpu)
    if len(found.rows) < 2:
        raise InputError("--out", str(folder), f"must hold at least two measured rows, has {len(found.rows)}", "give it more time")
    profile, _, suspect = build(gpu, found, command, sparse=True)
    rejected = [f"{row.where} {row.reason}" for row in found.rejected] + [f"table left out: {text}" for text in suspect]
    if not profile.tables:
        raise InputError("--out", str(folder), "must hold at least two rows of a table", "give it more time")
    write_profile(profile, folder / PROFILE_FILE)
    write_kernels(folder, file)
    return Conclusion(gpu, profile, file, rejected, skew_errors(profile, gpu, file))


def skew_errors(profile: ProfileFile, gpu: Gpu, file: RowFile) -> list[SkewError]:
    """The profile's answers for unlike lengths, none of which it was fitted to, beside their times."""
    answerer = MeasuredProfile(profile, gpu, gpu)
    classes: dict[str, list[float]] = {}
    for row in file.measured(SKEW):
        op = op_from_json(row["op"])
        assert isinstance(op, DecodeAttention)
        ratio = op.max_kv_tokens * op.batch * op.kv_heads / op.kv_slots
        if not any(key[0] == op.kind for key in profile.tables):
            continue
        error = answerer.answer(op).seconds / row["seconds"] - 1.0
        edges = [edge for edge in SKEW_EDGES if ratio > edge]
        name = f"longest / mean > {edges[-1]:g}" if edges else f"longest / mean <= {SKEW_EDGES[0]:g}"
        classes.setdefault(name, []).append(error)
    return [
        SkewError(name, len(errors), sum(map(abs, errors)) / len(errors), sum(errors) / len(errors))
        for name, errors in sorted(classes.items())
    ]


def write_kernels(folder: Path, file: RowFile) -> None:
    """kernels.json: rows of compression kernels in the layout of `kvsim.kernels.bench`, by the bytes that kernels count."""
    header = file.header
    rates = {"copy_gb_per_s": header["copy_bytes_per_s"] / 1e9}
    peaks = header["peak_flops_per_s"]
    rates["matmul_tflop_per_s"] = peaks.get("bf16", max(peaks.values())) / 1e12
    facts = {name: header[name] for name in ("device_name", "torch", "cache_bytes")}
    rows = [_kernel_row(row, rates) for row in file.rows if row["work"] in ("kernel", "kernel_beside")]
    content = {"header": {"schema_version": KERNELS_SCHEMA, **facts, "ceilings": rates}, "rows": rows}
    partial = folder / f"{KERNELS_FILE}.{os.getpid()}.tmp"
    partial.write_text(json.dumps(content, allow_nan=False).replace('}, {"kernel"', '},\n{"kernel"') + "\n", encoding="utf-8")
    os.replace(partial, folder / KERNELS_FILE)


def _kernel_row(row: Row, rates: dict[str, float]) -> dict[str, Any]:
    details = row["details"]
    found = {"kernel": details["kernel"], "variant": details["variant"], "shape": dict(details["shape"]), "status": row["status"]}
    if row["status"] != OK:
        return found
    seconds = row["kernel_s"]
    gb_per_s, tflop_per_s = row["kernel_bytes"] / seconds / 1e9, row["kernel_flops"] / seconds / 1e12
    return found | {
        "mode": row["mode"], "p50_us": seconds * 1e6, "repeats": row["samples"], "bytes_moved": row["kernel_bytes"],
        "flops": row["kernel_flops"], "gb_per_s": gb_per_s, "tflop_per_s": tflop_per_s,
        "of_copy_frac": gb_per_s / rates["copy_gb_per_s"], "of_matmul_frac": tflop_per_s / rates["matmul_tflop_per_s"],
    }  # fmt: skip


