"""Where a step's time goes: time between marks, by label.

On a CPU it is the time that this thread ran: the decoder computes in one thread and never waits, so on an idle machine that is the
wall's time, and on a shared one it leaves out what others took. On a GPU it is the wall's, waiting for the device at each mark.
"""

from __future__ import annotations

from collections.abc import Hashable
from time import perf_counter_ns, thread_time_ns

import torch

NS = 1e-9


def now_ns(device: torch.device) -> int:
    """Nanoseconds of the clock that steps on this device are measured by."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return perf_counter_ns()
    return thread_time_ns()


class OpClock:
    """Seconds by label since `start`; what happens between two marks counts for the second."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[Hashable, float] = {}
        self._last = 0

    def start(self) -> None:
        self.seconds = {}
        self._last = now_ns(self._device)

    def mark(self, label: Hashable) -> None:
        now = now_ns(self._device)
        self.seconds[label] = self.seconds.get(label, 0.0) + (now - self._last) * NS
        self._last = now


class NoClock:
    """Notes nothing."""

    def start(self) -> None: ...

    def mark(self, label: Hashable) -> None: ...


Clock = OpClock | NoClock
