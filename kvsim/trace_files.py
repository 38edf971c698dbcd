"""Files of requests read row by row, never whole in memory: CSV with a header or JSON lines, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from kvsim.errors import InputError
from kvsim.trace_formats import FORMATS, Broken, BrokenValue, Row, whole

Record = tuple[int, tuple[Any, ...] | Broken]
"""Line number, and the raw values of the wanted columns."""


def read_rows(path: str, base_dir: Path, format_name: str) -> Iterator[Row | Broken]:
    """The rows of a trace in the file's order. Raises InputError if the file as a whole is not of this format."""
    form = FORMATS[format_name]
    with _opened("workload.trace.path", path, base_dir) as file:
        line, text, names = _header("workload.trace.path", path, file)
        if form.json != (text[0] == "{") or not set(form.needed) <= set(names):
            raise _wrong_format(format_name, names, text[0] == "{")
        records = _json_lines(text, file, line, form.columns) if form.json else _table(file, line, names, form.columns)
        for number, record in records:
            yield record if isinstance(record, Broken) else form.parse(number, record)


def read_lengths(path: str, base_dir: Path) -> Iterator[tuple[int, int]]:
    """(prompt, output) tokens of a CSV file with those columns; at least one row, all of them usable, or InputError."""
    field, wanted = "workload.lengths.path", ("prompt_tokens", "output_tokens")
    empty = True
    with _opened(field, path, base_dir) as file:
        line, text, names = _header(field, path, file)
        if text[0] == "{" or not set(wanted) <= set(names):
            rule = f"must be a CSV file with columns {', '.join(wanted)}; found {_listed(names)}"
            raise InputError(field, path, rule, "rename the columns, or give the file as workload.trace")
        for number, record in _table(file, line, names, wanted):
            try:
                if isinstance(record, Broken):
                    raise BrokenValue(record.column, record.value, record.rule)
                yield whole(wanted[0], record[0]), whole(wanted[1], record[1])
            except BrokenValue as error:
                raise row_error(path, Broken(number, *error.args), "correct or remove the row") from None
            empty = False
    if empty:
        raise InputError(field, path, "must have at least one row below its header", "check the file")


def row_error(path: str, broken: Broken, fix: str) -> InputError:
    value = float(broken.value) if isinstance(broken.value, Decimal) else broken.value
    return InputError(f"{path}:{broken.line} {broken.column}", "nothing" if value is None else value, broken.rule, fix)


def _wrong_format(format_name: str, names: list[str], is_json: bool) -> InputError:
    form = FORMATS[format_name]
    fits = [name for name, other in FORMATS.items() if other.json == is_json and set(other.needed) <= set(names)]
    container = "JSON lines with keys" if form.json else "a CSV file with columns"
    return InputError(
        "workload.trace.format",
        format_name,
        f"must be {container} {', '.join(form.needed)}; found {_listed(names)}",
        f"try format: {fits[0]}" if fits else "rename the columns, or use another trace",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(name if len(name) <= 40 else name[:39] + "…" for name in names[:12])
    return shown + (", …" if len(names) > 12 else "") or "none"


@contextmanager
def _opened(field: str, path: str, base_dir: Path) -> Iterator[TextIO]:
    """The file as text, gunzipped if need be; what goes wrong with the file becomes an InputError of ``field``."""
    full = base_dir / Path(path).expanduser()
    try:
        with full.open("rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
        opener: Any = gzip.open if gzipped else open
        with opener(full, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError:
        fix = "a relative path starts from the scenario's folder"
        raise InputError(field, path, f"must be a file; nothing at {full}", fix) from None
    except UnicodeDecodeError as error:
        raise InputError(field, path, f"must be UTF-8 text ({error.reason})", "convert it to UTF-8") from None
    except csv.Error as error:
        fix = "check its quotes and header; very long rows fit into jsonl"
        raise InputError(field, path, f"must be a CSV file ({error})", fix) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(field, path, f"must be a readable file ({reason})", "check it, or copy it again") from None


def _header(field: str, path: str, file: TextIO) -> tuple[int, str, list[str]]:
    """Number and text of the first line that is not blank, and the column names or keys in it."""
    for number, line in enumerate(file, 1):
        text = line.strip()
        if text.startswith("{"):
            try:
                return number, text, list(json.loads(text))
            except (ValueError, RecursionError):
                broken = Broken(number, "row", text, "must be a JSON object on one line")
                raise row_error(path, broken, "correct the row") from None
        if text:
            return number, text, [name.strip() for name in next(csv.reader([text]))]
    raise InputError(field, path, "must have at least one row", "the file is empty; check the path")


def _table(file: TextIO, header_line: int, names: list[str], wanted: tuple[str, ...]) -> Iterator[Record]:
    twice = sorted({name for name in wanted if names.count(name) > 1})
    if twice:
        raise csv.Error(f"line {header_line}: column {twice[0]} appears twice")
    places = [names.index(name) if name in names else -1 for name in wanted]
    width = len(names)
    rows = csv.reader(file, skipinitialspace=True, strict=True)
    begins = header_line + 1
    try:
        for row in rows:
            ends, num_values = header_line + rows.line_num, len(row)
            if num_values == width:
                row.append("")  # found at place -1, of an optional column that this file does not have
                row = [row[place] for place in places]
            if ends > begins and any("\n" in value for value in row):  # else one bad quote would swallow good rows
                raise csv.Error("a quote that is not closed")
            if num_values == width:
                yield ends, tuple(row)
            elif any(map(str.strip, row)):
                yield ends, Broken(ends, "row", ",".join(row), f"must have {width} values, has {num_values}")
            begins = ends + 1
    except csv.Error as error:
        raise csv.Error(f"line {begins}: {error}") from None


def _json_lines(first: str, file: TextIO, first_line: int, wanted: tuple[str, ...]) -> Iterator[Record]:
    for number, line in enumerate(chain([first], file), first_line):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_float=Decimal)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield number, tuple(map(record.get, wanted))
        else:
            yield number, Broken(number, "row", line.strip(), "must be a JSON object on one line")
