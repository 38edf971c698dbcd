"""`page`: a report in, the text of one HTML file out. Every text is escaped; only kvsim's own SVG, CSS and script are not."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvsim.reports.cells import Cell, Table
from kvsim.reports.figures.chart import Chart, Entry, printable
from kvsim.reports.figures.inline import VARIABLES
from kvsim.reports.report import Part, Report, Section

FOLD_ROWS = 24
"""Longer tables are closed until they are opened, or printed."""
LONG_TEXT = 80
"""Characters; columns with longer cells get more room."""
SWATCH_DASHES = {"-": "", "--": "5 3", ":": "1.5 2", "-.": "6 2 1.5 2"}


class InlinePanel(NamedTuple):
    title: str
    svg: Markup


def page(report: Report) -> str:
    """The same text for the same report."""
    return _environment().get_template("page.html").render(
        report=report, style=Markup(_asset("style.css")), script=Markup(_asset("sort.js")), csp=content_policy()
    )


def content_policy() -> str:
    """For browsers: load nothing, and run no script but kvsim's own."""
    digest = base64.b64encode(hashlib.sha256(_asset("sort.js").encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def panels(chart: Chart) -> Iterator[InlinePanel]:
    from kvsim.reports.figures.inline import inline_svg

    for i, panel in enumerate(chart.panels, start=1):
        yield InlinePanel(panel.title, Markup(inline_svg(panel, f"{chart.name}-{i}")))


def rows(section: Section) -> list[list[Part]]:
    """A section's parts; charts of one panel that follow each other stand side by side."""
    groups: list[list[Part]] = []
    for part in section.parts:
        small = isinstance(part, Chart) and len(part.panels) == 1
        before = groups[-1][-1] if groups else None
        if small and isinstance(before, Chart) and len(before.panels) == 1:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def sort_value(cell: Cell) -> str | None:
    """For the attribute that sorting reads; None where the cell says nothing."""
    if isinstance(cell.value, float):
        return f"{cell.value:.12g}" if math.isfinite(cell.value) else None
    return cell.value


def swatch(entry: Entry) -> dict[str, str]:
    """Attributes of a legend's line: colour as one of the page's variables."""
    return {"stroke": f"var({VARIABLES[entry.colour]})", "dash": SWATCH_DASHES[entry.dashes], "kind": entry.kind}


def numeric(table: Table) -> list[bool]:
    return [table.is_numeric(i) for i in range(len(table.columns))]


def long_columns(table: Table) -> list[bool]:
    """Columns that need room, so that their text does not become a ribbon."""
    return [any(len(row[i].text) > LONG_TEXT for row in table.rows) for i in range(len(table.columns))]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kvsim.reports.html"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, finalize=_printable,
    )  # fmt: skip
    environment.globals |= {
        "fold_rows": FOLD_ROWS, "panels": panels, "rows": rows, "sort_value": sort_value, "swatch": swatch, "numeric": numeric,
        "long_columns": long_columns,
        "newline": lambda: Markup("\n"),
    }  # fmt: skip
    environment.filters["lines"] = lambda text: [printable(line) for line in text.splitlines()]
    return environment


def _printable(value: Any) -> Any:
    """Control characters have no place in HTML; line breaks of code are put in by the template."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _asset(name: str) -> str:
    return resources.files("kvsim.reports.html").joinpath(name).read_text(encoding="utf-8")
