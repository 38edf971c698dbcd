"""rows.jsonl: a header line, then a line for every measurement, flushed as it is made. What was written is never lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kvsim.calibrate.device.op_json import compact, op_from_json
from kvsim.errors import InputError

FILE_NAME = "rows.jsonl"
SCHEMA = 1
OK, PROBE = "ok", "probe"
"""PROBE: the same product again and again, which tells whether the device kept its speed."""
Row = dict[str, Any]


class RowFile:
    """The rows of one device. identity: what must agree before a file is continued; notes: what the first session found out.

    A last line that a crash cut short is dropped and its point measured again. Anything else that is wrong is an InputError,
    and the file stays as it is.
    """

    def __init__(self, folder: Path, identity: Row | None = None, notes: Row | None = None) -> None:
        self.path = folder / FILE_NAME
        self.header: Row = {"schema": SCHEMA, **(identity or {}), **(notes or {})}
        self.rows: list[Row] = []
        if self.path.exists():
            self._load(identity or {})
        elif identity is None:
            raise InputError("--out", str(folder), f"must hold {FILE_NAME} to be fitted again", "measure first")
        self.keys = {row["key"] for row in self.rows if row["status"] != PROBE}
        self._file: BinaryIO | None = None

    def _load(self, identity: Row) -> None:
        data = self.path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        lines = whole.split(b"\n")
        try:
            self.header = json.loads(lines[0])
            if self.header["schema"] != SCHEMA:
                raise ValueError(f"schema {self.header['schema']}, not {SCHEMA}")
            self.rows = [_checked(json.loads(line)) for line in lines[1:]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            number = len(self.rows) + 1
            raise self._refusal(None, f"must be a file that kvsim calibrate device wrote (line {number} on: {what})") from error
        for name, expected in identity.items():
            if self.header.get(name) != expected:
                raise self._refusal(self.header.get(name), f"must be {expected!r} to go on here", name)
        if torn:
            with self.path.open("r+b") as file:
                file.truncate(len(whole) + 1)

    def _refusal(self, value: object, rule: str, name: str = "") -> InputError:
        return InputError(f"{self.path}:{name}" if name else str(self.path), value, rule, "move the file away or give another --out")

    def add(self, row: Row) -> None:
        """Appends one line; it is with the operating system when this returns."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            self._file = self.path.open("ab")
            if new:
                self._write(self.header)
        self._write(row)
        self.rows.append(row)
        if row["status"] != PROBE:
            self.keys.add(row["key"])

    def _write(self, content: Row) -> None:
        assert self._file is not None
        self._file.write(compact(content).encode() + b"\n")
        self._file.flush()

    def drop_failed(self) -> None:
        """Forgets rows that failed or were skipped, so that they are measured again; the file is replaced in one step."""
        self.rows = [row for row in self.rows if row["status"] in (OK, PROBE)]
        self.keys = {row["key"] for row in self.rows if row["status"] != PROBE}
        if self.path.exists():
            partial = self.path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
            partial.write_text("".join(compact(line) + "\n" for line in (self.header, *self.rows)))
            os.replace(partial, self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def measured(self, work: str | None = None) -> Iterator[Row]:
        """Rows with a time, of one kind of work or of all."""
        return (row for row in self.rows if row["status"] == OK and work in (None, row["work"]))


def _checked(row: Row) -> Row:
    if not isinstance(row["status"], str) or not isinstance(row["key"], str):
        raise ValueError("a row lacks key or status")
    if row["status"] == OK:
        op_from_json(row["op"])
        if not row["seconds"] > 0.0:
            raise ValueError(f"{row['seconds']} seconds")
    return row
