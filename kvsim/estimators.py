"""Estimators over requests: percentiles, means with an interval, the number in a system, a queue that grows.

Percentiles are nearest-rank: p99 is the smallest value that at least 99 % do not exceed. So "p99 <= limit" and "at
least 99 % of requests meet the limit" are one statement, which interpolated percentiles do not give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvsim.gaps import nearest_rank
from kvsim.units import PS_PER_S

NAN = float("nan")

_BATCHES = ((20, 2.093), (10, 2.262))  # number of batches; Student t, 97.5 % quantile, one degree of freedom fewer
_MIN_BATCH_REQUESTS = 10


@dataclass(frozen=True, slots=True)
class Distribution:
    """NaN where there are no values. mean_ci95_s: half-width of a 95 % interval for the mean, None if not to be had."""

    num_values: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float
    mean_ci95_s: float | None = None


@dataclass(frozen=True, slots=True)
class QueueGrowth:
    """What became of the queue while requests still arrived (all requests, warm-up included).

    overloaded: more wait at the last arrival than chance leaves behind (three standard deviations of the number of
    arrivals), and they did not all pile up in one burst at the end. TTFT then is a function of the length of the run.
    """

    offered_per_s: float
    taken_up_per_s: float
    waiting_halfway: int
    waiting_at_last_arrival: int
    arrivals_s: float
    """Time from the first arrival to the last."""
    overloaded: bool


def distribution(values_ps: np.ndarray) -> Distribution:
    """Of latencies in picoseconds, in order of arrival."""
    if not len(values_ps):
        return Distribution(0, NAN, NAN, NAN, NAN, NAN)
    ranked_s = np.sort(values_ps) / PS_PER_S
    p50_s, p90_s, p99_s = (float(ranked_s[nearest_rank(len(ranked_s), percent) - 1]) for percent in (50, 90, 99))
    mean_s, ci95_s = float(ranked_s.mean()), mean_ci95(values_ps / PS_PER_S)
    return Distribution(len(ranked_s), mean_s, p50_s, p90_s, p99_s, float(ranked_s[-1]), ci95_s)


def mean_ci95(values: np.ndarray) -> float | None:
    """Half-width of a 95 % interval for the mean of a correlated series, by batch means (Law & Kelton, chapter 9).

    None when the series is too short, or still so correlated from batch to batch (a queue that grows through the run)
    that an interval would claim a precision that is not there.
    """
    for num_batches, student_t in _BATCHES:
        if len(values) < num_batches * _MIN_BATCH_REQUESTS:
            continue
        means = np.array([batch.mean() for batch in np.array_split(values, num_batches)])
        deviation = means - means.mean()
        variance = float(deviation @ deviation)
        correlation = float(deviation[1:] @ deviation[:-1]) / variance if variance > 0 else 0.0
        if correlation <= 2 / num_batches**0.5:
            stderr = (variance / (num_batches - 1) / num_batches) ** 0.5
            return student_t * stderr
    return None


def queue_growth(arrival_ps: np.ndarray, scheduled_ps: np.ndarray) -> QueueGrowth | None:
    """Both in order of arrival, shape [requests]."""
    first_ps, last_ps, num_requests = int(arrival_ps.min()), int(arrival_ps.max()), len(arrival_ps)
    if last_ps == first_ps:
        return None

    def waiting_at(time_ps: int) -> int:
        return int(((arrival_ps <= time_ps) & (scheduled_ps > time_ps)).sum())

    arrivals_s = (last_ps - first_ps) / PS_PER_S
    halfway, at_end = waiting_at((first_ps + last_ps) // 2), waiting_at(last_ps)
    interarrival_ps = np.diff(np.sort(arrival_ps))
    burstiness = max(1.0, float(interarrival_ps.std() / interarrival_ps.mean()))
    grew = at_end > 3 * burstiness * num_requests**0.5 and 0.2 * at_end < halfway < at_end
    return QueueGrowth(
        offered_per_s=(num_requests - 1) / arrivals_s,
        taken_up_per_s=max(num_requests - 1 - at_end, 0) / arrivals_s,
        waiting_halfway=halfway,
        waiting_at_last_arrival=at_end,
        arrivals_s=arrivals_s,
        overloaded=bool(grew),
    )


class Intervals:
    """How many intervals [start, end) are open, over time inside a window."""

    def __init__(self, start_ps: np.ndarray, end_ps: np.ndarray, from_ps: int, until_ps: int) -> None:
        self.window_ps = max(until_ps - from_ps, 1)
        start, end = np.clip(start_ps, from_ps, until_ps), np.clip(end_ps, from_ps, until_ps)
        self.start_ps, self.end_ps = np.sort(start[end > start]), np.sort(end[end > start])

    def mean(self) -> float:
        return float((self.end_ps.astype(float).sum() - self.start_ps.astype(float).sum()) / self.window_ps)

    def max(self) -> int:
        opened = np.arange(1, len(self.start_ps) + 1)
        closed = np.searchsorted(self.end_ps, self.start_ps, side="right")
        return int((opened - closed).max(initial=0))
