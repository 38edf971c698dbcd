"""A run as a Chrome trace-event file for https://ui.perfetto.dev: a process per policy, or per replica of a fleet.

Format: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
Times are cut to whole nanoseconds, Perfetto's own resolution, at both ends, so that neighbours never overlap.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvsim.reports.files import request_columns
from kvsim.result import PolicyResult, Result
from kvsim.timeline import Timeline, timeline

ENGINE_THREAD = 1


def write_trace(result: Result, path: Path, *, max_requests: int = 1000) -> None:
    """Stream the trace to `path`, compressed if it ends in .gz, with the first max_requests arrivals of each process."""
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                _write(result, io.TextIOWrapper(packed, encoding="utf-8", newline="\n"), max_requests)
        else:
            _write(result, io.TextIOWrapper(raw, encoding="utf-8", newline="\n"), max_requests)


def _write(result: Result, file: io.TextIOWrapper, max_requests: int) -> None:
    file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
    separator = ""
    for process, policy in enumerate(_tracks(result), start=1):
        for event in events(policy, process, max_requests, result.warmup_requests):
            file.write(separator + event)
            separator = ",\n"
    file.write("\n]}\n")
    file.detach().flush()


def _tracks(result: Result) -> Iterator[PolicyResult]:
    """Each policy, or each replica of a fleet by itself."""
    for policy in result.policies.values():
        if not policy.replicas:
            yield policy
        for number, replica in enumerate(policy.replicas):
            name = f"{policy.name}, replica {number}" + (f" ({replica.group})" if replica.group else "")
            yield replace(policy, name=name, log=replica.log, pool_units=replica.pool_units, unit_bytes=replica.unit_bytes)


def events(policy: PolicyResult, process: int, max_requests: int, warmup_requests: int = 0) -> Iterator[str]:
    """Each event as JSON text: names first, then steps with their counters, then requests."""
    yield _event("M", "process_name", process, args={"name": policy.name})
    yield _event("M", "process_sort_index", process, args={"sort_index": process})
    yield _event("M", "thread_name", process, tid=ENGINE_THREAD, args={"name": "engine"})
    yield from _engine_events(timeline(policy.log), policy, process)
    yield from _request_events(policy, process, max_requests, warmup_requests)


def _engine_events(runs: Timeline, policy: PolicyResult, process: int) -> Iterator[str]:
    columns = (runs.start_ps, runs.end_ps, runs.num_steps, runs.num_decodes, runs.prefill_tokens,
               runs.num_first_tokens, runs.held_units, runs.num_waiting)  # fmt: skip
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    next_starts = [row[0] for row in rows[1:]] + [None]
    for row, next_start in zip(rows, next_starts, strict=True):
        start, end, num_steps, num_decodes, prefill_tokens, num_first_tokens, held_units, num_waiting = row
        name = "decode" if not prefill_tokens else "prefill + decode" if num_decodes else "prefill"
        yield _event(
            "X",
            name,
            process,
            start,
            tid=ENGINE_THREAD,
            dur=_microseconds(end // 1000 - start // 1000),
            args={
                "steps": num_steps,
                "decoding sequences": num_decodes,
                "prefill tokens": prefill_tokens,
                "first tokens": num_first_tokens,
                "mean step ms": round((end - start) / num_steps / 1e9, 6),
            },
        )
        yield from _counters(process, start, policy, num_decodes, num_waiting)
        yield _kv_counter(process, end, policy, held_units)
        if next_start != end:
            yield from _counters(process, end, policy, 0, 0)
            yield _kv_counter(process, end, policy, 0)


def _counters(process: int, time_ps: int, policy: PolicyResult, num_decodes: int, num_waiting: int) -> Iterator[str]:
    yield _event("C", "decoding sequences", process, time_ps, args={"sequences": num_decodes})
    yield _event("C", "waiting requests", process, time_ps, args={"requests": num_waiting})


def _kv_counter(process: int, time_ps: int, policy: PolicyResult, held_units: int) -> str:
    used = 100 * held_units / policy.pool_units if policy.pool_units else 0.0
    return _event("C", "KV pool used %", process, time_ps, args={"%": round(used, 3)})


def _request_events(policy: PolicyResult, process: int, max_requests: int, warmup_requests: int) -> Iterator[str]:
    columns = {name: column.tolist() for name, column in request_columns(policy.log, warmup_requests).items()}
    for i, index in enumerate(columns["index"][:max_requests]):
        arrival, scheduled = columns["arrival"][i], columns["scheduled"][i]
        first_token, finish = columns["first_token"][i], columns["finish"][i]
        details = {
            name: columns[name][i] for name in ("prompt_tokens", "output_tokens", "cached_tokens", "num_preemptions")
        }
        identity: dict[str, Any] = {"cat": "request", "id": f"{process}.{index}"}
        phases = (("queued", arrival, scheduled), ("prefill", scheduled, first_token), ("decode", first_token, finish))
        yield _event("b", f"request {index}", process, arrival, args=details, **identity)
        for name, start, end in phases:
            if end > start:
                yield _event("b", name, process, start, **identity)
                yield _event("e", name, process, end, **identity)
        yield _event("e", f"request {index}", process, finish, **identity)


def _event(phase: str, name: str, process: int, time_ps: int = 0, *, tid: int = 0, **rest: Any) -> str:
    event = {"ph": phase, "name": name, "pid": process, "tid": tid, "ts": _microseconds(time_ps // 1000), **rest}
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False)


def _microseconds(time_ns: int) -> float:
    return time_ns / 1000
