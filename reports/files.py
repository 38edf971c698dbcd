"""What a run writes to disk: summary.json, a row per request, a report, plots and a trace; all of it or nothing.

Equal inputs give equal bytes: no dates, no paths, no machine names, keys sorted.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvsim.errors import InputError
from kvsim.recording import RunLog
from kvsim.reports.compare import gains_over_baseline, op_shares
from kvsim.reports.folder import all_or_nothing, check_writable
from kvsim.reports.names import RUN_NAMES, TIMELINE_FILE
from kvsim.reports.timeline_file import bins_of, write_timeline
from kvsim.reports.verdict import verdict, warnings
from kvsim.result import PolicyResult, ReplicaResult, Result
from kvsim.units import PS_PER_S

SCHEMA_VERSION = 1
FILE_NAMES = ("summary.json", "requests.csv", "requests.parquet", TIMELINE_FILE, "trace.json.gz", *RUN_NAMES)
"""Every name that `write_outputs` may write; those of an earlier run that this one does not write are removed."""

TIMES = ("arrival", "scheduled", "first_token", "finish", "queue", "ttft", "tpot", "e2e")
COUNTS = ("prompt_tokens", "output_tokens", "cached_tokens", "num_preemptions")
REQUEST_COLUMNS = ("policy", "index", "is_warmup", *(f"{name}_s" for name in TIMES), *COUNTS)


def write_outputs(
    result: Result,
    out_dir: str | os.PathLike[str],
    *,
    requests_format: Literal["csv", "parquet"] = "csv",
    plots: bool = True,
    report: bool = True,
    perfetto: bool = False,
    trace_requests: int = 1000,
) -> list[Path]:
    """Write the files of one run and return their paths.

    plots: figures, as files and in the report. report: report.html, report.md and policies.csv. Raises InputError if out_dir
    cannot be written, or if requests_format is "parquet" and pyarrow is not installed.
    """
    if requests_format not in ("csv", "parquet"):
        raise InputError("requests_format", requests_format, "must be csv or parquet")
    with all_or_nothing(out_dir, FILE_NAMES) as workspace:
        summary = to_json(result)
        (workspace / "summary.json").write_text(summary, encoding="utf-8", newline="\n")
        if requests_format == "csv":
            write_requests_csv(result, workspace / "requests.csv")
        else:
            write_requests_parquet(result, workspace / "requests.parquet")
        write_timeline({name: bins_of(policy) for name, policy in result.policies.items()}, workspace / TIMELINE_FILE)
        if plots or report:
            from kvsim.reports.run_report import run_report
            from kvsim.reports.saved import saved_run
            from kvsim.reports.write import write_into

            write_into(run_report(saved_run(result, summary), charts=plots), workspace, text=report)
        if perfetto:
            from kvsim.reports.perfetto import write_trace

            write_trace(result, workspace / "trace.json.gz", max_requests=trace_requests)
        made = [name for name in FILE_NAMES if (workspace / name).exists()]
    return [Path(out_dir) / name for name in made]


def check_outputs(out_dir: str | os.PathLike[str], requests_format: str) -> None:
    """Raise now what `write_outputs` would raise after a long simulation; leaves nothing behind."""
    if requests_format == "parquet":
        _pyarrow()
    check_writable(out_dir)


def to_json(result: Result) -> str:
    """The summary as JSON text: sorted keys, and null for every number that is not finite."""
    return json.dumps(summary_data(result), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def summary_data(result: Result) -> dict[str, Any]:
    """All of a result but its logs, as plain data."""
    gains = gains_over_baseline(result)
    policies = {
        name: {
            "description": policy.description,
            "summary": policy.summary,
            "gains_over_baseline": gains.get(name),
            "op_share_frac": op_shares(policy),
            "ledger": policy.ledger,
            "pool_units": policy.pool_units,
            "unit_bytes": policy.unit_bytes,
            "kv_bytes_per_sequence": policy.kv_bytes_per_sequence,
            "basis": policy.basis,
            "notes": policy.notes,
            "error_bands": result.bands.get(name),
            "published_quality": policy.quality and policy.quality.model_dump(),
        }
        for name, policy in result.policies.items()
    }
    for name, policy in result.policies.items():
        if policy.replicas:
            policies[name] |= {"replicas": _replicas(policy), "imbalance_x": policy.imbalance_x}
    data = {
        "schema_version": SCHEMA_VERSION,
        "title": result.title,
        "scenario": result.scenario,
        "seed": result.seed,
        "versions": result.versions,
        "slo": result.slo,
        "warmup_requests": result.warmup_requests,
        "baseline": result.baseline,
        "policy_order": list(result.policies),
        "policies": policies,
        "warnings": warnings(result),
        "verdict": verdict(result),
    }
    return _plain(data)


def _replicas(policy: PolicyResult) -> list[dict[str, Any]]:
    """All of them but their logs."""
    names = [field.name for field in fields(ReplicaResult) if field.name != "log"]
    return [{name: getattr(replica, name) for name in names} for replica in policy.replicas]


def replica_numbers(policy: PolicyResult) -> np.ndarray:
    """Which replica served each request, int64, in order of arrival."""
    indices = [replica.log.request_columns()["index"] for replica in policy.replicas]
    numbers = np.repeat(np.arange(len(indices)), [len(index) for index in indices])
    return numbers[np.argsort(np.concatenate(indices), kind="stable")]


def _has_replicas(result: Result) -> bool:
    return any(policy.replicas for policy in result.policies.values())


def request_columns(log: RunLog, warmup_requests: int) -> dict[str, np.ndarray]:
    """Integer columns in order of arrival, times in picoseconds; `tpot` is -1 where there is only one token."""
    logged = log.request_columns()
    order = np.argsort(logged["index"], kind="stable")
    columns = {name.removesuffix("_ps"): column[order] for name, column in logged.items()}
    gaps = columns["output_tokens"] - 1
    decode_ps = columns["finish"] - columns["first_token"]
    rounded_ps = (2 * decode_ps + gaps) // np.maximum(2 * gaps, 1)
    return columns | {
        "is_warmup": (columns["index"] < warmup_requests).astype(np.int64),
        "queue": columns["scheduled"] - columns["arrival"],
        "ttft": columns["first_token"] - columns["arrival"],
        "tpot": np.where(gaps > 0, rounded_ps, -1),
        "e2e": columns["finish"] - columns["arrival"],
    }


def write_requests_csv(result: Result, path: Path) -> None:
    """One row per request and policy; times in seconds with twelve decimals, which is exact. Of a fleet: and the replica."""
    fleet = _has_replicas(result)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*REQUEST_COLUMNS, "replica") if fleet else REQUEST_COLUMNS)
        for name, policy in result.policies.items():
            rows = _csv_rows(name, request_columns(policy.log, result.warmup_requests))
            if fleet:
                rows = ((*row, number) for row, number in zip(rows, replica_numbers(policy).tolist(), strict=True))
            writer.writerows(rows)


def _csv_rows(policy: str, columns: Mapping[str, np.ndarray]) -> Iterator[tuple[object, ...]]:
    times = [map(_exact_seconds, columns[name].tolist()) for name in TIMES]
    counts = [columns[name].tolist() for name in COUNTS]
    for index, is_warmup, *rest in zip(
        columns["index"].tolist(), columns["is_warmup"].tolist(), *times, *counts, strict=True
    ):
        yield (policy, index, is_warmup, *rest)


def _exact_seconds(time_ps: int) -> str:
    if time_ps < 0:
        return ""
    whole, rest = divmod(time_ps, PS_PER_S)
    return f"{whole}.{rest:012d}"


def write_requests_parquet(result: Result, path: Path) -> None:
    """The columns of the CSV file; times as float64 seconds, null where there is none."""
    pa, pq = _pyarrow()
    times = [(f"{name}_s", pa.float64()) for name in TIMES]
    counts = [(name, pa.int64()) for name in COUNTS]
    replica = [("replica", pa.int64())] if _has_replicas(result) else []
    schema = pa.schema([("policy", pa.string()), ("index", pa.int64()), ("is_warmup", pa.bool_()), *times, *counts, *replica])
    with pq.ParquetWriter(path, schema) as writer:
        for name, policy in result.policies.items():
            columns = request_columns(policy.log, result.warmup_requests)
            arrays = [pa.array([name] * len(columns["index"]), pa.string()), pa.array(columns["index"])]
            arrays.append(pa.array(columns["is_warmup"].astype(bool)))
            arrays += [pa.array(columns[time] / PS_PER_S, mask=columns[time] < 0) for time in TIMES]
            arrays += [pa.array(columns[count]) for count in COUNTS]
            arrays += [pa.array(replica_numbers(policy)) for _ in replica]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        rule = "needs pyarrow, which is not installed"
        raise InputError("requests_format", "parquet", rule, "pip install 'kvsim[parquet]' or use csv") from error
    return pa, pq


def _plain(value: Any) -> Any:
    """JSON's own types: dataclasses and mappings to dicts, tuples to lists, NaN and infinity to None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"{type(value).__name__} {value!r} has no place in a summary; make it plain data first")
