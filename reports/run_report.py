"""The report of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kvsim.reports import run_tables
from kvsim.reports.cells import csv_text
from kvsim.reports.compare import merged_notes, shares_by_kind_of_source
from kvsim.reports.formats import share
from kvsim.reports.report import Code, Prose, Report, Section, section
from kvsim.reports.saved import SavedRun
from kvsim.reports.verdict import verdict, warnings
from kvsim.result import Result

CSV_NAME = "policies.csv"
NO_REQUESTS = "The folder holds no requests.csv or requests.parquet, so latencies are not drawn."
NO_TIMELINE = "The folder holds no timeline.csv, so nothing over time is drawn."


def run_report(run: SavedRun, *, charts: bool = True) -> Report:
    """charts=False: tables alone, without matplotlib."""
    result = run.result
    rows = list(run_tables.policy_rows(result))
    return Report(
        stem="report",
        what="Simulated run",
        title=result.title,
        facts=tuple(run_facts(result)),
        lead=tuple(verdict(result)),
        warnings=tuple(warnings(result)),
        sections=tuple(_sections(run, charts)),
        csv_files={CSV_NAME: csv_text(list(rows[0]), (list(row.values()) for row in rows))},
    )


def run_facts(result: Result) -> Iterator[tuple[str, str]]:
    """Label and value of what was simulated."""
    scenario = result.scenario
    engine = scenario.get("engine")
    num_gpus = scenario.get("tensor_parallel", 1)
    for label, value in (
        ("GPU", f"{num_gpus} x {scenario['gpu']}" if "gpu" in scenario else None),
        ("Model", scenario.get("model")),
        ("Weights", scenario.get("weight_dtype")),
        ("Engine", engine.get("kind") if isinstance(engine, Mapping) else engine),
        ("Traffic", traffic(scenario)),
    ):
        if value:
            yield label, str(value)
    some = next(iter(result.policies.values())).summary
    yield "Requests", f"{some.num_requests:,} counted after {some.num_warmup_requests:,} of warm-up"
    yield "Seed", str(result.seed)


def traffic(scenario: Mapping[str, Any], *, rate: bool = True) -> str | None:
    """Of the workload block, in a few words; None where it holds neither arrivals nor a trace. rate=False: but for the rate."""
    workload = scenario.get("workload")
    if not isinstance(workload, Mapping):
        return None
    trace, arrivals, lengths = (workload.get(name) for name in ("trace", "arrivals", "lengths"))
    if isinstance(trace, Mapping):
        return f"trace {trace.get('path')}"
    if not isinstance(arrivals, Mapping):
        return None
    words, per_s = [str(arrivals.get("kind"))], arrivals.get("rate_per_s")
    if rate and isinstance(per_s, (int, float)):
        words.append(f"{per_s:g} requests/s")
    if isinstance(lengths, Mapping):
        sizes = [lengths.get(f"{part}_mean_tokens", lengths.get(f"{part}_tokens")) for part in ("prompt", "output")]
        if all(isinstance(size, (int, float)) for size in sizes):
            words.append("{:g} prompt and {:g} output tokens".format(*sizes))
    return ", ".join(words)


def _sections(run: SavedRun, with_charts: bool) -> Iterator[Section]:
    result = run.result
    drawn: dict[str, Any] = {}
    if with_charts:
        from kvsim.reports.figures.run_charts import run_charts

        drawn = run_charts(run)
    missing = with_charts and not run.has_requests
    yield from section(
        "latency", "Latency", run_tables.latency(result), drawn.get("latency_cdf"), Prose((NO_REQUESTS,)) if missing else None,
        run_tables.means(result), run_tables.slo(result),
    )  # fmt: skip
    yield from section("capacity", "Capacity", run_tables.capacity(result), run_tables.replicas(result))
    yield from section("gains", "Gains", run_tables.gains(result), drawn.get("gains"), run_tables.bands(result))
    yield from section("quality", "Quality", run_tables.quality(result))
    missing = with_charts and run.bins is None
    yield from section("over-time", "Over time", drawn.get("over_time"), Prose((NO_TIMELINE,)) if missing else None)
    yield from section(
        "time-and-memory", "Where time and memory go", drawn.get("time_by_op"), drawn.get("memory"),
        run_tables.time_shares(result), run_tables.ledger(result),
    )  # fmt: skip
    yield from section("basis", "What the numbers rest on", _origins(result), run_tables.basis(result), _notes(result))
    yield from section("provenance", "How to make it again", *provenance(result.scenario, result.versions))


def _origins(result: Result) -> Prose | None:
    """How much of the time is measured, how much assumed."""
    shown = result.policies[result.baseline] if result.baseline else next(iter(result.policies.values()))
    parts = [f"{share(part)} % {kind}" for kind, part in shares_by_kind_of_source(shown).items()]
    return Prose((f"Time of {shown.name}: {', '.join(parts)}.",)) if parts else None


def _notes(result: Result) -> Prose | None:
    lines = []
    for note, names in merged_notes(result):
        who = "All policies" if len(names) == len(result.policies) > 1 else ", ".join(names)
        lines.append(f"{who}: {note}")
    return Prose(tuple(lines)) if lines else None


def provenance(scenario: Mapping[str, Any], versions: Mapping[str, str]) -> tuple[Prose, Code]:
    """Versions, and the scenario with every default filled in."""
    made = "Made with " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + "."
    shown = json.dumps(scenario, indent=2, sort_keys=True, ensure_ascii=False)
    return Prose((made,)), Code("The scenario, defaults filled in", shown, folded=True)
