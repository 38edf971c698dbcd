"""The report of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kvsim.planning.result import PlanResult
from kvsim.reports import plan_tables
from kvsim.reports.cells import csv_text
from kvsim.reports.formats import number, percent
from kvsim.reports.plan_values import deployable, refused
from kvsim.reports.report import Code, Part, Prose, Report, Section, section
from kvsim.reports.run_report import provenance, traffic

MANY = 3
"""More options than these are counted, not named."""
NONE_DEPLOYABLE = "No option can be deployed as asked; the reasons stand below."


def plan_report(plan: PlanResult, *, charts: bool = True) -> Report:
    """charts=False: tables alone, without matplotlib."""
    options, probes = list(plan_tables.option_rows(plan)), list(plan_tables.probe_rows(plan))
    files = {"options.csv": csv_text(list(options[0]), (list(row.values()) for row in options))} if options else {}
    if probes:
        files["probes.csv"] = csv_text(list(probes[0]), (list(row.values()) for row in probes))
    return Report(
        stem="report",
        what="Capacity plan",
        title=plan.title,
        facts=tuple(_facts(plan)),
        lead=plan.summary,
        warnings=() if deployable(plan) else (NONE_DEPLOYABLE,),
        sections=tuple(_sections(plan, charts)),
        csv_files=files,
    )


def _facts(plan: PlanResult) -> Iterator[tuple[str, str]]:
    yield "Target load", f"{number(plan.target_rate_per_s)} requests/s"
    if plan.slo:
        yield "SLO", plan_tables.slo_text(plan)
    if plan.min_goodput_frac is not None:
        yield "Goodput, at least", f"{percent(plan.min_goodput_frac)} %"
    if plan.min_quality_frac is not None:
        yield "Quality kept, at least", f"{percent(plan.min_quality_frac)} %"
    if plan.scenario.get("model"):
        yield "Model", str(plan.scenario["model"])
    shape = traffic(plan.scenario, rate=False)
    if shape:
        yield "Traffic", shape
    yield "Options", f"{len(deployable(plan))} can be deployed, {len(refused(plan))} cannot"
    yield "Seeds", ", ".join(map(str, plan.seeds))
    if plan.num_draws:
        yield "Draws of calibration errors", str(plan.num_draws)


def _sections(plan: PlanResult, with_charts: bool) -> Iterator[Section]:
    drawn: dict[str, Any] = {}
    if with_charts:
        from kvsim.reports.figures.plan_charts import plan_charts

        drawn = plan_charts(plan)
    yield from section("ranking", "Ranking", plan_tables.ranking(plan), drawn.get("pareto"), plan_tables.configurations(plan))
    yield from section("deploy", "To deploy", *_flags(plan))
    yield from section("load", "Latency against load", drawn.get("load"), plan_tables.probes(plan))
    yield from section("sensitivity", "What the answer hangs on", drawn.get("sensitivity"), plan_tables.sensitivity(plan))
    yield from section(
        "time-and-memory", "Where time and memory go", drawn.get("time_by_op"), drawn.get("memory"),
        plan_tables.time_shares(plan), plan_tables.ledger(plan),
    )  # fmt: skip
    yield from section("quality", "Quality", plan_tables.quality(plan))
    yield from section("refused", "Options that cannot be deployed", plan_tables.not_deployable(plan))
    yield from section("basis", "What the numbers rest on", plan_tables.basis(plan), _notes(plan))
    seeds = Prose((f"Seeds {', '.join(map(str, plan.seeds))}; {plan.num_draws} draws of calibration errors.",))
    yield from section("provenance", "How to make it again", seeds, *provenance(plan.scenario, plan.versions))


def _flags(plan: PlanResult) -> Iterator[Part]:
    """The first option's command line open, the others' folded; the engine's settings where no command line is known."""
    for rank, option in enumerate(deployable(plan), start=1):
        title = f"{rank}. {option.name}"
        if option.replicas and option.replicas > 1:
            title += f", on each of {option.replicas} replicas"
        if option.flags:
            yield Code(title, command_line(option.flags), folded=rank > 1)
        elif option.engine:
            shown = json.dumps(option.engine, indent=2, sort_keys=True, ensure_ascii=False)
            yield Code(f"{title} (settings: no command line is known for this engine)", shown, folded=rank > 1)


def command_line(flags: tuple[str, ...]) -> str:
    """A line for each option, each but the last continued, as a shell takes it; comments ("# ...") under it."""
    lines: list[str] = []
    for flag in flags:
        if flag.startswith("#"):
            continue
        if lines and not flag.startswith("-"):
            lines[-1] += f" {flag}"
        else:
            lines.append(flag)
    return "\n".join([" \\\n  ".join(lines), *(flag for flag in flags if flag.startswith("#"))])


def _notes(plan: PlanResult) -> Prose | None:
    named: dict[str, list[str]] = {}
    for option in plan.options:
        for note in option.notes:
            named.setdefault(note, []).append(option.name)
    lines = [*plan.notes]
    for note, names in named.items():
        lines.append(f"{_who(names, len(plan.options))}: {note}")
    return Prose(tuple(lines)) if lines else None


def _who(names: list[str], num_options: int) -> str:
    if len(names) == num_options > 1:
        return "All options"
    return ", ".join(names) if len(names) <= MANY else f"{len(names)} of {num_options} options, {names[0]} first"
