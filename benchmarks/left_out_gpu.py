"""How wrong kvsim is on a GPU that nobody measured: every measured one in turn, predicted from the others' shipped profiles.

    python benchmarks/left_out_gpu.py [--engine vllm] [--root AICONFIGURATOR] [--measured ../shared/measured]

What is left of the GPU is its datasheet. Rows: the package's tables, and for the RTX 4090 the CSV of ../shared/measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measured_rows import kernel_rows

from kvsim.calibrate.importers import aiconfigurator
from kvsim.calibrate.rows import MeasuredRow
from kvsim.datasheet import DatasheetProfile
from kvsim.hardware import Gpu, load_gpu
from kvsim.ops import DecodeAttention, Gemm, PrefillAttention
from kvsim.profile import Profile
from kvsim.profile_file import shipped
from kvsim.profiles import engine_of, neighbours

ROOT = Path(__file__).resolve().parents[1]
BAR = 0.15
MOST_ROWS = 2000
KINDS = {"decode_attention": DecodeAttention, "gemm": Gemm, "prefill_attention": PrefillAttention}


def rows_of(gpu: Gpu, engine: str, root: Path | None, measured: Path) -> list[MeasuredRow]:
    """16-bit rows of one engine on one GPU."""
    if gpu.name in aiconfigurator.SYSTEMS:
        rows = aiconfigurator.read(gpu, engine, root=root).rows
    else:
        key = "rtx4090"
        found = kernel_rows(measured, {key: gpu})
        rows = [MeasuredRow(row.op, row.seconds, "") for some in found.values() for row in some]
    return [row for row in rows if getattr(row.op, "weight_dtype", getattr(row.op, "kv_format", "bf16")) == "bf16"]


def errors(profile: Profile, rows: Sequence[MeasuredRow]) -> np.ndarray:
    """|predicted - measured| / measured."""
    return np.array([abs(profile.answer(row.op).seconds / row.seconds - 1.0) for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--root", type=Path, help="unpacked aiconfigurator-core; default: the installed package")
    parser.add_argument("--measured", type=Path, default=ROOT.parent / "shared" / "measured")
    options = parser.parse_args()
    there = [path for path in shipped().values() if engine_of(path) == options.engine]
    missed = 0
    for name in sorted({path.parent.name for path in there}):
        gpu = load_gpu(name)
        if name not in aiconfigurator.SYSTEMS and not options.measured.exists():
            print(f"{name}: left out, {options.measured} is absent", file=sys.stderr)
            continue
        carried = neighbours(gpu, options.engine, [path for path in there if path.parent.name != name])
        assert carried is not None
        rows = rows_of(gpu, options.engine, options.root, options.measured)
        for kind, op_type in KINDS.items():
            chosen = [row for row in rows if isinstance(row.op, op_type)]
            chosen = chosen[:: max(1, len(chosen) // MOST_ROWS)]
            median = float(np.median(errors(carried, chosen)))
            datasheet = float(np.median(errors(DatasheetProfile(gpu), chosen)))
            verdict = "" if kind == "prefill_attention" else "met" if median <= BAR else "MISSED"
            missed += verdict == "MISSED"
            print(f"{name:<26} {kind:<18} median error {median:6.1%}   datasheet profile {datasheet:6.1%}   {verdict}", flush=True)
    print(f"bar {BAR:.0%} for decode attention and GEMM: {missed} missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
