"""The report of two runs side by side: its tables, for the terminal and for files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvsim.reports.cells import Cell, Column, Table, csv_text, quantity, text
from kvsim.reports.formats import size_unit, time_unit
from kvsim.reports.pair import GROUPS, Match, Metric, Pair, change_frac, doubts, signed_percent, values, verdict
from kvsim.reports.report import Prose, Report, Section, section
from kvsim.reports.run_report import provenance

if TYPE_CHECKING:
    from rich.console import RenderableType


def differences(pair: Pair) -> Table | None:
    """Fields of the scenarios that are not the same, and versions; policies are matched by name instead."""
    flat = [dict(_flat(run.result.scenario)) | {"seed": run.result.seed} for run in (pair.a, pair.b)]
    for fields, run in zip(flat, (pair.a, pair.b), strict=True):
        fields |= {f"version of {name}": version for name, version in run.result.versions.items()}
    keys = [key for key in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(key) != flat[1].get(key)]
    rows = tuple((text(key), _value(flat[0], key), _value(flat[1], key)) for key in sorted(keys))
    columns = (Column("field"), Column(_side("A", pair.label_a), prose=True), Column(_side("B", pair.label_b), prose=True))
    return Table("differences", "Fields that are not the same", columns, rows) if rows else None


def _side(letter: str, label: str) -> str:
    return f"{letter}: {label}"


def _value(fields: Mapping[str, Any], key: str) -> Cell:
    if key not in fields:
        return text("")
    value = fields[key]
    return text(str(value).lower() if isinstance(value, bool) else "none" if value is None else value)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _flat(item, f"{path}[{i}]")
    else:
        yield path, value


def tables(pair: Pair) -> Iterator[Table]:
    """A table for each group of metrics, three columns for each metric."""
    for title, metrics in GROUPS.items():
        said = [metric for metric in metrics if any(_number(match, metric) for match in pair.matches())]
        columns, picks = [Column("policy")], []
        for metric in said:
            unit, scale = _scale(pair, metric)
            columns += [Column(f"{metric.label} A", unit), Column("B", unit), Column("change", "%")]
            picks.append((metric, scale))
        rows = tuple(
            (text(match.name), *(cell for metric, scale in picks for cell in _cells(match, metric, scale))) for match in pair.matches()
        )
        if said:
            yield Table(title.lower().replace(" ", "-"), title, tuple(columns), rows)


def _number(match: Match, metric: Metric) -> bool:
    """Whether either side has a number other than zero."""
    return any(value is not None and value == value and value != 0 for value in values(match, metric))


def _scale(pair: Pair, metric: Metric) -> tuple[str, float]:
    found = [value for match in pair.matches() for value in values(match, metric) if value is not None]
    return time_unit(found) if metric.kind == "s" else size_unit(found) if metric.kind == "bytes" else (metric.kind, 1.0)


def _cells(match: Match, metric: Metric, scale: float) -> tuple[Cell, Cell, Cell]:
    before, after = values(match, metric)
    change = change_frac(match, metric)
    return quantity(before, scale), quantity(after, scale), text("") if change is None else Cell(signed_percent(change), change)


def parts(pair: Pair) -> Iterator[RenderableType]:
    """For the terminal."""
    from rich.text import Text

    from kvsim.reports.tables import plain_table

    yield Text(f"A  {pair.label_a}: {pair.a.result.title}\nB  {pair.label_b}: {pair.b.result.title}", style="bold")
    found = differences(pair)
    for table in ([found] if found else []) + list(tables(pair)):
        heads = tuple(column.head if column.head == "B" else "\n".join(filter(None, column[:2])) for column in table.columns)
        yield plain_table(table.title, heads, [tuple(cell.text for cell in row) for row in table.rows], right=table is not found)
    if found is None:
        yield Text("\nThe scenarios are the same.")
    for line in doubts(pair):
        yield Text(f"WARNING: {line}", style="yellow")
    yield Text("\n".join(["", *verdict(pair)]), style="bold")


def pair_report(pair: Pair, *, charts: bool = True) -> Report:
    """charts=False: tables alone, without matplotlib."""
    rows = [
        (match.name, metric.name, *values(match, metric), change_frac(match, metric))
        for group in GROUPS.values() for metric in group for match in pair.matches()
    ]  # fmt: skip
    return Report(
        stem="compare",
        what="Two runs side by side",
        title=f"{pair.label_a} and {pair.label_b}",
        facts=(("A", f"{pair.label_a}: {pair.a.result.title}"), ("B", f"{pair.label_b}: {pair.b.result.title}")),
        lead=tuple(verdict(pair)),
        warnings=tuple(doubts(pair)),
        sections=tuple(_sections(pair, charts)),
        csv_files={"compare.csv": csv_text(("policy", "metric", "a", "b", "change_frac"), rows)},
    )


def _sections(pair: Pair, with_charts: bool) -> Iterator[Section]:
    drawn: dict[str, Any] = {}
    if with_charts:
        from kvsim.reports.figures.pair_charts import pair_charts

        drawn = pair_charts(pair)
    same = Prose(("The scenarios, seeds and versions are the same.",))
    yield from section("differences", "What differs", differences(pair) or same)
    yield from section("changes", "What that changes", drawn.get("compare_change"), *tables(pair))
    yield from section("latency", "Latency", drawn.get("compare_latency"))
    for letter, run in (("a", pair.a), ("b", pair.b)):
        title = f"How to make {letter.upper()} again"
        yield from section(f"provenance-{letter}", title, *provenance(run.result.scenario, run.result.versions))
