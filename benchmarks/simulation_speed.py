"""How fast kvsim simulates: requests per second of wall time on one core, beside SimPy's own timeouts in the same run.

    python benchmarks/simulation_speed.py [--json] [--case NAME ...] [--repeat N] [--million] [--azure CSV]

Every case first checks its results against the step-by-step reference simulation (tests/reference.py) on 500 requests, then is
timed whole: reading or drawing the traffic, building cost tables, simulating, and summing up latencies. Rates are the best of
`--repeat` runs; machines are shared, so compare them with `simpy_timeouts_per_s`, measured right before each run, never alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simpy

from kvsim.api import build_plan, deploy, run_policy
from kvsim.scenario import Scenario, parse_scenario

ROOT = Path(__file__).resolve().parent.parent
AZURE = ROOT.parent / "shared" / "traces" / "azure2023_conv.csv"
RATE_PER_S = 8
ENGINE = {
    "kind": "vllm_v1", "max_num_seqs": 256, "max_num_batched_tokens": 2048, "block_size_tokens": 16,
    "gpu_memory_utilization": 0.9, "max_model_len": 32768,
}  # fmt: skip
SHORT = {"kind": "fixed", "prompt_tokens": 512, "output_tokens": 128}
CHECKED_REQUESTS = 500


@dataclass(frozen=True)
class Case:
    """One policy on one traffic; engine: fields that differ from ENGINE. floor_requests_per_s: the bar, if it has one."""

    name: str
    policies: list[dict[str, Any]]
    num_requests: int
    lengths: dict[str, Any]
    engine: dict[str, Any]
    rate_per_s: float = RATE_PER_S
    bar: str = ""

    def scenario(self, num_requests: int) -> Scenario:
        workload = {
            "arrivals": {"kind": "poisson", "rate_per_s": self.rate_per_s},
            "lengths": self.lengths,
            "num_requests": num_requests,
        }
        data = {
            "gpu": "a100-sxm-80gb", "model": "llama-3.1-8b", "engine": {**ENGINE, **self.engine}, "workload": workload,
            "policies": {self.name: self.policies},
        }  # fmt: skip
        return parse_scenario(data, ROOT)


def cases(azure: Path, million: bool) -> list[Case]:
    """The cases of the project's speed bars."""
    conversation = {"kind": "empirical", "path": str(azure), "repeat": True}
    found = [
        Case("full-4k", [], 4_000, SHORT, {}, bar="25000/s"),
        Case("full-100k", [], 100_000, SHORT, {}, bar="25000/s"),
        Case(
            "snapkv+think-100k", [{"kind": "snapkv", "budget_tokens": 256}, {"kind": "think", "pruned_frac": 0.4}],
            100_000, SHORT, {}, bar="0.4 of full-100k",
        ),
        Case(
            "keyformer-code-100k", [{"kind": "keyformer", "kept_frac": 0.5, "schedule": "code"}], 100_000, SHORT, {},
            bar="0.4 of full-100k",
        ),
        Case(
            "scissorhands-100k", [{"kind": "scissorhands", "budget_tokens": 256}], 100_000, SHORT, {}, bar="0.4 of full-100k"
        ),
        # 700 blocks hold 17 sequences at their longest; more arrive than the engine can serve.
        Case("overload-100k", [], 100_000, SHORT, {"num_gpu_blocks": 700}, rate_per_s=40, bar="0.4 of full-100k"),
    ]  # fmt: skip
    if azure.exists():
        found.append(Case("azure-100k", [], 100_000, conversation, {}, bar="10000/s"))
    else:
        print(f"azure cases left out: {azure} is not there (see --azure)", file=sys.stderr)
    if million:
        found.append(Case("full-1M", [], 1_000_000, SHORT, {}, bar="2 GB"))
    return found


def simpy_timeouts_per_s(num_timeouts: int = 200_000) -> float:
    """What SimPy's own loop does with one process that does nothing but wait."""
    env = simpy.Environment()

    def wait() -> Any:
        for _ in range(num_timeouts):
            yield env.timeout(1)

    env.process(wait())
    start = time.perf_counter()
    env.run()
    return num_timeouts / (time.perf_counter() - start)


def check(case: Case) -> None:
    """Compares the case on a few requests with the reference simulation; raises AssertionError where they differ."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tests" / "reference.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = reference
    spec.loader.exec_module(reference)
    reference.check_against_reference(case.scenario(CHECKED_REQUESTS), case.name)


def measure(case: Case, repeat: int) -> dict[str, Any]:
    """Times a case; a row of the report."""
    scenario = case.scenario(case.num_requests)
    rows = []
    for _ in range(repeat):
        timeouts = simpy_timeouts_per_s()
        start = time.perf_counter()
        deployment = deploy(scenario)
        plan = build_plan(deployment, scenario.policies[case.name], case.name)
        result = run_policy(scenario, deployment, case.name, plan)
        elapsed = time.perf_counter() - start
        rows.append((case.num_requests / elapsed, timeouts, result.log.num_preemptions))
    best = max(rows)
    ratios = sorted(rate / timeouts for rate, timeouts, _ in rows)
    return {
        "case": case.name,
        "num_requests": case.num_requests,
        "requests_per_s": round(best[0], 1),
        "simpy_timeouts_per_s": round(best[1]),
        "requests_per_simpy_timeout": round(ratios[len(ratios) // 2], 5),
        "num_preemptions": best[2],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "bar": case.bar,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="machine-readable: one JSON list")
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case (default 3)")
    parser.add_argument("--million", action="store_true", help="add one million requests")
    parser.add_argument("--no-check", action="store_true", help="leave the comparison with the reference out")
    parser.add_argument("--azure", type=Path, default=AZURE, help="CSV with prompt_tokens and output_tokens")
    args = parser.parse_args()
    rows = []
    chosen = [case for case in cases(args.azure, args.million) if not args.case or case.name in args.case]
    if not chosen:
        parser.error(f"no such case; there are {', '.join(case.name for case in cases(args.azure, True))}")
    for case in chosen:
        if not args.no_check:
            check(case)
        rows.append(measure(case, args.repeat if case.num_requests < 1_000_000 else 1))
        if not args.json:
            row = rows[-1]
            print(
                f"{row['case']:22} {row['num_requests']:>9,} requests {row['requests_per_s']:>10,.0f} requests/s   "
                f"SimPy {row['simpy_timeouts_per_s']:>9,} timeouts/s   ratio {row['requests_per_simpy_timeout']:.4f}   "
                f"{row['peak_memory_mb']:>5} MB   bar {row['bar'] or '-'}",
                flush=True,
            )
    if args.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
