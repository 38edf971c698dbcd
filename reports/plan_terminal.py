"""A plan on a terminal or in a pipe: options by rank, what binds them, what they rest on, and those that are out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from kvsim.planning.result import Option, PlanResult
from kvsim.reports.console import PIPE_WIDTH, print_parts, text_of
from kvsim.reports.formats import number, percent
from kvsim.reports.tables import plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType

Columns = Sequence[tuple[str, Callable[[Option], str]]]


def print_plan(result: PlanResult, file: TextIO | None = None) -> None:
    print_parts(plan_parts(result), sys.stdout if file is None else file)


def plan_text(result: PlanResult, width: int = PIPE_WIDTH) -> str:
    """The tables as text without colour or trailing blanks."""
    return text_of(plan_parts(result), width)


def plan_parts(result: PlanResult) -> Iterable[RenderableType]:
    from rich.text import Text

    from kvsim.serving import NO_LINK

    yield Text(result.title, style="bold")
    usable = [option for option in result.options if option.reason is None]
    if usable:
        yield _table("Options, best first", usable, cost_columns(result))
        yield _table("One replica at its highest rate within the SLO", usable, rate_columns(result))
        yield from _sensitivity(usable)
    out = [option for option in result.options if option.reason is not None]
    if out:
        yield plain_table("Cannot be deployed", ("option", "reason"), [(option.name, option.reason or "") for option in out])
    yield Text("")
    for note in result.notes:
        yield Text(f"Note: {note}")
    over_pcie = [option.name for option in usable if any(note.startswith(NO_LINK) for note in option.notes)]
    if over_pcie:
        yield Text(f"Note: {NO_LINK} in {', '.join(over_pcie)}: all-reduces differ by ten times between machines, see what kvsim run says")
    yield Text("\n" + "\n".join(result.summary), style="bold")


def cost_columns(result: PlanResult) -> Columns:
    """What the target load takes."""
    columns: list[tuple[str, Callable[[Option], str]]] = [
        ("replicas", lambda o: f"{o.replicas:,}"),
        ("GPUs", lambda o: f"{o.num_gpus:,}"),
        ("head-\nroom %", lambda o: percent(o.headroom_frac)),
    ]
    if result.currency is not None:
        columns.append((f"{result.currency}\n/hour", lambda o: number(o.cost_per_hour)))
        columns.append((f"{result.currency}/M\nout tok", lambda o: number(o.cost_per_million_output_tokens)))
    columns.append(("GPU-h/M\nout tok", lambda o: number(o.gpu_hours_per_million_output_tokens)))
    columns.append(("kWh/M\nout tok", lambda o: number(o.kwh_per_million_output_tokens)))
    if any(option.quality is not None for option in result.options):
        columns.append(("published\nquality %", lambda o: "-" if o.quality is None else percent(o.quality.retained_frac)))
    return columns


def rate_columns(result: PlanResult) -> Columns:
    """What one replica bears, and what stops it there."""
    columns: list[tuple[str, Callable[[Option], str]]] = [
        ("meets\nreq/s", lambda o: number(o.rate_per_s)),
        ("misses\nreq/s", lambda o: number(o.failing_rate_per_s)),
    ]
    if result.num_draws:
        columns.append(("robust\nreq/s", lambda o: number(o.robust_rate_per_s)))
    columns += [
        ("output\ntok/s", lambda o: number(o.output_tokens_per_s)),
        ("batch", lambda o: number(_at_rate(o).mean_batch)),
        ("peak KV\n% of pool", lambda o: percent(_at_rate(o).peak_pool_frac)),
    ]
    for key in result.slo:
        columns.append((f"{key}\n<= {result.slo[key]:g}", lambda o, key=key: number(_at_rate(o).latency_s.get(key))))  # type: ignore[misc]
    columns.append(("binds", lambda o: (o.binds or "").replace("_", "\n")))
    return columns


def _at_rate(option: Option):  # type: ignore[no-untyped-def]
    return next(probe for probe in option.probes if probe.rate_per_s == option.rate_per_s)


def _table(title: str, options: Sequence[Option], columns: Columns) -> RenderableType:
    rows = [(option.name, *(cell(option) for _, cell in columns)) for option in options]
    return plain_table(title, ("option", *(head for head, _ in columns)), rows, right=True)


def _sensitivity(options: Sequence[Option]) -> Iterable[RenderableType]:
    for option in options:
        if not option.sensitivity:
            continue
        rows = [
            (row.name, row.low_input, number(row.rate_at_low_per_s), row.high_input, number(row.rate_at_high_per_s))
            for row in option.sensitivity
        ]
        title = f"What the rate of {option.name} rests on: {number(option.rate_per_s)} requests/s, one input changed at a time"
        yield plain_table(title, ("input", "low", "req/s", "high", "req/s"), rows, right=True)
