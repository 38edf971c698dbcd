"""Worker processes that leave Ctrl-C to the process that started them, and end when it gives up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, resource_tracker
from types import FrameType, TracebackType
from typing import Any


@contextmanager
def without_interrupts() -> Iterator[None]:
    """For starting a process: Ctrl-C goes to every process of a terminal, and a spawned one inherits what its parent holds back.

    The parent gets a Ctrl-C of the meantime afterwards, from whichever of its threads the system chose: a mask is one thread's, and
    Python raises in the main one. Systems without signal masks start processes as they are.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else the first start brings it, and that (CPython 3.11) clears the mask again
    handler = signal.getsignal(signal.SIGINT)
    caught: list[tuple[int, FrameType | None]] = []
    waits = threading.current_thread() is threading.main_thread() and callable(handler)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if waits:
        signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        if waits:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if caught and callable(handler):
        handler(*caught[0])


class Pool(ProcessPoolExecutor):
    """Spawned workers. Left by an exception, Ctrl-C among them, it ends them at once instead of waiting for all that was asked."""

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs, mp_context=get_context("spawn"))
        self._others = set(active_children())

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with without_interrupts():  # it starts a worker where none is idle
            return super().submit(function, *args, **kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            self.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - self._others:
                process.terminate()
        return super().__exit__(kind, error, trace)
