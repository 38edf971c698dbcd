"""What the tables and charts of a plan share: who can be deployed, at what price, load and latency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvsim.planning.result import Option, PlanResult

BINDS = {
    "compute": "compute",
    "hbm_bandwidth": "HBM bandwidth",
    "kv_capacity": "KV capacity",
    "host": "host work",
    "interconnect": "GPU links",
    "latency": "latency alone",
}


def deployable(plan: PlanResult) -> list[Option]:
    """In order of rank."""
    return [option for option in plan.options if option.reason is None]


def refused(plan: PlanResult) -> list[Option]:
    return [option for option in plan.options if option.reason is not None]


def priced(plan: PlanResult) -> bool:
    """Whether every option that can be deployed has a price."""
    found = deployable(plan)
    return bool(found) and all(option.cost_per_hour is not None for option in found)


def price(plan: PlanResult, option: Option) -> float | None:
    """What the options are ranked by: cost per hour, or GPUs where no price is given."""
    if priced(plan):
        return option.cost_per_hour
    return None if option.num_gpus is None else float(option.num_gpus)


def price_label(plan: PlanResult) -> str:
    return f"{plan.currency or 'cost'} per hour" if priced(plan) else "GPUs"


def load_per_replica(plan: PlanResult, option: Option) -> float | None:
    """Requests per second that each replica gets of the target."""
    return plan.target_rate_per_s / option.replicas if option.replicas else None


def latency_at_load(plan: PlanResult, option: Option, key: str) -> float | None:
    """Of an SLO key, in seconds, when the target is spread over the replicas: on a straight line between the two loads that were
    simulated around it. Below the lightest one that one's (an upper bound); above the heaviest None."""
    operating = load_per_replica(plan, option)
    points = sorted((probe.rate_per_s, probe.latency_s[key]) for probe in option.probes if key in probe.latency_s)
    if operating is None or not points or operating > points[-1][0] * (1 + 1e-9):
        return None
    rates, values = zip(*points, strict=True)
    return float(np.interp(operating, rates, values))


def undominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of points that no other matches or beats in both coordinates and beats in one; smaller is better."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]


def slo_label(key: str) -> str:
    """ttft_p99_s: TTFT p99."""
    metric, _, statistic = key.removesuffix("_s").partition("_")
    return f"{metric.upper()} {statistic}"
