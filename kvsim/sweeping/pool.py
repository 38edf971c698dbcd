"""Cases over local processes: each started once, fed one case ahead, replaced where it dies.

`concurrent.futures` gives up all that is pending when one worker dies, and its workers outlive a killed parent. Here each worker has
a pipe of its own: the end of a pipe is the end of one worker, the case it had begun becomes a row that says so, and the next one
goes to a new worker. A worker whose parent is gone ends itself.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from kvsim.errors import KvsimError
from kvsim.processes import without_interrupts
from kvsim.sweeping.cases import Work
from kvsim.sweeping.rows import crashed, simulate_case

TICK_S = 1.0
"""A pool yields at least this often, if only an empty list, so that finished rows do not wait for unfinished ones to be saved."""
_AHEAD = 2
"""Cases that a worker has at a time: the one it simulates and the next, so that it never waits for the parent."""
_READY = "ready"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def simulate_locally(work: Iterable[Work], jobs: int) -> Iterator[list[dict[str, Any]]]:
    """Rows as they are finished, in any order. Raises KvsimError where processes do not start at all."""
    source = iter(work)
    returned: deque[Work] = deque()

    def next_case() -> Work | None:
        return returned.popleft() if returned else next(source, None)

    workers: list[_Worker] = []
    try:
        for _ in range(jobs):
            case = next_case()
            if case is None:
                break
            workers.append(_Worker(case))
        for worker in workers:
            worker.feed(next_case)
        while busy := {worker.connection: worker for worker in workers if worker.cases}:
            rows = []
            for connection in wait(list(busy), TICK_S):
                assert isinstance(connection, Connection)
                worker = busy[connection]
                row = worker.receive()
                if row is not None:
                    rows.append(row)
                if worker.is_dead:
                    workers.remove(worker)
                    returned.extend(worker.cases)
                    case = next_case()
                    if case is None:
                        continue
                    worker = _Worker(case)
                    workers.append(worker)
                worker.feed(next_case)
            yield rows
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process and the cases it has: the first of them is the one it simulates."""

    def __init__(self, first: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with without_interrupts():
            self.process.start()
        theirs.close()
        self.cases: deque[Work] = deque()
        self.is_ready = self.is_dead = False
        self._send(first)

    def feed(self, next_case: Callable[[], Work | None]) -> None:
        while len(self.cases) < _AHEAD:
            case = next_case()
            if case is None:
                return
            self._send(case)

    def receive(self) -> dict[str, Any] | None:
        """A finished row; that of a crash where the process has died (`cases` then are those it never began)."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.is_dead = True
            self.stop()
            if not self.is_ready:
                raise KvsimError(
                    f"worker processes of the sweep end while they start (exit code {self.process.exitcode}); "
                    "in a script, call kvsim.sweep under `if __name__ == \"__main__\":`"
                ) from None
            return crashed(self.cases.popleft(), f"the worker process died (exit code {self.process.exitcode})")
        if message == _READY:
            self.is_ready = True
            return None
        self.cases.popleft()
        return message

    def stop(self) -> None:
        if not self.is_dead:
            self.process.terminate()
        self.connection.close()
        self.process.join()

    def _send(self, case: Work) -> None:
        self.cases.append(case)
        with suppress(OSError):  # it has died: receive() will tell
            self.connection.send(case)


def _serve(connection: Connection) -> None:
    """A worker's life. What it has loaded and worked out (profiles, catalogues) serves all of its cases.

    It ends without a word when the parent is gone, whether it was asking (end of file, or a reset where an answer lay unread) or answering.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        connection.send(_READY)
        while True:
            row = simulate_case(connection.recv())
            connection.send(row)
    except (EOFError, ConnectionError):
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
