"""The row per request that `kvsim run --out` writes (`files.py`), read back into logs."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvsim.errors import InputError
from kvsim.recording import REQUEST_FIELDS, RunLog
from kvsim.units import PS_PER_S

FIX = "run `kvsim run --out` again"
_NAMES = tuple(f"{name.removesuffix('_ps')}_s" if name.endswith("_ps") else name for name in REQUEST_FIELDS)
"""The columns that a log is made of; the others follow from them."""
_MAX_PS = 2**63 - 1


def read_requests(path: Path, policies: tuple[str, ...]) -> dict[str, RunLog]:
    """By policy; raises InputError for other columns, unknown policies and cells that are no times or counts."""
    logs = {name: RunLog() for name in policies}
    try:
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _csv_rows(path)
        for where, policy, cells in rows:
            try:
                logs[policy].requests.extend(array("q", cells))
            except KeyError:
                raise InputError(f"{path.name}, {where}: policy", policy, "is not one of summary.json", FIX) from None
    except UnicodeDecodeError:
        raise InputError(path.name, None, "is not UTF-8 text", FIX) from None
    return logs


def _csv_rows(path: Path) -> Iterator[tuple[str, str, Iterable[int]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        heads = next(reader, [])
        places = _places(path, heads)
        for row in reader:
            try:
                cells = [_picoseconds(row[at]) if is_time else int(row[at]) for at, is_time in places]
                if not all(0 <= cell <= _MAX_PS for cell in cells):
                    raise ValueError
            except (ValueError, IndexError):
                raise InputError(f"{path.name}, line {reader.line_num}", None, "is not a row of requests", FIX) from None
            yield f"line {reader.line_num}", row[heads.index("policy")], cells


def _picoseconds(text: str) -> int:
    """Exact: the file has twelve decimals."""
    whole, _, decimals = text.partition(".")
    if len(decimals) > 12:
        raise ValueError(text)
    return int(whole) * PS_PER_S + int(decimals.ljust(12, "0"))


def _parquet_rows(path: Path) -> Iterator[tuple[str, str, Iterable[int]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        rule = "needs pyarrow, which is not installed"
        raise InputError(path.name, None, rule, "pip install 'kvsim[parquet]', or run again with --requests-format csv") from None
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(path.name, None, f"is not a Parquet file ({str(error).splitlines()[0]})", FIX) from None
    _places(path, table.column_names)
    columns: list[Any] = [table.column(name).to_pylist() for name in ("policy", *_NAMES)]
    times = [name.endswith("_s") for name in _NAMES]
    for number, (policy, *cells) in enumerate(zip(*columns, strict=True), start=1):
        try:
            found = [round(cell * PS_PER_S) if is_time else int(cell) for cell, is_time in zip(cells, times, strict=True)]
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{path.name}, row {number}", None, "is not a row of requests", FIX) from None
        yield f"row {number}", policy, found


def _places(path: Path, heads: list[str]) -> list[tuple[int, bool]]:
    """Where each of _NAMES stands, and whether it is a time."""
    missing = [name for name in ("policy", *_NAMES) if name not in heads]
    if missing:
        raise InputError(path.name, None, f"has no column {missing[0]}", FIX)
    return [(heads.index(name), name.endswith("_s")) for name in _NAMES]
