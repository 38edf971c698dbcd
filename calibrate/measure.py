"""``python -m kvsim.calibrate.measure``: micro-benchmarks of single Ops on this machine's GPU or CPU.

Exit codes: 0 all rows measured; 2 bad input, nothing written; 3 the budget ended with rows left; 4 the device stopped
answering; 130 interrupted. Rows measured so far are kept in each case, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from kvsim.calibrate import bench_device
from kvsim.calibrate.bench import CUDA_MODES, GRAPH, Bench, Maker, Task, element_bytes, plan_tasks
from kvsim.calibrate.bench_file import FILE_NAME, Row, RowFile, task_key
from kvsim.calibrate.bench_timing import (
    EFFORTS,
    Buffers,
    NotMeasured,
    make_buffers,
    percentiles_us,
    release,
    samples,
    wake,
)
from kvsim.calibrate.hf_bench import HF_OPS
from kvsim.calibrate.ops_bench import OPS
from kvsim.errors import InputError
from kvsim.units import GB, MIB

BENCHES: tuple[Bench, ...] = OPS + HF_OPS
DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_DTYPES = {"cuda": ("bfloat16", "float16"), "cpu": ("float32",)}
DONE, BAD_INPUT, BUDGET_ENDED, DEVICE_LOST, INTERRUPTED = 0, 2, 3, 4, 130
SMALL_CPU_TARGET_BYTES = 16 * MIB
"""The small plan on a CPU is a self-test: it rotates, but does not fill a server's whole cache."""
TERA = 10**12
ERRORS = (RuntimeError, MemoryError, TypeError, ValueError, NotImplementedError)
"""What a benchmark may raise (torch.OutOfMemoryError is a RuntimeError); anything else is a bug and stops the run."""


class DeviceLostError(Exception):
    """The device no longer answers, so that every later row would fail too."""


class Session:
    """Measures tasks on one device and adds their rows to a file."""

    def __init__(self, device: torch.device, plan: str, number: int = 0, seed: int = 0) -> None:
        self.device, self.number = device, number
        self.effort = EFFORTS[device.type, plan]
        self.cold_bytes = 2 * bench_device.cache_bytes(device)
        self_test = plan == "small" and device.type == "cpu"
        self.target_bytes = min(self.cold_bytes, SMALL_CPU_TARGET_BYTES) if self_test else self.cold_bytes
        self.generator = torch.Generator(device).manual_seed(seed)

    def rows(self, task: Task, modes: Sequence[str]) -> Iterator[Row]:
        """One row per mode, whatever happens: ok, skipped with a reason or failed with one."""
        num_bytes = task.bench.bytes_moved(task.shape, element_bytes(task.dtype))
        buffers: Buffers | None = None
        error = ""
        if task.bench.needs and self.device.type != "cuda":
            error = f"skipped: {task.bench.needs}"
        else:
            maker = Maker(self.device, getattr(torch, task.dtype), self.generator)
            try:
                buffers = make_buffers(task.bench, task.shape, maker, self.target_bytes, num_bytes)
            except NotMeasured as reason:
                error = f"skipped: {reason}"
            except ERRORS as failure:
                error = _failed(failure)
        for mode in modes:
            row: Row = {"op": task.bench.name, "dtype": task.dtype, "mode": mode, **task.shape, "session": self.number}
            row |= {"bytes_moved": num_bytes, "flops": task.bench.flops(task.shape)}
            yield row | (self._timed(task, mode, buffers, row) if buffers else {"status": error})
        buffers = None
        release(self.device)
        if self.device.type == "cuda":
            _check_device()

    def _timed(self, task: Task, mode: str, buffers: Buffers, row: Row) -> Row:
        try:
            times_s, calls = samples(task.bench, buffers, mode, self.device, self.effort)
        except ERRORS as failure:
            return {"status": _failed(failure)}
        result: Row = {**percentiles_us(times_s), "repeats": len(times_s), "calls_per_sample": calls}
        result |= {"buffers": len(buffers.sets), "working_set_bytes": buffers.working_set_bytes}
        result["cold"] = task.bench.cold and buffers.working_set_bytes > self.cold_bytes
        per_s = 1e6 / result["p50_us"] if result["p50_us"] > 0 and mode not in CUDA_MODES[1:] else 0.0
        result["gb_per_s"] = round(row["bytes_moved"] * per_s / GB, 4) if per_s else None
        result["tflop_per_s"] = round(row["flops"] * per_s / TERA, 6) if per_s and row["flops"] else None
        if task.bench.replays and mode == GRAPH:
            result["us_per_node"] = round(result["p50_us"] / task.shape["nodes"], 4)
        return result | {"status": "ok"}


def _failed(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0][:200]
    return f"failed: {type(error).__name__}: {text}"


def _check_device() -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLostError(str(error).splitlines()[0]) from error


def measure(tasks: list[Task], file: RowFile, session: Session, deadline_s: float) -> int:
    """Measure what the file lacks, until `deadline_s` (time.monotonic); returns how many rows are left."""
    device_type = session.device.type
    todo = [(task, [m for m in task.modes(device_type) if task_key(task, m) not in file.keys]) for task in tasks]
    left = sum(len(modes) for _, modes in todo)
    if left:
        wake(session.device)
    try:
        for task, modes in todo:
            if not modes:
                continue
            if time.monotonic() >= deadline_s:
                break
            for row in session.rows(task, modes):
                file.add(row)
                left -= 1
                print(describe(row, task), file=sys.stderr)
    finally:
        file.save()
    return left


def describe(row: Row, task: Task) -> str:
    shape = " ".join(f"{name}={value}" for name, value in task.shape.items())
    head = f"{row['op']:<20} {row['dtype']:<8} {row['mode']:<11} {shape:<62}"
    if "p50_us" not in row:
        return f"{head} {row.get('status', '')}".rstrip()
    units = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s"}
    rates = [f"{row[name]:>9.4g} {unit}" for name, unit in units.items() if row[name]]
    return f"{head} {row['p50_us']:>11.2f} us {' '.join(rates)}".rstrip()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvsim.calibrate.measure", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/measure"), help=f"folder of {FILE_NAME}; %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plan", choices=("small", "full"), default="full", help="small: a self-test of seconds")
    parser.add_argument("--ops", default="", help=f"comma-separated out of {', '.join(b.name for b in BENCHES)}")
    parser.add_argument("--dtype", default="", help=f"comma-separated out of {', '.join(DTYPES)}; the first goes first")
    parser.add_argument("--budget-s", type=float, default=420.0, help="stop cleanly after it (default %(default)s)")
    parser.add_argument("--retry-failed", action="store_true", help="measure failed rows of the file again")
    parser.add_argument("--list", action="store_true", help="print the plan and measure nothing")
    return parser.parse_args(argv)


def choose(field: str, given: str, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()] or list(default)
    for name in names:
        if name not in allowed:
            raise InputError(field, name, f"must be one of {', '.join(allowed)}")
    return names


def run(args: argparse.Namespace, command: str) -> int:
    started_s = time.monotonic()
    if not args.budget_s > 0:
        raise InputError("--budget-s", args.budget_s, "must be > 0", "the default is 420")
    all_names = [bench.name for bench in BENCHES]
    names = choose("--ops", args.ops, all_names, all_names)
    dtypes = choose("--dtype", args.dtype, DTYPES, DEFAULT_DTYPES[args.device])
    tasks = plan_tasks([b for b in BENCHES if b.name in names], args.plan, dtypes, args.device)
    if args.list:
        for task in tasks:
            for mode in task.modes(args.device):
                print(describe({"op": task.bench.name, "dtype": task.dtype, "mode": mode}, task))
        return DONE
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", "cuda", "needs a CUDA GPU that torch can see", "use --device cpu")
    device = torch.device(args.device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--out", str(args.out), f"must be a folder that can be written ({error.strerror})") from error
    session = Session(device, args.plan)
    identity = {"device_type": device.type, "device_name": bench_device.device_name(device), "plan": args.plan}
    identity |= {"l2_bytes": bench_device.cache_bytes(device), "cold_target_bytes": session.target_bytes}
    file = RowFile(args.out, identity)
    if args.retry_failed:
        file.drop("failed")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    session.number = file.start_session({"date": date, "command": command, **bench_device.facts(device)})
    with torch.no_grad():
        left = measure(tasks, file, session, started_s + args.budget_s)
    counts = {s: sum(row["status"].startswith(s) for row in file.rows) for s in ("ok", "skipped", "failed")}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{file.path}: rows: {summary}; {left} left to measure")
    return BUDGET_ENDED if left else DONE


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    command = shlex.join(["python", "-m", "kvsim.calibrate.measure", *(sys.argv[1:] if argv is None else argv)])
    before = signal.signal(signal.SIGTERM, _interrupt)  # `timeout` and job systems end a run with SIGTERM
    try:
        return run(args, command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except DeviceLostError as error:
        print(f"error: the device stopped answering ({error}); rows are kept, run again", file=sys.stderr)
        return DEVICE_LOST
    except KeyboardInterrupt:
        print("interrupted; rows are kept, run again to go on", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
