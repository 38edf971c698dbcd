"""From the rate of one replica to replicas, GPUs, money and energy."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

SECONDS_PER_HOUR = 3600
WATTS_PER_KILOWATT = 1000
MILLION = 1_000_000
_ROUNDING = 1e-9
"""A target of exactly two rates takes two replicas, whatever binary fractions make of it."""


class Economics(NamedTuple):
    """Fields as `kvsim.planning.result.Option`; of the deployment while it bears the target load."""

    replicas: int
    num_gpus: int
    headroom_frac: float
    cost_per_hour: float | None
    cost_per_million_output_tokens: float | None
    watts: float
    kwh_per_million_output_tokens: float
    gpu_hours_per_million_output_tokens: float


def economics(
    rate_per_s: float, target_rate_per_s: float, gpus_per_replica: int, mean_output_tokens: float,
    price_per_gpu_hour: float | None, board_power_w: float,
) -> Economics:  # fmt: skip
    """rate_per_s: what one replica bears. Whole replicas are paid, so the last one may be idle in part."""
    replicas = max(1, ceil(target_rate_per_s / rate_per_s - _ROUNDING))
    num_gpus = replicas * gpus_per_replica
    millions_per_hour = target_rate_per_s * mean_output_tokens * SECONDS_PER_HOUR / MILLION
    cost = None if price_per_gpu_hour is None else num_gpus * price_per_gpu_hour
    watts = num_gpus * board_power_w
    return Economics(
        replicas=replicas, num_gpus=num_gpus, headroom_frac=max(0.0, 1 - target_rate_per_s / (replicas * rate_per_s)),
        cost_per_hour=cost, cost_per_million_output_tokens=None if cost is None else cost / millions_per_hour, watts=watts,
        kwh_per_million_output_tokens=watts / WATTS_PER_KILOWATT / millions_per_hour,
        gpu_hours_per_million_output_tokens=num_gpus / millions_per_hour,
    )  # fmt: skip
