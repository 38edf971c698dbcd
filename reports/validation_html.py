"""`kvsim validate --out DIR` as one self-contained page: bars, errors by group, scatter and residual plots, every row."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvsim.validation.cases import OUT_OF_MEMORY, Row
from kvsim.validation.run import Report

TEMPLATE = "validation.html.jinja"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's."""
MARKS = "o^sDvP"
MIN_POINTS = 2


class Figure(NamedTuple):
    title: str
    svg: str


class Suite(NamedTuple):
    """What the template shows of one suite: lines are cells as text."""

    name: str
    bars: list[tuple[str, str, str, bool]]
    groups: list[tuple[str, ...]]
    figures: list[Figure]
    rows: list[tuple[str, ...]]


def as_html(report: Report, group_heads: Sequence[str], group_lines: dict[str, list[tuple[str, ...]]]) -> str:
    """The page. group_lines: by suite, the lines of the error table under `group_heads`."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    names = list(dict.fromkeys([*(row.suite for row in report.rows), *(bar.suite for bar in report.bars)]))
    suites = [_suite(report, name, group_lines.get(name, [])) for name in names]
    num_met = sum(bar.met for bar in report.bars)
    return environment.get_template(TEMPLATE).render(
        suites=suites, group_heads=group_heads, num_met=num_met, num_bars=len(report.bars), notes=report.notes, skipped=report.skipped
    )


def _suite(report: Report, name: str, groups: list[tuple[str, ...]]) -> Suite:
    bars = [(bar.text, f"{bar.value:.1%}", f"{bar.limit:.1%}", bar.met) for bar in report.bars if bar.suite == name]
    rows = [row for row in report.rows if row.suite == name]
    figures = [*_figures(name, rows), *(_request_figures(report) if name == "requests" else ())]
    return Suite(name, bars, groups, figures, [_line(row) for row in rows])


def _request_figures(report: Report) -> Iterator[Figure]:
    """A point for each request of a run of one's own."""
    columns = report.per_request
    for metric in [name.removeprefix("measured_") for name in columns if name.startswith("measured_")]:
        pairs = zip(columns[f"measured_{metric}"], columns[f"simulated_{metric}"], strict=True)
        rows = [Row("requests", "requests", "", metric, *pair, "") for pair in pairs if min(pair) > 0]
        if len(rows) >= MIN_POINTS:
            yield Figure(f"requests, one by one: {metric}", _svg("each request", metric, rows))


def _line(row: Row) -> tuple[str, ...]:
    numbers = ("", "") if row.is_relative else (f"{row.truth:,.4g}", "refused" if math.isnan(row.predicted) else f"{row.predicted:,.4g}")
    naive = ", ".join(f"{name} {value / row.truth - 1:+.0%}" for name, value in row.naive.items() if row.truth)
    error = "" if math.isnan(row.predicted) else f"{row.error:+.1%}"
    return row.group, row.case, row.metric, *numbers, error, naive, row.confidence or row.note, row.source


def _figures(suite: str, rows: Sequence[Row]) -> Iterator[Figure]:
    for metric in dict.fromkeys(row.metric for row in rows if row.metric != OUT_OF_MEMORY):
        drawn = [
            row
            for row in rows
            if row.metric == metric and row.truth > 0 and row.predicted > 0 and math.isfinite(row.predicted) and not row.is_relative
        ]
        if len(drawn) >= MIN_POINTS:
            yield Figure(f"{suite}: {metric}", _svg(suite, metric, drawn))


def _svg(suite: str, metric: str, rows: Sequence[Row]) -> str:
    """Predicted over measured, and the errors over measured; a mark and colour for each group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    # Text stays text; ids differ from figure to figure, as they share a page, and are the same in every run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{suite} {metric}", "font.size": 8}):
        figure, (scatter, residual) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for i, group in enumerate(dict.fromkeys(row.group for row in rows)):
            mine = [row for row in rows if row.group == group]
            truth = [row.truth for row in mine]
            style = {"ls": "", "marker": MARKS[i // len(COLOURS) % len(MARKS)], "ms": 4, "color": COLOURS[i % len(COLOURS)], "alpha": 0.75}
            scatter.loglog(truth, [row.predicted for row in mine], **style, label=group)
            residual.semilogx(truth, [row.error for row in mine], **style)
        ends = scatter.get_xlim()
        scatter.plot(ends, ends, color="#555555", lw=1)
        residual.axhline(0, color="#555555", lw=1)
        residual.yaxis.set_major_formatter(PercentFormatter(1.0))
        scatter.set(xlabel=f"measured {metric}", ylabel=f"predicted {metric}")
        residual.set(xlabel=f"measured {metric}", ylabel="predicted / measured - 1")
        handles, labels = scatter.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=6, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Without what belongs to a file of its own: headers, metadata, and names of groups, which repeat on a page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*"', "<g", svg)
