"""How wrong measured profiles are on shapes that their fits have not seen, beside a naive roofline fitted to the same rows.

    python benchmarks/profile_accuracy.py [--gpu NAME ...] [--root AICONFIGURATOR] [--measured ../shared/measured] [--left-out] [--json]

Every table is fitted five times, each time without a fifth of its shapes (whole head configurations, whole weight shapes, message
sizes, (new_tokens, n_decode) pairs), and asked for those. Coverage: bands from the errors of four folds, checked on the fifth.
--left-out: every GPU in turn predicted from the others' shipped profiles by datasheet numbers alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from kvsim.calibrate.build import bias_quantiles, mape_p90, size_classes
from kvsim.calibrate.fit import FOLDS, Table, fit_rows, fold_numbers
from kvsim.calibrate.importers import aiconfigurator, plain_csv
from kvsim.calibrate.rows import Import, MeasuredRow, without_suspect
from kvsim.dtypes import matrix_bytes
from kvsim.errors import InputError
from kvsim.hardware import Gpu, load_gpu
from kvsim.ops import Collective, DecodeAttention, Elementwise, Gemm, MixedAttention, Op, PrefillAttention

ROOT = Path(__file__).resolve().parents[1]
GPUS = {"a100-sxm-80gb": "kernel_a100.csv", "h100-sxm-80gb": "kernel_h100.csv", "rtx-4090-24gb": "kernel_rtx4090.csv"}
BARS = {
    "decode_attention": 0.05, "gemm 16bit": 0.06, "gemm narrow": 0.09, "prefill_attention": 0.06, "collective": 0.10,
    "mixed_attention": 0.12,
}  # fmt: skip
LEAST_SHAPES = 5


@dataclass
class Row:
    """One line of the report; errors are |predicted - measured| / measured on shapes held out."""

    gpu: str
    engine: str
    table: str
    rows: int
    shapes: int
    mape: float
    p90: float
    naive_mape: float
    naive_p90: float
    coverage_68: float
    coverage_95: float
    half_width: float


def imports(gpu: Gpu, measured: Path, root: Path | None) -> Iterable[Import]:
    """Everything measured on a GPU: the package's tables where it is installed, and the other sources' rows of the CSV."""
    try:
        base, _ = aiconfigurator.data_root(root)
        engines = aiconfigurator.versions(base / aiconfigurator.SYSTEMS.get(gpu.name, "none"))
    except InputError as error:
        print(f"{error}; its rows of {measured} are used instead", file=sys.stderr)
        engines = {}
    for engine, versions in engines.items():
        yield aiconfigurator.read(gpu, engine, versions[-1], root)
    path = measured / GPUS[gpu.name]
    if not path.exists():
        print(f"{path} is absent: only the package's tables are checked", file=sys.stderr)
        return
    for text in plain_csv.engines(path):
        if engines and any(text == f"{engine}-{versions[-1]}" for engine, versions in engines.items()):
            continue  # a sample of the package's tables
        name, _, version = text.partition("-")
        yield plain_csv.read(path, gpu, name, version, only_engine=text)


def naive(rows: Sequence[MeasuredRow], gpu: Gpu, fold: np.ndarray) -> np.ndarray:
    """log(measured / predicted) of max(bytes / (a bandwidth), FLOPs / (b peak)), a and b fitted to the other folds."""
    moved, flops = (np.array([cost(row.op, gpu) for row in rows]) for cost in (_bytes_s, _flops_s))
    seconds = np.array([row.seconds for row in rows])
    residuals = np.empty(len(rows))
    for number in set(fold):
        seen, out = fold != number, fold == number
        if not seen.any():
            seen = out

        def loss(x: np.ndarray, seen: np.ndarray = seen) -> float:
            return float(np.abs(np.log(np.maximum(moved[seen] * np.exp(x[0]), flops[seen] * np.exp(x[1])) / seconds[seen])).mean())

        best = minimize(loss, np.array([0.3, 0.3]), method="Nelder-Mead", options={"maxiter": 200}).x
        residuals[out] = np.log(seconds[out] / np.maximum(moved[out] * np.exp(best[0]), flops[out] * np.exp(best[1])))
    return residuals


def _bytes_s(op: Op, gpu: Gpu) -> float:
    if isinstance(op, Gemm):
        return (matrix_bytes(op.n, op.k, op.weight_dtype) + 2.0 * op.m * (op.n + op.k)) / gpu.hbm_bandwidth_bytes_per_s
    if isinstance(op, DecodeAttention | Elementwise):
        return op.bytes_moved / gpu.hbm_bandwidth_bytes_per_s
    if isinstance(op, PrefillAttention):
        tokens = op.num_sequences * op.head_dim * 2.0
        moved = tokens * (2 * op.q_heads * op.new_tokens + 2 * op.kv_heads * (op.new_tokens + op.prior_tokens))
        return moved / gpu.hbm_bandwidth_bytes_per_s
    if isinstance(op, MixedAttention):  # the additive baseline: both parts, one after the other
        return _bytes_s(op.prefill, gpu) + _bytes_s(op.decode, gpu)
    assert isinstance(op, Collective)
    return op.message_bytes / gpu.gpu_link_bytes_per_s + 1e-12


def _flops_s(op: Op, gpu: Gpu) -> float:
    if isinstance(op, Gemm):
        dtype = "bf16" if op.weight_dtype == "int4" else op.weight_dtype
        return 2.0 * op.m * op.n * op.k / gpu.peak_flops(dtype)
    if isinstance(op, DecodeAttention | PrefillAttention):
        return op.flops / gpu.peak_flops("bf16")
    if isinstance(op, MixedAttention):
        return _flops_s(op.prefill, gpu) + _flops_s(op.decode, gpu)
    return 0.0


def judge(gpu: Gpu, engine: str, key: tuple[str, str, int], table: Table) -> Row:
    """A table's errors on held-out shapes, and how often bands made from the other folds held."""
    fold = fold_numbers(table.groups, FOLDS)
    classes = np.array(size_classes(gpu, table.rows))
    inside_68, inside_95, widths = [], [], []
    for number in sorted(set(fold)):
        for name in set(classes):
            seen, out = (fold != number) & (classes == name), (fold == number) & (classes == name)
            if not seen.any() or not out.any():
                continue
            q = bias_quantiles(table.residuals[seen])
            inside_68.append((table.residuals[out] >= q[1]) & (table.residuals[out] <= q[2]))
            inside_95.append((table.residuals[out] >= q[0]) & (table.residuals[out] <= q[3]))
            widths += [(q[2] - q[1]) / 2] * int(out.sum())
    naive_errors = mape_p90(naive(table.rows, gpu, fold))
    nothing = [np.array([float("nan")])]
    return Row(
        gpu.name, engine, " ".join(str(part) for part in key if part), len(table.rows), len(set(table.groups)),
        *mape_p90(table.residuals), *naive_errors, float(np.concatenate(inside_68 or nothing).mean()),
        float(np.concatenate(inside_95 or nothing).mean()), float(np.mean(widths or [float("nan")])),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="append", choices=tuple(GPUS), help="only this one; may be repeated")
    parser.add_argument("--root", type=Path, help="unpacked aiconfigurator-core; default: the installed package")
    parser.add_argument("--measured", type=Path, default=ROOT.parent / "shared" / "measured")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report: list[Row] = []
    for name in options.gpu or GPUS:
        gpu = load_gpu(name)
        for found in imports(gpu, options.measured, options.root):
            rows, suspect = without_suspect(found.rows, found.rejected)
            for text in suspect:
                print(f"left out as suspect: {text}", file=sys.stderr)
            if not rows:
                continue
            for key, table in fit_rows(gpu, rows).tables.items():
                report.append(judge(gpu, f"{found.engine} {found.engine_version}", key, table))
                if not options.json:
                    print(line(report[-1]), flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in report], indent=1))
    else:
        summary(report)
    return 0


def line(row: Row) -> str:
    return (
        f"{row.gpu:<15} {row.engine:<18} {row.table:<34} {row.rows:>6} rows {row.shapes:>4} shapes  "
        f"MAPE {row.mape:6.1%} P90 {row.p90:6.1%}   naive {row.naive_mape:6.1%} {row.naive_p90:6.1%}   "
        f"in 16-84 %: {row.coverage_68:4.0%}  in 2.5-97.5 %: {row.coverage_95:4.0%}  half-width {row.half_width:.1%}"
    )


def summary(report: Sequence[Row]) -> None:
    """Means over engines beside the bars."""
    print("\nMeans over GPUs, engines, dtypes and head sizes:")
    groups: dict[str, list[Row]] = {}
    for row in report:
        kind, _, rest = row.table.partition(" ")
        if kind == "gemm":
            kind = "gemm 16bit" if rest.startswith("16bit") else "gemm narrow"
        groups.setdefault(kind, []).append(row)
    for kind, rows in groups.items():
        mean = float(np.mean([row.mape for row in rows]))
        bar = BARS.get(kind)
        verdict = "" if bar is None else f"   bar {bar:.0%}: {'met' if mean <= bar else 'MISSED'}"
        print(f"  {kind:<20} MAPE {mean:6.1%}   naive {np.mean([row.naive_mape for row in rows]):6.1%}{verdict}")
    weights = np.array([row.rows for row in report if row.shapes >= LEAST_SHAPES], float)
    for label, values in (
        ("rows inside their 16-84 % band (60-76 %)", [row.coverage_68 for row in report if row.shapes >= LEAST_SHAPES]),
        ("rows inside their 2.5-97.5 % band (90-98 %)", [row.coverage_95 for row in report if row.shapes >= LEAST_SHAPES]),
    ):
        print(f"  {label}: {np.average(values, weights=weights):.1%}, by table {min(values):.0%} .. {max(values):.0%}")
    ratio = np.average([row.half_width / row.mape for row in report if row.shapes >= LEAST_SHAPES], weights=weights)
    print(f"  half-width of the 16-84 % band over held-out MAPE (at most 1.5): {ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main())
