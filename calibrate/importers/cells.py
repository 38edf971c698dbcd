"""Text files of measurements: their rows, and cells as numbers, with a reason for each that is none."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path

from kvsim.calibrate.rows import Import, Rejected
from kvsim.errors import InputError

Cells = Mapping[str, str]
"""A row: text by column."""
LARGEST = 10**15
"""More bytes, tokens or heads than anything measured: a slip of the keyboard."""


class LeftOut(Rejected):
    """A row that was not timed or is no Op of ours: unlike an impossible one, it casts no doubt on the rest of its table."""

    __slots__ = ()


def csv_rows(field: str, path: Path, found: Import | None) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells by column) of a CSV in UTF-8, # comments and blank lines left out.

    Rows of more cells than the header go to found.rejected: a decimal comma has moved their columns. Raises InputError, naming
    `field`, for a file that cannot be read or has no rows.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(field, str(path), f"must be a text file that can be read ({reason})") from error
    kept = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if len(kept) < 2:
        raise InputError(field, str(path), "must hold a header and rows")
    try:
        header, *table = _split(kept)
    except csv.Error as error:
        raise InputError(field, str(path), f"must be a CSV ({error})") from error
    names = [name.strip() for name in header[1]]
    for name in names:
        if name and names.count(name) > 1:
            raise InputError(field, str(path), f"must name every column once; {name} is there twice")
    for number, cells in table:
        if len(cells) <= len(names):
            full = [*cells, *[""] * (len(names) - len(cells))]
            yield number, {name: cell.strip() for name, cell in zip(names, full, strict=True) if name}
        elif found is not None:
            found.rejected.append(LeftOut(f"{path.name}:{number}", f"has {len(cells)} cells where the header has {len(names)}"))


def _split(kept: list[tuple[int, str]]) -> list[tuple[int, list[str]]]:
    reader = csv.reader(line for _, line in kept)
    table, start = [], 0
    for cells in reader:  # a quoted cell may run over several lines
        table.append((kept[start][0], cells))
        start = reader.line_num
    return table


def positive(cells: Cells, name: str) -> float:
    """A cell as a number above 0; KeyError where the column is absent, ValueError where the cell holds none."""
    value = _number(cells, name)
    if not 0 < value < inf:
        raise ValueError(f"{name} is {cells[name]}, which must be above 0")
    return value


def _number(cells: Cells, name: str) -> float:
    try:
        return float(cells[name])
    except ValueError:
        raise ValueError(f"{name} is {cells[name] or 'empty'}, which must be a number") from None


def whole(cells: Cells, name: str, *, default: int | None = None, least: int = 1) -> int:
    """A cell as a whole number of at least `least`; default: for an absent column or a blank cell."""
    if default is not None and not cells.get(name):
        return default
    value = _number(cells, name)
    if not (least <= value < LARGEST and value == int(value)):
        raise ValueError(f"{name} is {cells[name]}, which must be a whole number of at least {least}")
    return int(value)
