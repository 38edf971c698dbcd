"""The C library's heap, told to keep what tensors give back.

glibc hands freed blocks of more than 128 KiB, later of as much as 32 MiB, back to the system, depending on what was freed before, and
fresh pages are zeroed as they are touched. So one and the same step takes longer after some work than after other. PyTorch's tuning
guide has servers preload an allocator that keeps pages; these settings do as much.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""Parameters of mallopt(3). One arena: threads would else have heaps of their own, to which the other settings do not apply."""
_KEPT_BYTES, _GROWN_BYTES, _HEAP_BLOCK_BYTES = 2**31 - 1, 64 * 2**20, 32 * 2**20
"""The heap's end is given back beyond the first, grows by the second, and holds blocks up to the third, the most that glibc takes."""


def keep_pages() -> bool:
    """For the rest of this process. False where the C library has no such settings (macOS, musl, Windows)."""
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES), (_TOP_PAD, _GROWN_BYTES), (_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])


def give_back_pages() -> None:
    """What is free now: a peak that is measured from here on is not that of earlier work."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    return None if sys.platform == "win32" else getattr(ctypes.CDLL(None), name, None)
