"""How well a sweep uses the cores: serial time / (workers x parallel time), and whether every way of running gives the same rows.

    python benchmarks/sweep_efficiency.py [--cases N] [--jobs N] [--rounds N] [--ray]

Serial is a plain loop over the cases in this process: no workers, no files. Parallel is the whole of `run_sweep`: planning, starting
workers, simulating, saving, the table. Both are timed in turn, and medians compared. Machines are shared, so the second ratio asks
for the core-seconds that other processes left (Linux only). With --ray the same cases run on a local Ray too.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kvsim.sweeping.cases import Plan
from kvsim.sweeping.pool import num_cores
from kvsim.sweeping.rows import simulate_case
from kvsim.sweeping.run import run_sweep
from kvsim.sweeping.spec import load_sweep

ROOT = Path(__file__).resolve().parent.parent
POLICIES = {"full": [], "snapkv": [{"kind": "snapkv", "budget_tokens": 512}]}


def sweep_file(num_cases: int) -> dict[str, Any]:
    """Chat on an A100 over rates and batch sizes, two policies."""
    lengths = {"kind": "lognormal", "prompt_mean_tokens": 1155, "output_mean_tokens": 211}
    arrivals = {"kind": "poisson", "rate_per_s": 6}
    scenario = {
        "gpu": "a100-sxm-80gb", "model": "llama-3.1-8b", "engine": {"kind": "vllm_v1", "max_model_len": 32768},
        "workload": {"arrivals": arrivals, "lengths": lengths, "num_requests": 300}, "policies": POLICIES,
    }  # fmt: skip
    vary = {
        "workload.arrivals.rate_per_s": {"from": 1, "to": 12},
        "engine.max_num_seqs": {"from": 16, "to": 256, "spacing": "log", "whole": True},
    }
    return {"scenario": scenario, "vary": vary, "mode": "random", "num_points": num_cases // len(POLICIES)}


@dataclass(frozen=True)
class Clock:
    """What something took. others_s: core-seconds that other processes of the machine used meanwhile."""

    wall_s: float
    cpu_s: float
    others_s: float


@contextmanager
def clocked(into: list[Clock]) -> Iterator[None]:
    """Of this process and of the workers that it has waited for."""
    wall_s, cpu_s, busy_s = time.perf_counter(), own_cpu_s(), machine_busy_s()
    yield
    used_s = own_cpu_s() - cpu_s
    into.append(Clock(time.perf_counter() - wall_s, used_s, max(0.0, machine_busy_s() - busy_s - used_s)))


def own_cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def machine_busy_s() -> float:
    """Of all cores since the machine started: user, nice, system, irq, softirq and steal of Linux's /proc/stat."""
    fields = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def serial_rows(plan: Plan, clocks: list[Clock]) -> dict[str, dict[str, Any]]:
    with clocked(clocks):
        return {work.id: simulate_case(work) for work in plan.work({})}


def parallel_table(data: dict[str, Any], jobs: int, clocks: list[Clock], ray: str | None = None) -> Path:
    """results.parquet, in a temporary folder that the caller removes."""
    folder = tempfile.mkdtemp(prefix="kvsim-benchmark-")
    with clocked(clocks):
        return run_sweep(load_sweep(data), folder, jobs=jobs, ray=ray).results


def efficiency(serial: Sequence[Clock], parallel: Sequence[Clock], jobs: int) -> tuple[float, float]:
    """Of the wall clock; and of what other processes left: the serial loop's core-seconds over those there were to use."""
    wall = median(clock.wall_s for clock in serial) / (jobs * median(clock.wall_s for clock in parallel))
    left = median(clock.cpu_s for clock in serial) / median(jobs * clock.wall_s - clock.others_s for clock in parallel)
    return wall, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500, help="cases of the sweep (default 500)")
    parser.add_argument("--jobs", type=int, default=num_cores(), help="workers (default: one for each core)")
    parser.add_argument("--rounds", type=int, default=3, help="serial and parallel runs, in turn (default 3)")
    parser.add_argument("--ray", action="store_true", help="also on a local Ray")
    args = parser.parse_args()
    import pyarrow.parquet as pq

    data = sweep_file(args.cases)
    plan = Plan(load_sweep(data))
    serial: list[Clock] = []
    parallel: list[Clock] = []
    tables: set[bytes] = set()
    for number in range(args.rounds):
        rows = serial_rows(plan, serial)
        path = parallel_table(data, args.jobs, parallel)
        found = pq.read_table(path).to_pylist()
        assert all(row[name] == value for row in found for name, value in rows[row["case_id"]].items() if name != "id")
        tables.add(path.read_bytes())
        shutil.rmtree(path.parent)
        wall, left = efficiency(serial[-1:], parallel[-1:], args.jobs)
        print(f"round {number + 1}: serial {serial[-1].wall_s:6.1f} s ({serial[-1].cpu_s:6.1f} s of CPU)   {args.jobs} workers "
              f"{parallel[-1].wall_s:6.1f} s ({parallel[-1].cpu_s:6.1f} s, others {parallel[-1].others_s:5.1f} s)   "
              f"efficiency {wall:.1%}, of what others left {left:.1%}", flush=True)  # fmt: skip
    wall, left = efficiency(serial, parallel, args.jobs)
    print(f"{len(plan.cases)} cases, medians of {args.rounds}: efficiency {wall:.1%}, of what others left {left:.1%} (bar 85 %); "
          f"rows as in the serial loop; tables byte for byte the same: {len(tables) == 1}")  # fmt: skip
    if args.ray:
        clocks: list[Clock] = []
        path = parallel_table(data, args.jobs, clocks, "local")
        tables.add(path.read_bytes())
        shutil.rmtree(path.parent)
        print(f"Ray with {args.jobs} CPUs, started for it: {clocks[0].wall_s:.1f} s; the same bytes: {len(tables) == 1}")
    return 0 if len(tables) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
