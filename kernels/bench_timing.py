"""Timing of calls on cold inputs: rings of copies larger than twice the last-level cache, CUDA graphs on a GPU, percentiles."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from typing import Any

import numpy as np
import torch
import triton

MIB = 2**20
DEFAULT_CACHE_BYTES = 64 * MIB
"""Assumed last-level cache where nothing reports one."""
MAX_BUFFERS = 64
MIN_CALLS_PER_SAMPLE = 8
MEMORY_SHARE = 0.8
"""Of free memory that the ring of a row may take."""
COPY_BYTES, MATMUL_SIZE = 1024 * MIB, 8192
"""Of the ceilings on a GPU: a copy far past any cache, a product that fills every multiprocessor many times."""
CPU_COPY_BYTES, CPU_MATMUL_SIZE = 64 * MIB, 512

Inputs = dict[str, Any]
Call = Callable[[Inputs], Any]


def cache_bytes(device: torch.device) -> int:
    """L2 of a GPU; for a CPU, whose rows are only a check of the benchmark itself, a small number."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or DEFAULT_CACHE_BYTES
    return MIB


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def input_bytes(inputs: Inputs) -> int:
    """Bytes of all distinct storages of the inputs."""
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def ring_of(first: Inputs, device: torch.device) -> list[Inputs]:
    """Copies of `first` at other addresses, together larger than twice the cache where memory allows; at least one."""
    each = max(1, input_bytes(first))
    wanted = min(MAX_BUFFERS, max(2, 2 * cache_bytes(device) // each + 1))
    copies = max(1, min(wanted, 1 + int(MEMORY_SHARE * free_bytes(device)) // (2 * each)))
    return [first, *({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.items()} for _ in range(copies - 1))]


def time_calls(call: Call, ring: list[Inputs], device: torch.device, row_s: float) -> tuple[list[float], str]:
    """(seconds a call of each sample, "graph" or "eager" or "clock"). A sample goes round the ring at least once."""
    turn = cycle(ring)
    per_sample = len(ring) * -(-MIN_CALLS_PER_SAMPLE // len(ring))

    def once() -> None:
        call(next(turn))

    if device.type != "cuda":
        once()
        return _samples(lambda: _clock_s(once, len(ring)), len(ring), row_s), "clock"
    for _ in range(2):
        once()  # compiles, and makes what may not be made during capture
    torch.cuda.synchronize()
    step, mode = _captured(once, per_sample)
    step()
    return _samples(lambda: _events_s(step), per_sample, row_s), mode


def _captured(once: Callable[[], None], calls: int) -> tuple[Callable[[], None], str]:
    """`calls` calls as one CUDA graph, so that no time of the host is measured; calls one by one where capture fails."""

    def one_by_one() -> None:
        for _ in range(calls):
            once()

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            one_by_one()
    except RuntimeError:
        torch.cuda.synchronize()
        return one_by_one, "eager"
    finally:
        torch.cuda.set_stream(stream)
    return graph.replay, "graph"


def _samples(sample_s: Callable[[], float], calls: int, row_s: float) -> list[float]:
    first_s = sample_s()
    repeats = int(min(50, max(5, row_s / max(first_s, 1e-9))))
    return [sample_s() / calls for _ in range(repeats)]


def _clock_s(once: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        once()
    return time.perf_counter() - start


def _events_s(step: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def percentiles_us(times_s: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(np.asarray(times_s) * 1e6, (20, 50, 80))
    return {"p20_us": round(float(p20), 3), "p50_us": round(float(p50), 3), "p80_us": round(float(p80), 3)}


def ceilings(device: torch.device, row_s: float) -> dict[str, float]:
    """The device's own copy (bytes read and written a second) and matmul rates (bf16; fp32 on a CPU), at the median."""
    num_bytes, size = (COPY_BYTES, MATMUL_SIZE) if device.type == "cuda" else (CPU_COPY_BYTES, CPU_MATMUL_SIZE)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy_s, _ = time_calls(lambda i: i["target"].copy_(i["source"]), [{"source": source, "target": target}], device, row_s)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    matmul_s, _ = time_calls(lambda i: i["a"] @ i["a"], [{"a": a}], device, row_s)
    return {
        "copy_gb_per_s": 2 * num_bytes / float(np.median(copy_s)) / 1e9,
        "matmul_tflop_per_s": 2 * size**3 / float(np.median(matmul_s)) / 1e12,
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a file of rows must agree in to be continued: the device and the versions."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "torch": torch.__version__, "triton": triton.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "cuda": torch.version.cuda, "driver": None, "cache_bytes": cache_bytes(device),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_bytes"] = properties.total_memory
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError, IndexError):
            found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
            facts["driver"] = found[0].strip()
    return facts
