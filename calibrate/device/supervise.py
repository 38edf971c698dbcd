"""Measuring that survives its points: a worker process is started again when one of them has ended it. No torch here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvsim.calibrate.device.rows_file import FILE_NAME, RowFile
from kvsim.calibrate.device.session import TRYING
from kvsim.errors import KvsimError

DONE, BAD_INPUT, DEVICE_LOST, INTERRUPTED = 0, 2, 4, 130
MOST_STARTS = 20
LEAST_LEFT_S = 5.0
"""Less is not worth another start: importing torch takes half of it."""


class WorkerError(KvsimError):
    """The worker could not begin; it has said why."""


def supervise(folder: Path, options: Sequence[str], budget_s: float) -> None:
    """Runs the worker until its plan or the budget ends. options: of `worker`, but for --out and --budget-s.

    A point that ends the process (an illegal instruction, a segmentation fault, the kernel's out-of-memory killer), or loses the
    device, gets a row that says so, and the rest goes on in a new process. Raises WorkerError, KeyboardInterrupt.
    """
    started_s = time.monotonic()
    for start in range(MOST_STARTS):
        left_s = budget_s - (time.monotonic() - started_s)
        if start and left_s < LEAST_LEFT_S:
            return
        code = _run([*options, "--out", str(folder), "--budget-s", f"{left_s:.1f}"])
        if code == DONE:
            return
        if code == INTERRUPTED or -code in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        options = [option for option in options if option != "--retry-failed"]
        if code == BAD_INPUT or not note_death(folder, code):
            raise WorkerError(f"kvsim calibrate device: measuring ended with code {code}; what it said stands above")


def _run(options: Sequence[str]) -> int:
    command = [sys.executable, "-m", "kvsim.calibrate.device.worker", *options]
    child = subprocess.Popen(command)
    try:
        return child.wait()
    except KeyboardInterrupt:  # a terminal sends it to both
        child.send_signal(signal.SIGINT)
        child.wait()
        raise


def note_death(folder: Path, code: int) -> bool:
    """A row for the point that ended the worker; False where none did."""
    trying = folder / TRYING
    if not trying.exists() or not (folder / FILE_NAME).exists():
        return False
    row = json.loads(trying.read_text())
    what = "the device stopped answering" if code == DEVICE_LOST else _death(code)
    file = RowFile(folder)
    file.add({**row, "status": f"failed: {what}"})
    file.close()
    trying.unlink()
    return True


def _death(code: int) -> str:
    if code >= 0:
        return f"the process ended with code {code}"
    name = signal.Signals(-code).name
    return f"the process died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
