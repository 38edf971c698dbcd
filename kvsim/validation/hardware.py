"""GPUs that no shipped profile was measured on: what is carried over to them by datasheet, beside what others measured there.

Products and copies are single Ops, asked of `profile: auto`; serving is simulated (`hardware_serving`). Beside each stand the
datasheet's peak, a roofline of datasheet numbers, and kvsim's datasheet profile, which carries nothing over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import mean, median
from typing import Any, cast

from kvsim.datasheet import DatasheetProfile
from kvsim.hardware import Gpu, load_gpu
from kvsim.ops import Copy, Gemm
from kvsim.profile import Profile
from kvsim.profile_file import shipped
from kvsim.profiles import NEIGHBOUR_SIGMA, load_profile
from kvsim.units import GB, TB
from kvsim.validation import hardware_serving
from kvsim.validation.cases import Bar, Case, Row
from kvsim.validation.naive import ROOFLINE
from kvsim.validation.published_rates import (
    BESTS,
    COPIES,
    EAGER_LAUNCH_US,
    FEW_ROWS,
    L4_PROBE,
    L4_PROBE_BEST,
    L4_PROBE_GRID,
    REPOSITORY,
    SIZES,
    SWEEPS,
    Best,
    FewRows,
    Sweep,
)
from kvsim.validation.serving_lengths import write_lengths
from kvsim.validation.serving_models import write_models

NAME = "hardware"
KERNELS = "vllm"
"""Matrix products are the same library calls under all engines; vLLM's tables are there for most GPUs."""
PEAK, DATASHEET = "datasheet peak", "datasheet profile"
CARRIED, OWN = "GEMM", "GEMM, own table"
"""How groups of 16-bit products begin: on GPUs without a table, the ones that the bar is over, and on those with one."""
GEMM_LIMIT = 0.10
TPOT_LIMIT = 0.6745 * NEIGHBOUR_SIGMA
"""The median error of a normal distribution of the width that is claimed for what is carried over."""
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
Shape = tuple[int, int, int]
"""m, n, k."""


def rows() -> list[Row]:
    """Products and copies; serving is in `serving_rows`."""
    found = [row for sweep in SWEEPS for row in _sweep(sweep)] + [row for best in BESTS for row in _best(best)] + _l4_probe()
    found += [row for few in FEW_ROWS for row in _few_rows(few)]
    return [*sorted(found, key=_rank), *_copies(), *_band_rows()]


def _rank(row: Row) -> int:
    """16 bit before fp32, carried before own; the rest stays in order."""
    return 2 * row.group.startswith("fp32") + row.group.startswith(OWN)


def cases(folder: Path, quick: bool) -> list[Case]:
    """folder: that of `model_folder`. quick: every third."""
    return hardware_serving.cases(NAME, folder)[:: 3 if quick else 1]


def model_folder() -> tempfile.TemporaryDirectory[str]:
    """Where `cases` finds models that the catalogue lacks, while it is open."""
    folder = tempfile.TemporaryDirectory()
    write_models(Path(folder.name))
    write_lengths(Path(folder.name))
    return folder


def has_table(gpu: Gpu) -> bool:
    """Whether a shipped profile was measured on it."""
    return gpu.name in {path.parent.name for path in shipped().values()}


def _changed(name: str, changed: Mapping[str, float]) -> Gpu:
    """A GPU of the catalogue with some fields replaced."""
    return replace(load_gpu(name), **cast(Mapping[str, Any], changed))


def _group(gpu: Gpu, dtype: str) -> str:
    if dtype == "fp32":
        return "fp32 GEMM"
    bits = ", 8 bit" if ELEMENT_BYTES[dtype] == 1 else ""
    return f"{OWN if has_table(gpu) else CARRIED}{bits}: {gpu.name}"


def _sweep(sweep: Sweep) -> list[Row]:
    gpu = _changed(sweep.gpu, sweep.changed)
    source = f"{REPOSITORY}, {sweep.source}"
    return [
        _rate_row(gpu, dtype, f"{sweep.card} {dtype} {size}", [(size,) * 3], tflops, source, _doubts(sweep, size, tflops))
        for dtype, measured in sweep.tflops.items()
        for size, tflops in zip(SIZES, measured, strict=True)
    ]  # fmt: skip


def _doubts(sweep: Sweep, size: int, tflops: float) -> str:
    launch_us = 2.0 * size**3 / (tflops * TB) * 1e6
    hurried = f"a launch every {launch_us:.0f} us, the host may bind" if launch_us < 2.0 * EAGER_LAUNCH_US else ""
    return "; ".join(filter(None, (sweep.confidence, hurried)))


def _best(best: Best) -> list[Row]:
    gpu = load_gpu(best.gpu)
    shapes: list[Shape] = [(size,) * 3 for size in SIZES]
    return [
        _rate_row(gpu, dtype, f"{gpu.name} {dtype}, best of sizes", shapes, tflops, f"{REPOSITORY}, {best.source}", "best of five sizes")
        for dtype, tflops in best.tflops.items()
    ]  # fmt: skip


def _l4_probe() -> list[Row]:
    gpu = load_gpu("l4-24gb")
    shapes: list[Shape] = [(m, size, size) for m in L4_PROBE_GRID[0] for size in L4_PROBE_GRID[1]]
    return [
        _rate_row(gpu, dtype, f"L4 {dtype}, best of {len(shapes)} shapes", shapes, tflops, L4_PROBE)
        for dtype, tflops in L4_PROBE_BEST.items()
    ]  # fmt: skip


def _few_rows(few: FewRows) -> list[Row]:
    gpu, found = load_gpu(few.gpu), []
    for (m, n, k), micros in few.micros.items():
        op = Gemm(m, n, k, few.dtype)
        naive = {ROOFLINE: _roofline_s(gpu, op) * 1e6, DATASHEET: DatasheetProfile(gpu).answer(op).seconds * 1e6}
        case = f"{few.gpu.partition('-')[0].upper()} {few.dtype} {m} x {n}" + (f" x {k}" if n != k else "")
        found.append(Row(
            NAME, f"{CARRIED}, few rows: {gpu.name}", case, "us", micros, _seconds(_profile(gpu), op) * 1e6, few.source, naive, "",
            few.confidence,
        ))  # fmt: skip
    return found


def _rate_row(gpu: Gpu, dtype: str, case: str, shapes: list[Shape], tflops: float, source: str, confidence: str = "") -> Row:
    """A rate, the best one over the shapes."""
    ops = [Gemm(*shape, dtype) for shape in shapes]
    datasheet = DatasheetProfile(gpu)
    naive = {
        ROOFLINE: max(_flops(op) / _roofline_s(gpu, op) for op in ops) / TB, PEAK: gpu.peak_flops(dtype) / TB,
        DATASHEET: _best_rate(datasheet, ops),
    }  # fmt: skip
    return Row(NAME, _group(gpu, dtype), case, "TFLOP/s", tflops, _best_rate(_profile(gpu), ops), source, naive, "", confidence)


def _band_rows() -> list[Row]:
    """How many 16-bit measurements on GPUs without a table lie inside the bands that their answers claim."""
    places = []
    for sweep in SWEEPS:
        gpu = _changed(sweep.gpu, sweep.changed)
        if has_table(gpu):
            continue
        for size, *rates in zip(SIZES, sweep.tflops["bf16"], sweep.tflops["fp16"], strict=True):
            answer = _profile(gpu).answer(Gemm(size, size, size, "bf16"))  # fp16 is the same to a profile
            places += [(log(2.0 * size**3 / (tflops * TB) / answer.seconds), answer.log_bias) for tflops in rates]
    return [
        Row(NAME, "band of carried GEMM", f"measurements within {text}", "share", share, mean(b[low] <= x <= b[3 - low] for x, b in places),
            f"{REPOSITORY}, sweeps")
        for low, share, text in ((1, 0.68, "16-84 %"), (0, 0.95, "2.5-97.5 %"))
    ]  # fmt: skip


def _copies() -> list[Row]:
    found = []
    for copy in COPIES:
        gpu = _changed(copy.gpu, copy.changed)
        op = Copy("hbm", copy.num_bytes)
        predicted = 2.0 * copy.num_bytes / _seconds(_profile(gpu), op) / GB
        naive = {ROOFLINE: gpu.hbm_bandwidth_bytes_per_s / GB}
        case = f"{copy.gpu}, {copy.num_bytes / 1e6:.0f} MB"
        found.append(Row(NAME, "device copy", case, "GB/s", copy.gb_per_s, predicted, copy.source, naive, "", copy.confidence))
    return found


def _profile(gpu: Gpu) -> Profile:
    return load_profile("auto", gpu, KERNELS)


def _seconds(profile: Profile, op: Gemm | Copy) -> float:
    return profile.answer(op).seconds


def _flops(op: Gemm) -> float:
    return 2.0 * op.m * op.n * op.k


def _best_rate(profile: Profile, ops: list[Gemm]) -> float:
    return max(_flops(op) / _seconds(profile, op) for op in ops) / TB


def _roofline_s(gpu: Gpu, op: Gemm) -> float:
    traffic = ELEMENT_BYTES[op.weight_dtype] * (op.m * op.k + op.k * op.n + op.m * op.n)
    return max(traffic / gpu.hbm_bandwidth_bytes_per_s, _flops(op) / gpu.peak_flops(op.weight_dtype))


def bars(rows: list[Row]) -> list[Bar]:
    """16-bit products on GPUs without a table; TPOT where a source states all its conditions."""
    found = []
    products = [row for row in rows if row.group.startswith(f"{CARRIED}: ")]
    stated = [row for row in rows if row.metric == "tpot_ms" and row.group.startswith(f"{hardware_serving.STATED}: ")]
    for text, mine, limit in (
        ("16-bit GEMM on GPUs without a table: median error", products, GEMM_LIMIT),
        ("TPOT on GPUs without a table, conditions stated: median error", stated, TPOT_LIMIT),
    ):  # fmt: skip
        if mine:
            found.append(Bar(NAME, text, median(abs(row.error) for row in mine), limit))
    return found
