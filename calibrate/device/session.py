"""Measuring: points chosen within a budget, timed one by one, and written down as they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvsim.calibrate.device.device_file import write_device
from kvsim.calibrate.device.op_json import compact, op_from_json, op_to_json
from kvsim.calibrate.device.planner import Planner
from kvsim.calibrate.device.points import SKEW, Point
from kvsim.calibrate.device.rows_file import OK, PROBE, Row, RowFile
from kvsim.calibrate.device.timing import Skipped, Timer, Timing
from kvsim.calibrate.rows import MeasuredRow
from kvsim.errors import InputError

PROBE_EVERY_S = 20.0
RETIME_SPREAD_FRAC = 0.25
"""Of p80 - p20 over the median: a point that spreads more is timed once more, and the calmer of the two kept."""
TRYING = "trying.json"
"""The point that is being measured: there only while it is."""
ERRORS = (RuntimeError, MemoryError, TypeError, ValueError, NotImplementedError, AttributeError, ImportError, InputError)
"""What a point may raise (torch.OutOfMemoryError is a RuntimeError); anything else is a bug and stops the run."""
SETUP_CALLS_S = 0.2
"""Of a point beside making its inputs: warm-up, choice of the sample, samples (`bench_timing.EFFORTS`), corrected as points come."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """What one call of `measure` did. left: points of the plan that no row has."""

    num_rows: int
    left: int
    took_s: float


def open_rows(folder: Path, timer: Timer) -> RowFile:
    """The folder's rows, new or to be continued. Raises InputError for those of another device, or damaged ones."""
    identity = timer.identity()
    if (folder / "rows.jsonl").exists():
        return RowFile(folder, identity)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--out", str(folder), f"must be a folder that can be written ({error.strerror})") from error
    return RowFile(folder, identity, timer.notes())


def measure(
    points: list[Point], file: RowFile, timer: Timer, budget_s: float, tell: Tell = lambda line: None,
    clock: Callable[[], float] = time.monotonic, gpu_name: str | None = None, started_s: float | None = None,
) -> Session:  # fmt: skip
    """Measures until the budget or the plan ends; each point once, whatever became of it. started_s: when the budget began."""
    started_s = clock() if started_s is None else started_s
    planner = _planner(points, file, budget_s, gpu_name)
    probed_s, num_rows = -PROBE_EVERY_S, 0
    try:
        while True:
            now_s = clock() - started_s
            chosen = planner.next(budget_s - now_s)
            if chosen is None:
                break
            if now_s - probed_s >= PROBE_EVERY_S:
                probed_s = now_s
                file.add({"status": PROBE, "key": f"probe {len(file.rows)}", "seconds": timer.probe_s(), "work": PROBE})
                now_s = clock() - started_s  # the probe is not the point's
            point, _ = chosen
            row = _row(point, timer, point.group(planner.num_sms), file.path.parent)
            took_s = clock() - started_s - now_s
            file.add(row | {"took_s": round(took_s, 4)})
            (file.path.parent / TRYING).unlink()
            planner.seen(point, row.get("seconds"), took_s)
            num_rows += 1
            tell(_line(row))
    finally:
        file.close()
    return Session(num_rows, planner.left(), clock() - started_s)


def _planner(points: list[Point], file: RowFile, budget_s: float, gpu_name: str | None) -> Planner:
    """A planner that knows what the file holds."""
    gpu = write_device(file.path.parent, file.header, measured_rows(file), gpu_name)
    setup_s = SETUP_CALLS_S if file.header["plan"] == "full" else 0.1 * SETUP_CALLS_S
    setup_s += 3.0 * file.header["cold_bytes"] / file.header["copy_bytes_per_s"]  # made, then copied
    planner = Planner(points, gpu, setup_s, budget_s)
    by_key = {point.key: point for point in points}
    for row in file.rows:
        point = by_key.get(row["key"])
        if point is not None:
            planner.seen(point, row.get("seconds"), row.get("took_s", 0.0))
    return planner


def _row(point: Point, timer: Timer, group: str, folder: Path) -> Row:
    """Measured, skipped or failed; what went wrong is said in the status."""
    row: Row = {"key": point.key, "work": point.work, "group": group, "dtype": point.dtype, "op": op_to_json(point.op)}
    row["details"] = {name: value for name, value in point.details if name != "lengths"}
    (folder / TRYING).write_text(compact(row))  # so that whoever sees this process die knows of what
    try:
        timing = timer.time(point)
        if timing.spread_frac > RETIME_SPREAD_FRAC:  # somebody else may have had the device for a moment
            again = timer.time(point)
            timing = replace(min(timing, again, key=lambda one: one.spread_frac), more={**timing.more, "retimed": True})
    except Skipped as reason:
        return row | {"status": f"skipped: {_first_line(reason)}"}
    except ERRORS as error:
        return row | {"status": f"failed: {type(error).__name__}: {_first_line(error)}"}
    return row | {"status": OK, **_numbers(timing)}


def _numbers(timing: Timing) -> dict[str, Any]:
    return {
        "seconds": timing.seconds, "p20_s": timing.p20_s, "p80_s": timing.p80_s, "samples": timing.samples, "mode": timing.mode,
        "cold": timing.cold, **timing.more,
    }  # fmt: skip


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]


def _line(row: Row) -> str:
    op = " ".join(str(value) for name, value in row["op"].items() if not isinstance(value, dict))
    what = f"{row['work']:<14} {row['dtype']:<8} {op[:90]:<90}"
    if row["status"] != OK:
        return f"{what} {row['status']}"
    return f"{what} {row['seconds'] * 1e6:>11.2f} us"


def measured_rows(file: RowFile) -> list[MeasuredRow]:
    """Rows that tables are fitted to, as Ops."""
    return [
        MeasuredRow(op_from_json(row["op"]), row["seconds"], f"{file.path.name} {row['group']}:{number}")
        for number, row in enumerate(file.rows, start=2)
        if row["status"] == OK and row["work"] != SKEW
    ]
