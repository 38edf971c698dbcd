"""Where a step's time goes: wall time between marks, by label. On devices that run beside the host it waits for them."""

from __future__ import annotations

from collections.abc import Hashable
from time import perf_counter

import torch


class OpClock:
    """Seconds by label since `start`; what happens between two marks counts for the second."""

    def __init__(self, device: torch.device) -> None:
        self._waits = device.type == "cuda"
        self.seconds: dict[Hashable, float] = {}
        self._last = 0.0

    def start(self) -> None:
        self.seconds = {}
        self._last = self._now()

    def mark(self, label: Hashable) -> None:
        now = self._now()
        self.seconds[label] = self.seconds.get(label, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self._waits:
            torch.cuda.synchronize()
        return perf_counter()


class NoClock:
    """Notes nothing."""

    def start(self) -> None: ...

    def mark(self, label: Hashable) -> None: ...


Clock = OpClock | NoClock
