"""The most memory that a piece of work took, as the device or the system says.

| field | meaning |
|---|---|
| `allocated_peak_bytes`, `reserved_peak_bytes` | of a GPU, torch's allocator: tensors, and what it holds of the device |
| `resident_peak_bytes` | of a CPU: the largest resident set of the whole process, Python and torch included, since the work began |
| `process_peak_bytes` | in its place where the system does not let the mark be set back: since the process began |
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from kvsim.calibrate.decoder.heap import give_back_pages

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"
"""Sets the resident set's high-water mark back (Linux, proc(5))."""
KIB = 1024


class PeakMemory:
    """Begins to watch when it is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        give_back_pages()
        try:
            _CLEAR.write_text(_RESET_PEAK)
            self._reset = True
        except OSError:  # no Linux, or a container that forbids it
            pass

    def read(self) -> dict[str, int]:
        """Bytes by the names above."""
        if self.device.type == "cuda":
            return {
                "allocated_peak_bytes": torch.cuda.max_memory_allocated(self.device),
                "reserved_peak_bytes": torch.cuda.max_memory_reserved(self.device),
            }
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if self._reset else None
        if found is not None:
            return {"resident_peak_bytes": int(found[1]) * KIB}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"process_peak_bytes": peak if sys.platform == "darwin" else peak * KIB}
