"""timeline.csv: a run over time in bins, so that a report can be made again from its folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvsim.errors import InputError
from kvsim.result import PolicyResult
from kvsim.timeline import timeline
from kvsim.units import PS_PER_S

NUM_BINS = 400
VALUES = ("decoding_sequences", "waiting_requests", "kv_pool_frac")
COLUMNS = ("policy", "time_s", *VALUES)


@dataclass(frozen=True)
class Bins:
    """Averages over bins of equal length, float64 [bins]; time_s is the middle of a bin."""

    time_s: np.ndarray
    values: Mapping[str, np.ndarray]
    """By name of VALUES."""


def bins_of(policy: PolicyResult) -> Bins:
    """Idle time counts as zero; no bins where nothing ran. Of a fleet: all replicas together."""
    runs = [timeline(log) for log in policy.logs]
    busy = [each for each in runs if len(each.start_ps)]
    if not busy:
        return Bins(np.empty(0), {name: np.empty(0) for name in VALUES})
    start_ps, end_ps = min(int(each.start_ps[0]) for each in busy), max(int(each.end_ps[-1]) for each in busy)
    edges_ps = np.linspace(start_ps, end_ps, NUM_BINS + 1)
    units = [replica.unit_bytes // policy.unit_bytes for replica in policy.replicas] or [1]
    values = {name: np.zeros(NUM_BINS) for name in VALUES}
    for each, size in zip(runs, units, strict=True):
        over_time = (each.num_decodes, each.num_waiting, size * each.held_units / max(policy.pool_units, 1))
        for name, value in zip(VALUES, over_time, strict=True):
            values[name] += each.binned(value, edges_ps)
    return Bins((edges_ps[1:] + edges_ps[:-1]) / 2 / PS_PER_S, values)


def write_timeline(bins: Mapping[str, Bins], path: Path) -> None:
    """A row per policy and bin; numbers as Python writes them, which is exact."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for policy, found in bins.items():
            columns = [found.time_s.tolist(), *(found.values[name].tolist() for name in VALUES)]
            writer.writerows((policy, *row) for row in zip(*columns, strict=True))


def read_timeline(path: Path, policies: tuple[str, ...]) -> dict[str, Bins]:
    """Raises InputError for a file of other columns, policies or values."""
    rows: dict[str, list[list[float]]] = {name: [] for name in policies}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != COLUMNS:
            raise InputError(path.name, None, f"must have the columns {', '.join(COLUMNS)}", FIX)
        for row in reader:
            try:
                name, *numbers = row
                values = [float(number) for number in numbers]
                if len(values) != len(COLUMNS) - 1 or not np.isfinite(values).all():
                    raise ValueError
                rows[name].append(values)
            except (ValueError, KeyError):
                raise InputError(f"{path.name}, line {reader.line_num}", None, "is not a row of this run", FIX) from None
    tables = {name: np.array(found).reshape(-1, len(VALUES) + 1) for name, found in rows.items()}
    return {
        name: Bins(table[:, 0], {value: table[:, i] for i, value in enumerate(VALUES, start=1)}) for name, table in tables.items()
    }


FIX = "run `kvsim run --out` again"
