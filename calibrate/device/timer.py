"""Timing points with torch, on this machine's GPU or CPU."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch

import kvsim.kernels
from kvsim.calibrate import bench_device
from kvsim.calibrate.bench import EAGER, Maker
from kvsim.calibrate.bench_timing import EFFORTS, Effort, NotMeasured, events_s, make_buffers, release, repeat, samples, wake
from kvsim.calibrate.device.arena import Arena
from kvsim.calibrate.device.points import Point
from kvsim.calibrate.device.timing import Skipped, Timing
from kvsim.calibrate.device.workloads import NoSuchUnits, bench_of, num_bytes
from kvsim.calibrate.measure import ERRORS, SMALL_CPU_TARGET_BYTES, DeviceLostError
from kvsim.ops import Collective

PROBE_SIZE = {"cuda": 4096, "cpu": 512}
PEAK_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
PEAK_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
PRODUCTS = ("gemm", "prefill", "decode", "decode_lengths", "mixed")
"""Works that multiply matrices in the point's dtype."""
CPU_EFFORT = Effort(sample_s=2e-3, row_s=0.12, min_repeats=5, max_repeats=30)
"""Half that of `kvsim.calibrate.measure`: more points tell more than more samples."""
KERNEL_ROW_S = 0.1
KERNEL_CPU_EFFORT = Effort(sample_s=1e-3, row_s=0.05, min_repeats=3, max_repeats=20)
LEAST_ARENA_BYTES = {"full": 2**29, "small": 2**24}
RESOLVED_FRAC = 0.02
"""A kernel that adds less than this, or than half its spread, to the one beside it is not told apart from it."""


class TorchTimer:
    """This machine's GPU or CPU."""

    def __init__(self, device: torch.device, plan: str, seed: int = 0) -> None:
        self.device, self.plan = device, plan
        self.effort: Effort = CPU_EFFORT if (device.type, plan) == ("cpu", "full") else EFFORTS[device.type, plan]
        self.cold_bytes = 2 * bench_device.cache_bytes(device)
        self_test = plan == "small" and device.type == "cpu"
        self.target_bytes = min(self.cold_bytes, SMALL_CPU_TARGET_BYTES) if self_test else self.cold_bytes
        self.generator = torch.Generator(device).manual_seed(seed)
        self.deadly: dict[str, str] = {}
        self._arenas: dict[torch.dtype, Arena] = {}
        self._probe: torch.Tensor | None = None

    def identity(self) -> dict[str, Any]:
        return {
            "device_type": self.device.type, "device_name": bench_device.device_name(self.device), "plan": self.plan,
            "torch": torch.__version__, "cache_bytes": bench_device.cache_bytes(self.device), "cold_bytes": self.target_bytes,
        }  # fmt: skip

    def notes(self) -> dict[str, Any]:
        wake(self.device)
        facts = bench_device.facts(self.device)
        if self.device.type == "cpu":
            facts["memory_bytes"] = int(bench_device.free_memory_bytes(self.device))
        found: dict[str, Any] = {"facts": facts, "peak_flops_per_s": {}, **self._copy_rates()}
        found["deadly"] = self.deadly = deadly_dtypes() if self.device.type == "cpu" else {}
        for name, dtype in PEAK_DTYPES.items():
            if dtype in self.deadly:
                continue
            try:
                found["peak_flops_per_s"][name] = self._peak_flops_per_s(getattr(torch, dtype))
            except ERRORS:  # the device lacks the dtype; its rows will say so one by one
                continue
        return found

    def _peak_flops_per_s(self, dtype: torch.dtype) -> float:
        n = PEAK_SIZE[self.device.type] if self.plan == "full" else PROBE_SIZE["cpu"]
        a = torch.randn(n, n, dtype=torch.float32, device=self.device).to(dtype)
        return 2.0 * n**3 / self._best_s(lambda: a @ a)

    def _copy_rates(self) -> dict[str, float]:
        size = COPY_BYTES[self.device.type] if self.plan == "full" else self.target_bytes
        size = int(min(size, 0.2 * bench_device.free_memory_bytes(self.device)))
        source = torch.empty(size, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        found = {"copy_bytes_per_s": 2.0 * size / self._best_s(lambda: target.copy_(source))}
        host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=self.device.type == "cuda").fill_(1)
        rate = host.numel() / self._best_s(lambda: target[: host.numel()].copy_(host, non_blocking=True))
        return found | {"host_copy_bytes_per_s": rate}

    def _best_s(self, call: Any) -> float:
        """The least of some calls: a ceiling is what the device can do."""
        effort = Effort(2e-3, 0.2, 5, 30)
        if self.device.type == "cpu":
            return min(_cpu_samples(call, effort))
        times_s, steps = repeat(lambda n: events_s(call, n), effort, None)
        return min(times_s) / steps

    def probe_s(self) -> float:
        if self._probe is None:
            size = PROBE_SIZE[self.device.type]
            self._probe = torch.randn(size, size, device=self.device, generator=self.generator)
            if self.device.type == "cpu":
                self._arena(torch.float32)  # now, so that no point is charged with it
        probe = self._probe
        return self._best_s(lambda: probe @ probe)

    def time(self, point: Point) -> Timing:
        try:
            if isinstance(point.op, Collective):
                return self._all_reduce(point.op)
            if point.work in ("kernel", "kernel_beside"):
                return self._kernel(point)
            return self._bench(point)
        except NotMeasured as reason:
            raise Skipped(str(reason)) from reason
        finally:
            if self.device.type == "cuda":
                release(self.device)
                self._check_device()

    def _bench(self, point: Point) -> Timing:
        if point.work in PRODUCTS and point.dtype in self.deadly:
            raise NoSuchUnits(f"a product in {point.dtype} kills the process here ({self.deadly[point.dtype]})")
        bench = bench_of(point)
        dtype = getattr(torch, point.dtype)
        if self.device.type == "cpu" and dtype.is_floating_point:
            buffers = self._arena(dtype).buffers(bench, self.target_bytes)
        else:
            maker = Maker(self.device, dtype, self.generator)
            buffers = make_buffers(bench, {}, maker, self.target_bytes, num_bytes(point))
        if self.device.type == "cpu":
            turn = cycle(buffers.sets)
            times_s = _cpu_samples(lambda: bench.run(next(turn)), self.effort)
            return _timing(times_s, EAGER, buffers.working_set_bytes > self.cold_bytes)
        mode = bench.modes[0]
        times_s, _ = samples(bench, buffers, mode, self.device, self.effort)
        return _timing(times_s, mode, buffers.working_set_bytes > self.cold_bytes)

    def _arena(self, dtype: torch.dtype) -> Arena:
        """One a dtype: a block is made in a second or so, and then serves every point."""
        if dtype not in self._arenas:
            size = min(max(self.target_bytes, LEAST_ARENA_BYTES[self.plan]), int(0.2 * bench_device.free_memory_bytes(self.device)))
            self._arenas[dtype] = Arena(self.device, dtype, self.generator, size)
        return self._arenas[dtype]

    def _kernel(self, point: Point) -> Timing:
        """A kernel on a GPU, its torch reference on a CPU; with "_beside", what it takes beyond plain decode attention."""
        details = dict(point.details)
        module = kvsim.kernels.load(details["kernel"])
        times_s, mode, cold = self._kernel_times_s(module, dict(details["shape"]))
        shape = module.Shape(**dict(details["shape"]))
        more: dict[str, Any] = {"kernel_bytes": float(module.bytes_moved(shape)), "kernel_flops": float(module.flops(shape))}
        whole = _timing(times_s, mode, cold, more | {"kernel_s": float(np.median(times_s))})
        if point.work == "kernel":
            return whole
        fields = {name: value for name, value in details["shape"] if name != "statistic"}
        plain_s, _, _ = self._kernel_times_s(kvsim.kernels.load("decode_attention"), fields)
        beyond_s = whole.seconds - float(np.median(plain_s))
        if beyond_s < max(RESOLVED_FRAC * whole.seconds, (whole.p80_s - whole.p20_s) / 2):
            raise Skipped(f"takes {whole.seconds * 1e6:.4g} us, {beyond_s * 1e6:.3g} us beyond decode attention: not resolved")
        half = (whole.p80_s - whole.p20_s) / 2
        return Timing(beyond_s, max(beyond_s - half, 0.0), beyond_s + half, whole.samples, mode, cold, whole.more)

    def _kernel_times_s(self, module: Any, fields: dict[str, Any]) -> tuple[list[float], str, bool]:
        inputs = module.make_inputs(module.Shape(**fields), np.random.default_rng(0), self.device)
        if self.device.type == "cpu":  # references compute, whatever the cache holds
            return _cpu_samples(lambda: module.reference(**inputs), KERNEL_CPU_EFFORT), EAGER, False
        from kvsim.kernels.bench_timing import ring_of, time_calls

        ring = ring_of(inputs, self.device)
        times_s, mode = time_calls(lambda each: module.run(**each), ring, self.device, KERNEL_ROW_S)
        return times_s, mode, len(ring) > 1

    def _all_reduce(self, op: Collective) -> Timing:
        """NCCL over the first GPUs, driven by one process: launches of all of them, then the wait."""
        import torch.cuda.nccl as nccl

        count = op.message_bytes // 2
        buffers = [torch.randn(count, dtype=torch.float16, device=f"cuda:{i}") for i in range(op.num_gpus)]

        def run_s(n: int) -> float:
            from time import perf_counter

            for i in range(op.num_gpus):
                torch.cuda.synchronize(i)
            start = perf_counter()
            for _ in range(n):
                nccl.all_reduce(buffers)
            for i in range(op.num_gpus):
                torch.cuda.synchronize(i)
            return perf_counter() - start

        times_s, steps = repeat(run_s, self.effort, None)
        return _timing([t / steps for t in times_s], EAGER, True)

    def _check_device(self) -> None:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(str(error).splitlines()[0]) from error


def _cpu_samples(call: Callable[[], Any], effort: Effort) -> list[float]:
    """Seconds of a call by sample. With one thread, those that it had the core: what other programs take does not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def run_s(n: int) -> float:
        start = clock()
        for _ in range(n):
            call()
        return clock() - start

    times_s, steps = repeat(run_s, effort, None)
    return [t / steps for t in times_s]


def deadly_dtypes() -> dict[str, str]:
    """Dtypes whose products end a process instead of raising, found out in processes of their own, and by which signal.

    Virtual machines that announce matrix units they do not grant do this (SIGILL), and no exception can be caught.
    """
    code = "import torch; a = torch.randn(256, 256).to(torch.{}); a @ a"
    started = {
        dtype: subprocess.Popen([sys.executable, "-c", code.format(dtype)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for dtype in PEAK_DTYPES.values() if dtype != "float32"
    }  # fmt: skip
    ends = {dtype: child.wait(timeout=120) for dtype, child in started.items()}
    return {dtype: signal.Signals(-code).name for dtype, code in ends.items() if code < 0}


def _timing(times_s: list[float], mode: str, cold: bool, more: dict[str, Any] | None = None) -> Timing:
    p20, p50, p80 = (float(value) for value in np.percentile(times_s, (20, 50, 80)))
    return Timing(p50, p20, p80, len(times_s), mode, cold, more or {})
