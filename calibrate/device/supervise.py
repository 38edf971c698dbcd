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
TOO_SLOW = -1000
"""In place of a code: the worker was stopped."""
MOST_STARTS = 20
LOOK_EVERY_S, LEAST_POINT_S, POINT_FRAC = 1.0, 10.0, 0.06
"""A point may take this share of the budget, and no less than ten seconds."""
LEAST_LEFT_S = 5.0
"""Less is not worth another start: importing torch takes half of it."""


class WorkerError(KvsimError):
    """The worker could not begin, and says why."""


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
        most_s = max(LEAST_POINT_S, POINT_FRAC * budget_s)
        code, said = _run([*options, "--out", str(folder), "--budget-s", f"{left_s:.1f}"], folder, most_s)
        if code == DONE:
            return
        if code == INTERRUPTED or -code in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        options = [option for option in options if option != "--retry-failed"]
        if code == BAD_INPUT or not note_death(folder, code):
            raise WorkerError(said or f"kvsim calibrate device: measuring ended with code {code}; what it said stands above")


def _run(options: Sequence[str], folder: Path, most_s: float) -> tuple[int, str]:
    """The worker's exit code, TOO_SLOW where one point took more than `most_s`, and what it wrote to its standard output."""
    command = [sys.executable, "-m", "kvsim.calibrate.device.worker", *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        while True:
            try:
                said, _ = child.communicate(timeout=LOOK_EVERY_S)
                return child.returncode, said.strip()
            except subprocess.TimeoutExpired:
                if _point_age_s(folder) > most_s:
                    child.kill()
                    child.wait()
                    return TOO_SLOW, ""
    except KeyboardInterrupt:  # a terminal sends it to both
        child.send_signal(signal.SIGINT)
        child.wait()
        raise


def _point_age_s(folder: Path) -> float:
    """How long the point that is being measured has been."""
    try:
        return time.time() - (folder / TRYING).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def note_death(folder: Path, code: int) -> bool:
    """A row for the point that ended the worker; False where none did."""
    trying = folder / TRYING
    if not trying.exists() or not (folder / FILE_NAME).exists():
        return False
    row = json.loads(trying.read_text())
    what = {DEVICE_LOST: "the device stopped answering", TOO_SLOW: "took too long and was stopped"}.get(code) or _death(code)
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
