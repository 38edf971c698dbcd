"""What `kvsim validate` prints and writes: errors by group beside naive models, bars met and missed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, TextIO

from kvsim.reports.console import print_parts
from kvsim.reports.tables import plain_table
from kvsim.validation.cases import Row
from kvsim.validation.run import Report

if TYPE_CHECKING:
    from rich.console import RenderableType

HEADS = ("group", "metric", "rows", "mean error", "median", "90 % below", "bias", "naive mean")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's."""


def group_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each group and metric, in order of appearance."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.group, row.metric), []).append(row)
    return [(f"{suite} {group}", metric, *_errors(found)) for (suite, group, metric), found in groups.items()]


def _errors(rows: Sequence[Row]) -> tuple[str, ...]:
    errors = [row.error for row in rows if not math.isnan(row.predicted)]
    refused = len(rows) - len(errors)
    count = f"{len(rows)}" + (f" ({refused} refused)" if refused else "")
    if not errors:
        return count, "-", "-", "-", "-", "-"
    sizes = sorted(abs(error) for error in errors)
    naive = [abs(value / row.truth - 1) for row in rows for value in row.naive.values()]
    p90 = sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)]
    return (
        count, f"{mean(sizes):.1%}", f"{median(sizes):.1%}", f"{p90:.1%}", f"{mean(errors):+.1%}",
        f"{mean(naive):.1%}" if naive else "-",
    )  # fmt: skip


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
    """validation.json, rows.csv, tables.md and a scatter plot a suite; each file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (("validation.json", as_json(report)), ("tables.md", as_markdown(report)), ("rows.csv", _csv(report.rows))):
        path = folder / name
        partial = path.with_name(f"{name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        written.append(path)
    return written + _plots(report, folder)


def _csv(rows: Sequence[Row]) -> str:
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("suite", "group", "case", "metric", "measured", "predicted", "error", "source"))
    for row in rows:
        writer.writerow((
            row.suite, row.group, row.case, row.metric, f"{row.truth:.6g}", f"{row.predicted:.6g}", f"{row.error:.4f}", row.source
        ))  # fmt: skip
    return out.getvalue()


def _plots(report: Report, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    kinds = {(row.suite, row.metric) for row in report.rows if row.suite in ("silicon", "published")}
    for suite, metric in sorted(kinds):
        rows = [row for row in report.rows if (row.suite, row.metric) == (suite, metric) and not math.isnan(row.predicted)]
        figure, axes = plt.subplots(figsize=(7.5, 6), layout="constrained")
        for i, group in enumerate(dict.fromkeys(row.group for row in rows)):
            mine = [row for row in rows if row.group == group]
            axes.loglog(
                [row.truth for row in mine], [row.predicted for row in mine], "o^sDv"[i // len(COLOURS) % 5], ms=4,
                color=COLOURS[i % len(COLOURS)], label=group,
            )  # fmt: skip
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="#666666", lw=1)
        axes.set(xlabel=f"measured {metric}", ylabel=f"predicted {metric}", title=f"{suite}: {metric}")
        axes.legend(fontsize=6, loc="upper left")
        path = folder / f"{suite}_{metric}.png"
        partial = path.with_suffix(".partial.png")
        figure.savefig(partial, dpi=110)
        plt.close(figure)
        partial.replace(path)
        written.append(path)
    return written
