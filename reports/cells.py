"""Tables as data: columns with units, cells with a text and the value it stands for. HTML, Markdown and CSV are made of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvsim.reports.formats import factor, number, share


class Column(NamedTuple):
    """unit: "" where there is none. prose: text that may wrap. note: what the head means."""

    head: str
    unit: str = ""
    prose: bool = False
    note: str = ""


class Cell(NamedTuple):
    """value: what sorting goes by; None sorts last. A number makes the cell a number, aligned to the right."""

    text: str
    value: float | str | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """name: an id within the report. The first column names the row."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    kind: str = field(default="table", init=False)

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name

    def is_numeric(self, column: int) -> bool:
        """Whether every cell that says anything is a number; never the first column, which names the row."""
        values = [row[column].value for row in self.rows if row[column].value is not None]
        return column > 0 and bool(values) and all(isinstance(value, float) for value in values)


MISSING = Cell("-")


def text(value: object, strong: bool = False) -> Cell:
    shown = "" if value is None else str(value)
    return Cell(shown, shown.lower(), strong) if shown else MISSING


def quantity(value: float | None, scale: float = 1.0, mark: str = "") -> Cell:
    """In units of `scale`; mark: a sign behind the number."""
    if value is None or not math.isfinite(value):
        return MISSING
    return Cell(number(value / scale) + mark, float(value))


def count(value: int | None) -> Cell:
    return MISSING if value is None else Cell(f"{value:,}", float(value))


def times(value: float | None, mark: str = "") -> Cell:
    """A factor."""
    return MISSING if value is None or not math.isfinite(value) else Cell(factor(value) + mark, float(value))


def portion(value_frac: float | None) -> Cell:
    """In percent; the unit stands in the head."""
    return MISSING if value_frac is None or not math.isfinite(value_frac) else Cell(share(value_frac), float(value_frac))


def head_of(column: Column) -> str:
    return f"{column.head}, {column.unit}" if column.unit else column.head


def markdown_table(table: Table) -> str:
    """GitHub's flavour; numbers to the right."""
    rule = ["---:" if table.is_numeric(i) else "---" for i in range(len(table.columns))]
    lines = [[markdown_text(head_of(c)) for c in table.columns], rule]
    lines += [[markdown_text(cell.text) for cell in row] for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown_text(value: str) -> str:
    """Literal in Markdown: no tables, tags, links, emphasis or code of the text's own."""
    flat = " ".join(value.split())
    return "".join("\\" + char if char in "\\|<>[]*`~" else char for char in flat)


def csv_text(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Empty where there is no value; numbers as Python writes them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(["" if cell is None or cell != cell else cell for cell in row] for row in rows)
    return out.getvalue()
