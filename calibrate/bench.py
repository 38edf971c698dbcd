"""What a micro-benchmark is: one `Bench` entry of data and small functions; timing and bookkeeping live elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch

Shape = dict[str, int]
Inputs = tuple[Any, ...]

ISSUE, EAGER, GRAPH, GRAPH_ISSUE = "issue", "eager", "graph", "graph_issue"
MODES = (EAGER, GRAPH, ISSUE, GRAPH_ISSUE)
CUDA_MODES = (GRAPH, ISSUE, GRAPH_ISSUE)
"""Modes that mean nothing on a CPU: nothing is launched asynchronously there."""


@dataclass(frozen=True)
class Maker:
    """Makes random inputs; never zeros, which can run faster than real data."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, dtype=self.dtype, device=self.device, generator=self.generator)

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, device=self.device, generator=self.generator)

    def random_bytes(self, n: int) -> torch.Tensor:
        return torch.randint(0, 256, (n,), dtype=torch.uint8, device=self.device, generator=self.generator)

    def kept_tokens(self, *size: int, kept: int) -> torch.Tensor:
        """Sorted int64 indices of `kept` random tokens out of the last dimension of `size`, apart for each row."""
        order = torch.rand(size, device=self.device, generator=self.generator).argsort(-1)
        return order[..., :kept].sort(-1).values


@dataclass(frozen=True)
class Bench:
    """One Op to measure.

    full, small: shapes of the two plans. Field names become columns of the row.
    make_inputs(shape, maker) -> inputs of one call; run(inputs) -> the output.
    bytes_moved(shape, element_bytes) -> bytes that `run` reads and writes, each tensor of each kernel once.
    flops(shape) -> arithmetic of `run`, a multiply-add counted as two.
    modes: which of MODES are measured. cold: rotate inputs so that the cache cannot hold them.
    own_dtype: a dtype name for Ops that the model's dtype does not concern.
    needs: a reason why a CPU cannot measure it, or "".
    replays: time whole graph replays (one call per graph) instead of one call out of many in a graph.
    """

    name: str
    full: tuple[Shape, ...]
    small: tuple[Shape, ...]
    make_inputs: Callable[[Shape, Maker], Inputs]
    run: Callable[[Inputs], Any]
    bytes_moved: Callable[[Shape, int], int]
    flops: Callable[[Shape], int]
    modes: tuple[str, ...] = (EAGER, GRAPH)
    cold: bool = True
    own_dtype: str = ""
    needs: str = ""
    replays: bool = False


@dataclass(frozen=True)
class Task:
    """One shape of one benchmark in one dtype; its modes are measured together, on the same inputs."""

    bench: Bench
    shape: Shape
    dtype: str

    def modes(self, device_type: str) -> tuple[str, ...]:
        if device_type == "cuda" or self.bench.needs:
            return self.bench.modes
        return tuple(mode for mode in self.bench.modes if mode not in CUDA_MODES)


def grid(**axes: Iterable[int]) -> tuple[Shape, ...]:
    """Every combination of the axes, as shapes: ``grid(m=(1, 2), n=(8,))``."""
    return tuple(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def no_flops(shape: Shape) -> int:
    """For Ops that only move bytes."""
    return 0


def element_bytes(dtype: str) -> int:
    return torch.empty((), dtype=getattr(torch, dtype)).element_size()


def spread(shapes: tuple[Shape, ...]) -> list[Shape]:
    """The same shapes ordered so that any prefix covers the whole range: golden-ratio strides through the list."""
    n = len(shapes)
    stride = max(1, round(n * 0.618))
    while gcd(stride, n) != 1:
        stride += 1
    return [shapes[i * stride % n] for i in range(n)]


CPU_MAX_FLOPS, CPU_MAX_BYTES = 5 * 10**10, 2**30
"""A CPU takes about a second for these; larger shapes of the full plan are left out there."""


def plan_tasks(benches: Iterable[Bench], plan: str, dtypes: Iterable[str], device_type: str) -> list[Task]:
    """Tasks in the order of measurement: dtype after dtype; within one, round-robin over the benchmarks."""
    tasks: dict[tuple[str, str, tuple[tuple[str, int], ...]], Task] = {}
    for dtype in dtypes:
        queues = []
        for bench in benches:
            name = bench.own_dtype or dtype
            queue = [Task(bench, shape, name) for shape in spread(bench.full if plan == "full" else bench.small)]
            queues.append([task for task in queue if device_type == "cuda" or _cpu_can_afford(task)])
        for turn in itertools.zip_longest(*queues):
            for task in turn:
                if task is not None:
                    tasks.setdefault((task.bench.name, task.dtype, tuple(sorted(task.shape.items()))), task)
    return list(tasks.values())


def _cpu_can_afford(task: Task) -> bool:
    num_bytes = task.bench.bytes_moved(task.shape, element_bytes(task.dtype))
    return task.bench.flops(task.shape) <= CPU_MAX_FLOPS and num_bytes <= CPU_MAX_BYTES
