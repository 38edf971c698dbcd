"""What `kvsim validate` prints and writes: errors by group beside naive models, bars met and missed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, TextIO

from kvsim.reports.console import print_parts
from kvsim.reports.tables import plain_table
from kvsim.reports.validation_html import as_html
from kvsim.validation.cases import Row
from kvsim.validation.naive import BYTES, ROOFLINE
from kvsim.validation.run import Report

if TYPE_CHECKING:
    from rich.console import RenderableType

HEADS = ("group", "metric", "rows", "mean error", "median", "90 % below", "bias", "roofline", "byte ratio")


def group_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each group and metric, in order of appearance."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        metric = f"{row.metric}: {row.case}" if row.is_relative else row.metric
        groups.setdefault((row.suite, row.group, metric), []).append(row)
    return [(f"{suite} {group}", metric, *_errors(found)) for (suite, group, metric), found in groups.items()]


def _errors(rows: Sequence[Row]) -> tuple[str, ...]:
    errors = [row.error for row in rows if not math.isnan(row.predicted)]
    refused = len(rows) - len(errors)
    count = f"{len(rows)}" + (f" ({refused} refused)" if refused else "")
    if not errors:
        return count, "-", "-", "-", "-", "-", "-"
    sizes = sorted(abs(error) for error in errors)
    p90 = sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)]
    return (
        count, f"{mean(sizes):.1%}", f"{median(sizes):.1%}", f"{p90:.1%}", f"{mean(errors):+.1%}",
        *(_naive(rows, name) for name in (ROOFLINE, BYTES)),
    )  # fmt: skip


def _naive(rows: Sequence[Row], name: str) -> str:
    """Mean error of a naive model over the rows for which it has an answer."""
    found = [abs(value / row.truth - 1) for row in rows if row.truth for model, value in row.naive.items() if model.startswith(name)]
    return f"{mean(found):.1%}" if found else "-"


def bar_lines(report: Report) -> list[tuple[str, ...]]:
    return [(bar.suite, bar.text, f"{bar.value:.1%}", f"{bar.limit:.1%}", "met" if bar.met else "MISSED") for bar in report.bars]


def parts(report: Report) -> Iterator[RenderableType]:
    from rich.text import Text

    if report.rows:
        yield plain_table("Predicted against measured", HEADS, group_lines(report.rows))
    yield from _side_by_side(report)
    if report.bars:
        yield plain_table("Bars", ("suite", "what", "error", "limit", ""), bar_lines(report))
    if report.notes:
        yield Text("\n" + "\n".join(report.notes))
    for text in report.skipped:
        yield Text(f"not run: {text}")
    for row in report.rows:
        if row.note:
            yield Text(f"refused: {row.group} {row.case}: {row.note}")


def _side_by_side(report: Report) -> Iterator[RenderableType]:
    """Numbers of single runs; of suites with hundreds of rows the errors above must do."""
    rows = [row for row in report.rows if row.suite == "requests"]
    for group in dict.fromkeys(row.group for row in rows):
        lines = [
            (row.metric, row.case, *(("", "") if row.is_relative else (f"{row.truth:,.4g}", f"{row.predicted:,.4g}")), f"{row.error:+.2%}")
            for row in rows
            if row.group == group
        ]  # fmt: skip
        yield plain_table(f"{group}, side by side", ("metric", "what", "measured", "simulated", "error"), lines)


def print_validation(report: Report, file: TextIO) -> None:
    print_parts(parts(report), file)


def as_json(report: Report) -> str:
    """Rows, bars and what was not run; numbers that are none are null."""
    rows = [{**asdict(row), "predicted": _finite(row.predicted)} for row in report.rows]
    bars = [{**asdict(bar), "value": _finite(bar.value), "met": bar.met} for bar in report.bars]
    return json.dumps({"rows": rows, "bars": bars, "not_run": report.skipped, "notes": report.notes}, indent=1, allow_nan=False) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_markdown(report: Report) -> str:
    """The tables, for docs/validation.md."""

    def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
        cells = [" | ".join(line) for line in lines]
        return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {line} |" for line in cells)])

    bars = table(("suite", "what", "error", "limit", ""), bar_lines(report))
    return f"{bars}\n\n{table(HEADS, group_lines(report.rows))}\n"


def write_validation(report: Report, folder: Path) -> list[Path]:
    """validation.json, rows.csv, tables.md, validation.html, which holds the plots, and requests.csv of a run of one's own.

    Each file appears whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    by_suite = {suite: group_lines([row for row in report.rows if row.suite == suite]) for suite in {row.suite for row in report.rows}}
    texts = {
        "validation.json": as_json(report), "tables.md": as_markdown(report), "rows.csv": _csv(report.rows),
        "validation.html": as_html(report, HEADS, by_suite),
    }  # fmt: skip
    if report.per_request:
        texts["requests.csv"] = _requests_csv(report.per_request)
    for name, text in texts.items():
        path = folder / name
        partial = path.with_name(f"{name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        written.append(path)
    return written


def _csv(rows: Sequence[Row]) -> str:
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = ("suite", "group", "case", "metric", "measured", "predicted", "error", "roofline", "byte_ratio", "confidence", "source")
    writer.writerow(heads)
    for row in rows:
        writer.writerow((
            row.suite, row.group, row.case, row.metric, f"{row.truth:.6g}", f"{row.predicted:.6g}", f"{row.error:.4f}",
            *(next((f"{value:.6g}" for model, value in row.naive.items() if model.startswith(name)), "") for name in (ROOFLINE, BYTES)),
            row.confidence, row.source,
        ))  # fmt: skip
    return out.getvalue()


def _requests_csv(columns: Mapping[str, Sequence[float]]) -> str:
    """A row for each request, in order of start."""
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{value:.9g}" for value in row] for row in zip(*columns.values(), strict=True))
    return out.getvalue()
