"""The file of measured rows: read with checks, written atomically, so that an interrupted run resumes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from kvsim.calibrate.bench import Task
from kvsim.errors import InputError

SCHEMA_VERSION = 1
FILE_NAME = "measure.json"
SAVE_EVERY_S = 2.0
TIMES = ("p20_us", "p50_us", "p80_us", "repeats", "calls_per_sample", "us_per_node")
WORK = ("bytes_moved", "flops", "gb_per_s", "tflop_per_s", "buffers", "working_set_bytes", "cold")
RESULT_FIELDS = frozenset((*TIMES, *WORK, "status", "session"))
"""Everything else in a row is its key: op, dtype, mode and the fields of the shape."""

Row = dict[str, Any]
Key = tuple[tuple[str, Any], ...]


def row_key(row: Row) -> Key:
    return tuple(sorted((name, value) for name, value in row.items() if name not in RESULT_FIELDS))


def task_key(task: Task, mode: str) -> Key:
    return row_key({"op": task.bench.name, "dtype": task.dtype, "mode": mode, **task.shape})


class RowFile:
    """Rows of one device in `directory`/measure.json. `identity` must match the file that is resumed."""

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self.path = directory / FILE_NAME
        self.header: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **identity, "sessions": []}
        self.rows: list[Row] = []
        if self.path.exists():
            self._load(identity)
        self.keys = {row_key(row) for row in self.rows}
        self._saved_at_s = time.monotonic()

    def _load(self, identity: dict[str, Any]) -> None:
        try:
            content = json.loads(self.path.read_text())
            header, rows = content["header"], content["rows"]
            found = {name: header[name] for name in ("schema_version", *identity, "sessions")}
            for row in rows:
                if not isinstance(row["status"], str) or not {"op", "dtype", "mode"} <= row.keys():
                    raise ValueError("a row lacks op, dtype, mode or status")
            if len({row_key(row) for row in rows}) != len(rows):
                raise ValueError("two rows have the same key")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise self._refusal(None, f"must be a file that measure wrote ({detail})") from error
        for name, expected in {"schema_version": SCHEMA_VERSION, **identity}.items():
            if found[name] != expected:
                raise self._refusal(found[name], f"must be {expected!r} to be resumed here", name)
        self.header, self.rows = header, rows

    def _refusal(self, value: object, rule: str, name: str = "") -> InputError:
        field = f"{self.path}:{name}" if name else str(self.path)
        return InputError(field, value, rule, "move the file away or give another --out")

    def start_session(self, facts: dict[str, Any]) -> int:
        """Note software, date and command of this run; rows name their session by its number."""
        self.header["sessions"].append(facts)
        return len(self.header["sessions"]) - 1

    def drop(self, status_prefix: str) -> None:
        """Forget rows with such a status, so that they are measured again."""
        self.rows = [row for row in self.rows if not row["status"].startswith(status_prefix)]
        self.keys = {row_key(row) for row in self.rows}

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.keys.add(row_key(row))
        if time.monotonic() - self._saved_at_s >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Replace the file in one step: a reader or a crash never sees half of it."""
        text = json.dumps({"header": self.header, "rows": self.rows}, indent=None, allow_nan=False)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        partial.write_text(text.replace('}, {"op"', '},\n{"op"') + "\n")
        os.replace(partial, self.path)
        self._saved_at_s = time.monotonic()
