"""Timing one benchmark on a device: cold rotated inputs, then samples of many calls; the same code for every Op.

A sample is the time of `calls` back-to-back calls divided by `calls`; nothing is subtracted from it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch

from kvsim.calibrate.bench import EAGER, GRAPH, GRAPH_ISSUE, ISSUE, Bench, Inputs, Maker, Shape
from kvsim.calibrate.bench_device import free_memory_bytes
from kvsim.units import format_bytes

MAX_BUFFERS = 1024
"""Inputs smaller than cache/512 stay partly cached; their row says `cold: false`."""
MIN_CALLS_PER_GRAPH = 8
ISSUE_CALLS = 32
"""Few enough that the device's queue of about a thousand launches never makes the host wait."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: one sample, one row; how many samples at least and at most."""

    sample_s: float
    row_s: float
    min_repeats: int
    max_repeats: int


EFFORTS = {
    ("cuda", "full"): Effort(sample_s=1e-3, row_s=0.06, min_repeats=7, max_repeats=50),
    ("cuda", "small"): Effort(sample_s=1e-3, row_s=0.02, min_repeats=5, max_repeats=20),
    ("cpu", "full"): Effort(sample_s=2e-3, row_s=0.3, min_repeats=5, max_repeats=50),
    ("cpu", "small"): Effort(sample_s=5e-4, row_s=0.01, min_repeats=3, max_repeats=20),
}


class NotMeasured(Exception):
    """A row that is left out for a reason that is not an error of the Op."""


@dataclass
class Buffers:
    """Copies of one call's inputs at different addresses, used in turn."""

    sets: list[Inputs]
    working_set_bytes: int
    output_bytes: int


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def storage_bytes(value: Any) -> int:
    """Bytes of the storages behind all tensors in `value`, a shared storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(value)}
    return sum(storages.values())


def rotated(first: Inputs, target_bytes: int) -> int:
    """How many copies of `first` exceed `target_bytes` in total: at least 2, at most MAX_BUFFERS."""
    return min(MAX_BUFFERS, max(2, target_bytes // max(1, storage_bytes(first)) + 1))


def copy_inputs(inputs: Inputs) -> Inputs:
    return tuple(_copy_tensor(item) if isinstance(item, torch.Tensor) else item for item in inputs)


def _copy_tensor(source: torch.Tensor) -> torch.Tensor:
    """Same values, strides and pinning, other address."""
    pinned = source.device.type == "cpu" and torch.cuda.is_available() and source.is_pinned()
    clone = source.clone(memory_format=torch.preserve_format)
    assert clone.stride() == source.stride(), "inputs must be dense, so that a copy keeps their layout"
    return clone.pin_memory() if pinned else clone


def make_buffers(bench: Bench, shape: Shape, maker: Maker, target_bytes: int, num_bytes: int) -> Buffers:
    """Inputs whose total exceeds `target_bytes`; raises NotMeasured when memory would not hold them and the outputs."""
    free_bytes = free_memory_bytes(maker.device)
    _require(2 * num_bytes, free_bytes)
    first = bench.make_inputs(shape, maker)
    count = rotated(first, target_bytes) if bench.cold else 1
    input_bytes = storage_bytes(first)
    output = bench.run(first)
    addresses = {t.untyped_storage().data_ptr() for t in tensors(first)}
    output_bytes = storage_bytes([t for t in tensors(output) if t.untyped_storage().data_ptr() not in addresses])
    _require(count * (input_bytes + 2 * output_bytes), free_bytes)  # outputs of the eager and of the graph ring
    del output
    return Buffers([first, *(copy_inputs(first) for _ in range(count - 1))], count * input_bytes, output_bytes)


def _require(need_bytes: float, free_bytes: float) -> None:
    if need_bytes > 0.9 * free_bytes:
        raise NotMeasured(f"needs {format_bytes(need_bytes)} of memory, {format_bytes(free_bytes)} are free")


def samples(bench: Bench, buffers: Buffers, mode: str, device: torch.device, effort: Effort) -> tuple[list[float], int]:
    """Seconds per call of each sample, and calls per sample."""
    num_sets = len(buffers.sets)
    turn = cycle(range(num_sets))
    outputs: list[Any] = [None] * num_sets  # kept for one turn, so that outputs rotate too

    def call() -> None:
        i = next(turn)
        outputs[i] = bench.run(buffers.sets[i])

    per_step = 1
    if mode in (GRAPH, GRAPH_ISSUE):
        call()  # warm: lazy initialisation may not be captured
        torch.cuda.synchronize()
        outputs[:] = [None] * num_sets
        per_step = 1 if bench.replays else num_sets * -(-MIN_CALLS_PER_GRAPH // num_sets)
        step: Callable[[], None] = capture(call, per_step)
    else:
        step = call
    timer = {EAGER: events_s if device.type == "cuda" else clock_s, GRAPH: events_s}.get(mode, issue_s)
    fixed_steps = {ISSUE: ISSUE_CALLS, GRAPH_ISSUE: max(1, ISSUE_CALLS // 4)}.get(mode)
    times_s, num_steps = repeat(lambda n: timer(step, n), effort, fixed_steps)
    return [t / (num_steps * per_step) for t in times_s], num_steps * per_step


def repeat(run_s: Callable[[int], float], effort: Effort, fixed_steps: int | None) -> tuple[list[float], int]:
    """Warm up, choose the steps per sample, then sample; returns seconds of each whole sample and its steps."""
    run_s(1)
    once_s = max(1e-9, run_s(fixed_steps or 1) / (fixed_steps or 1))
    steps = fixed_steps or max(1, min(500, round(effort.sample_s / once_s)))
    run_s(steps)
    wanted = int(effort.row_s / (once_s * steps))
    return [run_s(steps) for _ in range(max(effort.min_repeats, min(effort.max_repeats, wanted)))], steps


def clock_s(step: Callable[[], None], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        step()
    return time.perf_counter() - start


def events_s(step: Callable[[], None], n: int) -> float:
    """Device time between events; one step ahead of the first event keeps the device busy while it is queued."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step()
    start.record()
    for _ in range(n):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def issue_s(step: Callable[[], None], n: int) -> float:
    """Host time to issue `n` steps to an idle device."""
    torch.cuda.synchronize()
    elapsed_s = clock_s(step, n)
    torch.cuda.synchronize()
    return elapsed_s


def capture(call: Callable[[], None], calls: int) -> Callable[[], None]:
    """Record `calls` calls into a CUDA graph; returns its replay."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream current
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def wake(device: torch.device, for_s: float = 0.5) -> None:
    """Keep a GPU busy until its clocks have risen from idle."""
    if device.type != "cuda":
        return
    a = torch.randn(4096, 4096, dtype=torch.float16, device=device)
    end_s = time.perf_counter() + for_s
    while time.perf_counter() < end_s:
        a.matmul(a)
        torch.cuda.synchronize()


def percentiles_us(times_s: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(np.asarray(times_s) * 1e6, (20, 50, 80))
    return {"p20_us": round(float(p20), 4), "p50_us": round(float(p50), 4), "p80_us": round(float(p80), 4)}


def release(device: torch.device) -> None:
    """Give memory back before the next shape."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # an out-of-memory row may leave a capture half undone
            torch.cuda.empty_cache()
