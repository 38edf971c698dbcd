"""Measured rows in, a profile file out."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvsim.calibrate.fit import Fit, fit_rows
from kvsim.calibrate.rows import Import, MeasuredRow, shape_group, without_suspect
from kvsim.coordinates import error_class, locate
from kvsim.datasheet import DatasheetProfile
from kvsim.hardware import Gpu
from kvsim.profile import QUANTILE_LEVELS, LogBias
from kvsim.profile_file import ErrorClass, ProfileFile, TableData, dump_profile_file

LICENCES = {"aiconfigurator": "Apache-2.0", "LLMServingSim": "MIT", "vidur": "MIT"}
LEAST_HALF_WIDTH = 0.01
"""Of a 16-84 % band: clocks alone move by as much between two runs."""


def build(
    gpu: Gpu, found: Import, command: str, licence: str = "", sparse: bool = False
) -> tuple[ProfileFile, Fit, list[str]]:
    """(profile, its fit with held-out residuals, what was left out as suspect). sparse: as `fit_rows`."""
    gpu = gpu.by_datasheet()
    rows, suspect = without_suspect(found.rows, found.rejected)
    fit = fit_rows(gpu, rows, sparse=sparse)
    tables = {
        key: TableData(table.correction.terms, len(table.rows), len(set(table.groups)), *mape_p90(table.residuals))
        for key, table in fit.tables.items()
    }
    licence = licence or next((text for name, text in LICENCES.items() if name in found.source), "the owner's own measurements")
    profile = ProfileFile(
        gpu.name, found.engine, found.engine_version, found.source, licence, datetime.date.today().isoformat(), command,
        found.sha256(), fit.efficiencies, tables, error_classes(gpu, fit),
    )  # fmt: skip
    return profile, fit, suspect


def mape_p90(residuals: np.ndarray) -> tuple[float, float]:
    """Mean and 90th percentile of |predicted - measured| / measured, from log(measured / predicted)."""
    errors = np.abs(np.expm1(-residuals))
    return float(errors.mean()), float(np.percentile(errors, 90))


def size_classes(gpu: Gpu, rows: Sequence[MeasuredRow]) -> list[str]:
    """The class of each row, whose rows share one bias."""
    physics = DatasheetProfile(gpu)
    return [error_class(locate(row.op, gpu.num_sms), physics.answer(row.op).size_class) for row in rows]


def error_classes(gpu: Gpu, fit: Fit) -> dict[tuple[str, str], ErrorClass]:
    """Quantiles of the held-out errors by (kind, size class), every shape counting the same."""
    residuals: dict[tuple[str, str], list[tuple[float, object]]] = {}
    for key, table in fit.tables.items():
        for name, row, residual in zip(size_classes(gpu, table.rows), table.rows, table.residuals, strict=True):
            own = locate(row.op, gpu.num_sms)[:3]
            if own == key or own not in fit.tables:  # a pooled table does not answer for what has its own
                residuals.setdefault((key[0], name), []).append((float(residual), shape_group(row.op)))
    found = {}
    for size_class, pairs in sorted(residuals.items()):
        values = np.array([value for value, _ in pairs])
        shapes = {group for _, group in pairs}
        found[size_class] = ErrorClass(bias_quantiles(values), len(values), len(shapes), mape_p90(values)[0])
    return found


def bias_quantiles(residuals: np.ndarray) -> LogBias:
    q = np.quantile(residuals, QUANTILE_LEVELS)
    middle = (q[1] + q[2]) / 2
    half = max((q[2] - q[1]) / 2, LEAST_HALF_WIDTH)
    low, high = middle - half, middle + half
    return float(min(q[0], low)), float(min(q[1], low)), float(max(q[2], high)), float(max(q[3], high))


def write_profile(profile: ProfileFile, path: Path) -> None:
    """Writes beside the target first, so that nothing half-written is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump_profile_file(profile), encoding="utf-8")
    temporary.replace(path)
