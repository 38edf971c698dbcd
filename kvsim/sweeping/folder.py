"""A sweep's folder: what it was asked, the cases that are done, and the table made of both.

    sweep.json              the sweep file as it was resolved, and versions
    cases/part-*.parquet    finished cases, a row each, by id: what a resumed sweep goes on from
    results.parquet         one row per case of the sweep file, in order

Every file is written under a temporary name, flushed to disk and renamed: whenever the process is killed, a part is there as a
whole or not at all. Equal sweeps give equal bytes of results.parquet: no dates, no machine names.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvsim.api import versions
from kvsim.errors import InputError, KvsimError
from kvsim.sweeping.cases import Plan
from kvsim.sweeping.rows import COLUMNS, FAULTS
from kvsim.sweeping.table import journal_table, result_rows, result_table

SCHEMA_VERSION = 1
MANIFEST, CASES, RESULTS, LOCK = "sweep.json", "cases", "results.parquet", ".lock"
SAVE_S = 1.0
"""Rows are saved this often: what a kill costs at most, beside the cases under way."""
_MERGED_PARTS = 200
"""So many small parts are made one: a day of saving every second would leave 86,400 files."""

Row = dict[str, Any]


class SweepFolder:
    """Open for writing by one process at a time. Use as a context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.done: dict[str, Row] = {}
        """Rows by case id, of this sweep file and of others that were run into the folder."""
        self._unsaved: list[Row] = []
        self._saved_at_s = time.monotonic()
        self._small_parts: list[Path] = []
        self._lock: Any = None

    def __enter__(self) -> SweepFolder:
        """Makes the folder. Raises InputError where it cannot be written, holds other things, or is in use."""
        check_parquet()
        from filelock import FileLock, Timeout

        try:
            (self.path / CASES).mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError("--out", str(self.path), "is in use by another sweep", "wait for it, or choose another folder") from None
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def open(self, plan: Plan, retry: bool) -> bool:
        """Reads what is done and notes what is to be done; whether the folder held another sweep file's cases before.

        retry: cases that failed through no fault of the user count as not done. Raises InputError for results of other versions.
        """
        manifest = _manifest(plan)
        before = read_manifest(self.path)
        if before is not None and before["versions"] != manifest["versions"]:
            changes = [f"{name} {before['versions'].get(name)}" for name, version in manifest["versions"].items()
                       if before["versions"].get(name) != version]  # fmt: skip
            rule = f"holds results of other versions ({', '.join(changes)})"
            raise InputError("--out", str(self.path), rule, "choose another folder, or delete that one")
        self.done = {row["id"]: row for row in read_journal(self.path)}
        if retry:
            self.done = {case: row for case, row in self.done.items() if row["status"] not in FAULTS}
        try:
            for left in (*self.path.glob(".*.tmp"), *(self.path / CASES).glob(".*.tmp")):
                left.unlink()
            _write_text(self.path / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True, default=str) + "\n")
            self.write_results(plan)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return before is not None and before["sweep"] != manifest["sweep"]

    def add(self, rows: Iterable[Row]) -> None:
        """Takes finished rows; saves them where the last time is SAVE_S ago. Call it now and then without any."""
        for row in rows:
            self.done[row["id"]] = row
            self._unsaved.append(row)
        if self._unsaved and time.monotonic() - self._saved_at_s >= SAVE_S:
            self.save()

    def save(self) -> None:
        """Raises InputError where the disk does not take them."""
        if self._unsaved:
            self._small_parts.append(self._write_part(self._unsaved))
            self._unsaved = []
        if len(self._small_parts) >= _MERGED_PARTS:
            rows = [row for part in self._small_parts for row in _read_part(part)]
            self._replace(self._small_parts, rows)
            self._small_parts = []
        self._saved_at_s = time.monotonic()

    def write_results(self, plan: Plan) -> None:
        """The table of what is done so far; cases that are not have the status pending."""
        rows = result_rows(plan, self.done)
        _write_table(result_table(rows, plan.sweep.fields), self.path / RESULTS)

    def close(self, plan: Plan) -> None:
        """Saves all, as one part in the sweep's order, and the table."""
        self.save()
        parts = _parts(self.path)
        if len(parts) > 1:
            order = {case.id: case.number for case in reversed(plan.cases)}
            self._replace(parts, sorted(self.done.values(), key=lambda row: (order.get(row["id"], len(order)), row["id"])))
        try:
            self.write_results(plan)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _write_part(self, rows: Sequence[Row]) -> Path:
        numbers = [int(part.stem.removeprefix("part-")) for part in _parts(self.path)]
        path = self.path / CASES / f"part-{max(numbers, default=0) + 1:08d}.parquet"
        try:
            _write_table(journal_table(rows), path)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return path

    def _replace(self, parts: Sequence[Path], rows: Sequence[Row]) -> None:
        """One part in place of several. Killed in between, the folder has rows twice, and reading takes the later one."""
        self._write_part(rows)
        for part in parts:
            part.unlink(missing_ok=True)


def check_parquet() -> None:
    """Raises KvsimError where what the folder needs is not installed."""
    for package in ("pyarrow", "filelock"):
        try:
            __import__(package)
        except ImportError as error:
            raise KvsimError(f"kvsim sweep needs {package}, which is not installed; pip install 'kvsim[sweep]'") from error


def check_folder(path: Path) -> None:
    """Raises InputError for what `SweepFolder` could not use, before there is anything to lose; makes nothing."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise InputError("--out", str(path), "must be a directory; a file is in the way", "choose another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError("--out", str(path), "cannot be written (Permission denied)", "choose another directory")
    if path.exists() and read_manifest(path) is None and any(entry.name not in (CASES, LOCK) for entry in path.iterdir()
                                                             if not entry.name.endswith(".tmp")):  # fmt: skip
        raise InputError("--out", str(path), "must be a new folder or hold a sweep; it holds other files", "choose another folder")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What sweep.json says; None where there is none."""
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError("--out", str(path / MANIFEST), f"must be the JSON of a sweep ({error})", "choose another folder") from error
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION or not isinstance(data.get("versions"), dict):
        rule = f"must be a sweep of schema_version {SCHEMA_VERSION}"
        raise InputError("--out", str(path / MANIFEST), rule, "choose another folder")
    return data


def read_journal(path: Path) -> list[Row]:
    """All finished rows, the latest last. Raises InputError for a damaged part."""
    return [row for part in _parts(path) for row in _read_part(part)]


def _parts(path: Path) -> list[Path]:
    return sorted((path / CASES).glob("part-*.parquet"))


def _read_part(part: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(part, partitioning=None)  # a folder named a=b is no column
        if set(table.column_names) != set(COLUMNS):
            raise ValueError("it has other columns")
        return table.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(
            "--out", str(part), f"must be a part of a sweep's results ({' '.join(str(error).split())})",
            "delete it: its cases are simulated again",
        ) from error  # fmt: skip


def _manifest(plan: Plan) -> dict[str, Any]:
    sweep = plan.sweep
    vary = {axis.name: axis.values if isinstance(axis.values, tuple) else axis.values.model_dump(by_alias=True) for axis in sweep.axes}
    asked = {"scenario": sweep.scenario, "vary": vary, "mode": sweep.mode, "num_points": sweep.num_points, "seed": sweep.seed}
    plain = json.loads(json.dumps(asked, default=str))
    return {"schema_version": SCHEMA_VERSION, "sweep": plain, "num_cases": len(plan.cases), "versions": versions()}


def _write_table(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    _rename(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _rename(temporary, path)


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _unwritable(path: Path, error: OSError) -> InputError:
    exists = isinstance(error, FileExistsError | NotADirectoryError)
    rule = "must be a directory; a file is in the way" if exists else f"cannot be written ({error.strerror or error})"
    return InputError("--out", str(path), rule, "choose another directory, or free some space; what is saved there stays")
