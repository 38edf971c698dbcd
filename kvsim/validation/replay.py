"""A user's own run beside its simulation: lengths and arrivals of a measured file replayed on the deployment of a scenario."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvsim.api import simulate
from kvsim.errors import InputError
from kvsim.result import PolicyResult
from kvsim.scenario import Scenario, load_scenario, select_policies
from kvsim.validation.bench_serve import FIELD, MeasuredRun, read_bench_result
from kvsim.validation.cases import Bar, Row
from kvsim.validation.latency import compare_counts, compare_latencies, limits_of, roofline_times, simulated_times
from kvsim.validation.naive import ROOFLINE

NAME = "requests"
SEED = 0


class Replay(NamedTuple):
    """Rows, notes on how the run was replayed, and columns of single requests (empty where they cannot be paired)."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    per_request: dict[str, tuple[float, ...]]


def replay(measured: Path, scenario: Path, policy: str | None = None) -> Replay:
    """One measured run beside its simulation. Raises InputError.

    scenario: a scenario file; its workload is replaced and may be absent. policy: which of its policies ran.
    """
    run = read_bench_result(measured)
    with tempfile.TemporaryDirectory() as folder:
        workload, how = workload_of(run, Path(folder))
        loaded = load_scenario(scenario, {"workload": workload})
        loaded = loaded if policy is None else select_policies(loaded, [policy])
        if len(loaded.policies) != 1:
            fix = f"name it with --policy: {', '.join(loaded.policies)}"
            raise InputError("--scenario", str(scenario), "must have one policy, the one that ran", fix)
        result = next(iter(simulate(loaded).policies.values()))
    caching = getattr(loaded.engine, "enable_prefix_caching", False)
    hits = ("prompts are taken as unlike: the file says nothing of prefix-cache hits",) if caching else ()
    return Replay(tuple(compare(run, result, loaded)), (*run.notes, how, *hits), _per_request(run, result))


def _per_request(run: MeasuredRun, result: PolicyResult) -> dict[str, tuple[float, ...]]:
    if run.start_s is None:
        return {}
    columns = {"start_s": run.start_s, "prompt_tokens": run.prompt_tokens, "output_tokens": run.output_tokens}
    measured, simulated = _times(run), simulated_times(result)
    for name in ("ttft_s", "tpot_ms", "e2e_s"):
        columns |= {f"measured_{name}": measured[name], f"simulated_{name}": simulated[name]}
    return {name: tuple(column.tolist()) for name, column in columns.items()}


def _times(run: MeasuredRun) -> dict[str, np.ndarray]:
    e2e = run.e2e_s
    tpot = (e2e - run.ttft_s) / np.maximum(run.output_tokens - 1, 1) * 1e3
    return {"ttft_s": run.ttft_s, "tpot_ms": tpot, "e2e_s": e2e, "output_tokens": run.output_tokens}


def workload_of(run: MeasuredRun, folder: Path) -> tuple[dict[str, Any], str]:
    """A workload that replays a run, with files in `folder`, and a sentence on where its arrivals come from."""
    lengths = list(zip(run.prompt_tokens.tolist(), run.output_tokens.tolist(), strict=True))
    if run.start_s is not None:
        return _trace(folder, run.start_s, lengths), "arrivals: the start times of the file"
    if run.rate_per_s is None:
        raise InputError(FIELD, run.name, "must have start_times or a request_rate", "use a newer vLLM, which writes start_times")
    if math.isfinite(run.rate_per_s):
        how = f"arrivals: drawn anew at the stated {run.rate_per_s:g} requests/s, burstiness {run.burstiness:g} (no start times)"
        if run.max_concurrency is not None:
            how += f"; the limit of {run.max_concurrency} in flight is not replayed"
        return _trace(folder, drawn_starts_s(run), lengths), how
    if run.max_concurrency is None:
        return _trace(folder, np.zeros(len(lengths)), lengths), "arrivals: all requests at once, as the rate is inf (no start times)"
    path = folder / "lengths.csv"
    _write(path, ("prompt_tokens", "output_tokens"), lengths)
    clients = min(run.max_concurrency, len(lengths))
    workload = {
        "arrivals": {"kind": "closed_loop", "clients": clients}, "num_requests": len(lengths),
        "lengths": {"kind": "empirical", "path": str(path), "repeat": True},
    }  # fmt: skip
    return workload, f"arrivals: a closed loop of {clients} clients, the stated concurrency (no start times)"


def drawn_starts_s(run: MeasuredRun) -> np.ndarray:
    """As vllm/benchmarks/serve.py draws them: gamma gaps, stretched so that the last request starts at n / rate."""
    rate, count = run.rate_per_s, len(run.prompt_tokens)
    assert rate is not None
    if math.isinf(run.burstiness):
        gaps = np.full(count, 1.0 / rate)
    else:
        gaps = np.random.default_rng(SEED).gamma(run.burstiness, 1.0 / (rate * run.burstiness), count)
    starts = np.cumsum(gaps)
    return starts * (count / rate / starts[-1])


def _trace(folder: Path, start_s: np.ndarray, lengths: list[tuple[int, int]]) -> dict[str, Any]:
    path = folder / "trace.csv"
    # Twelve digits after the point: whole picoseconds, which is what simulated time is.
    rows = [(f"{start:.12f}", *pair) for start, pair in zip(start_s.tolist(), lengths, strict=True)]
    _write(path, ("arrival_s", "prompt_tokens", "output_tokens"), rows)
    return {"trace": {"path": str(path), "format": "csv"}}


def _write(path: Path, head: tuple[str, ...], rows: list[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def compare(run: MeasuredRun, result: PolicyResult, scenario: Scenario) -> list[Row]:
    """TTFT, TPOT, ITL and E2E; where arrivals are those of the file, also request by request and the number in flight."""
    group, paired = run.name, run.start_s is not None
    simulated = simulated_times(result)
    truth = _times(run)
    naive = {ROOFLINE: roofline_times(scenario, run.prompt_tokens, run.output_tokens)}
    found = compare_latencies(truth, simulated, NAME, group, run.name, paired, naive)
    found += _gap_rows(run, result, group)
    if run.start_s is not None:
        spans = {"in flight": (run.start_s, run.start_s + truth["e2e_s"])}
        found += compare_counts(spans, {"in flight": (simulated["arrival_s"], simulated["finish_s"])}, NAME, group, run.name)
    return found


def _gap_rows(run: MeasuredRun, result: PolicyResult, group: str) -> list[Row]:
    """ITL as clients see it: gaps between chunks, one token each unless the server bundles them."""
    gaps, itl = np.concatenate(run.gaps_s), result.summary.itl
    if not len(gaps) or not itl.num_values:
        return []
    found = [Row(NAME, group, "mean", "itl_ms", float(gaps.mean()) * 1e3, itl.mean_s * 1e3, run.name)]
    for percent, value in ((50, itl.p50_s), (90, itl.p90_s), (99, itl.p99_s)):
        truth = float(np.percentile(gaps, percent, method="inverted_cdf")) * 1e3  # nearest rank, as the simulation's
        found.append(Row(NAME, group, f"P{percent}", "itl_ms", truth, value * 1e3, run.name))
    return found


def bars(rows: Sequence[Row]) -> list[Bar]:
    """The bars of the shipped run, on the user's."""
    limits = limits_of(rows)
    return [Bar(NAME, f"{row.metric}: {row.case}", abs(row.error), limit) for row, limit in limits]
