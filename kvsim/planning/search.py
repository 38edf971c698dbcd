"""The highest rate that meets the SLO: a bracket on the logarithm of the rate, narrowed by verdicts that are sure.

Every rate is simulated with the same requests, compressed in time, so verdicts differ by the rate and not by luck. A verdict that
is open is no reason to simulate at length while the bracket is wide: the search goes on at both sides of it, and comes back
with more requests when the rest of the bracket is as narrow as their number deserves. No rate at or above the engine's
throughput with a queue always there can be borne for long, whatever a short run says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, log, sqrt

from kvsim.planning.evidence import STUDENT_T, Criterion, Evidence, State
from kvsim.planning.trial import Capacity, Trial

FIRST_REQUESTS, FEWEST_REQUESTS = 500, 2000
"""The first run at a rate, and what is simulated before a verdict is left open; in 500 requests a p99 is hardly ever sure."""
START_FRAC = 0.7
"""Of the capacity: where the search begins. Latency targets are usually missed somewhere between a half of it and all of it."""
LEAST_FRAC = 1 / 128
"""Of the capacity: an SLO that is missed there is missed by a request that meets nobody."""
GAP_FACTORS = (8.0, 4.0, 2.0, 1.0)
"""How many tolerances wide the decided part of a bracket may stay while a rate is worth 1/8, 1/4, 1/2 and all of the requests."""
GAP_FRAC = 0.3
"""Of a bracket whose verdicts in between are open: what lies outside them is not worth narrowing below this."""
FAVOUR = 1.0
"""Standard errors by which what is still to be simulated may move a verdict; one that stays open even then is left open at once."""


@dataclass
class Found:
    """rate_per_s: highest that meets the SLO; None where none does. failing_rate_per_s: lowest that misses it.

    by_capacity: the failing rate is the engine's throughput itself, and no latency was missed below it.
    """

    rate_per_s: float | None
    failing_rate_per_s: float
    capacity: Capacity
    by_capacity: bool
    evidence: dict[float, Evidence] = field(default_factory=dict)

    @property
    def is_wide(self) -> bool:
        """Rates between the two were simulated with all requests allowed, and remain open."""
        return any(self.is_between(rate) for rate in self.evidence)

    def is_between(self, rate_per_s: float) -> bool:
        return self.rate_per_s is not None and self.rate_per_s < rate_per_s < self.failing_rate_per_s


class Search:
    """Runs at each rate, shared by all questions about it."""

    def __init__(
        self, trial: Trial, criteria: Sequence[Criterion], slo: dict[str, float], max_requests: int, tolerance_frac: float,
        told: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.trial, self.criteria, self.slo = trial, criteria, slo
        self.max_requests, self.tolerance = max_requests, log(1 + tolerance_frac)
        self.evidence: dict[float, Evidence] = {}
        self.capacity_per_s = inf
        self._whole = False  # a verdict was taken back: from then on none is believed early
        self._told = told

    def find(self) -> Found:
        capacity = self.trial.capacity(self.trial.traffic.seed(0))
        self.capacity_per_s = capacity.rate_per_s
        low, high = self._floor(START_FRAC * capacity.rate_per_s, capacity.rate_per_s)
        low, high = self._confirmed(low, high)
        return Found(low, high, capacity, high == capacity.rate_per_s, self.evidence)

    def _confirmed(self, low: float | None, high: float) -> tuple[float | None, float]:
        """Narrows a bracket until both ends hold with all requests allowed.

        A verdict that is looked at again and again until it is sure is sometimes sure by luck, and runs at neighbouring rates share
        that luck. An end that more requests take back makes way for the next one that holds.
        """
        last = len(GAP_FACTORS) - 1
        while low is not None:
            low, high = self._narrow(low, high)
            if self.decide(low, last, whole=True) is not State.MET:
                self._whole = True
                below = [rate for rate in self.evidence if rate < low and self._is(rate, State.MET)]
                if below:
                    low = max(below)
                else:
                    low, high = self._floor(min(self.evidence) / 2, high)
            elif high < self.capacity_per_s and self.decide(high, last, whole=True) is not State.MISSED:
                self._whole = True
                above = [rate for rate in self.evidence if rate > high and self._is(rate, State.MISSED)]
                high = min(above, default=self.capacity_per_s)
            else:
                break
        return low, high

    def _is(self, rate_per_s: float, state: State) -> bool:
        return self.evidence[rate_per_s].state() is state

    def _floor(self, rate: float, high: float) -> tuple[float | None, float]:
        """(a rate that meets the SLO, the lowest that misses it), going down from a rate by halves."""
        while rate >= LEAST_FRAC * self.capacity_per_s:
            state = self.decide(rate, 0)
            if state is State.MET:
                return rate, high
            if state is State.MISSED:
                high = rate
            rate /= 2
        lowest = min(self.evidence)
        return (lowest if self.decide(lowest, len(GAP_FACTORS) - 1) is State.MET else None), high

    def _narrow(self, low: float, high: float) -> tuple[float, float]:
        level = 0
        while log(high / low) > self.tolerance:
            between = self._between(low, high)
            if not between:
                rate = sqrt(low * high)
            else:
                below, above = log(between[0] / low), log(high / between[-1])
                if max(below, above) <= max(self.tolerance * GAP_FACTORS[level], GAP_FRAC * log(high / low)):
                    if level + 1 == len(GAP_FACTORS):
                        break
                    level += 1
                    low, high = self._again(low, high, level)
                    continue
                rate = sqrt(low * between[0]) if below >= above else sqrt(between[-1] * high)
            low, high = self._moved(rate, self.decide(rate, level), low, high)
        return low, high

    def _between(self, low: float, high: float) -> list[float]:
        """Rates inside a bracket, all of them open."""
        return sorted(rate for rate in self.evidence if low < rate < high)

    def _again(self, low: float, high: float, level: int) -> tuple[float, float]:
        """Open verdicts with more requests, from both ends of the bracket inwards, as long as they can be decided."""
        for rate in self._between(low, high):
            before, (low, high) = (low, high), self._moved(rate, self.decide(rate, level), low, high)
            if (low, high) == before:
                break
        for rate in reversed(self._between(low, high)):
            before, (low, high) = (low, high), self._moved(rate, self.decide(rate, level), low, high)
            if (low, high) == before:
                break
        return low, high

    @staticmethod
    def _moved(rate: float, state: State, low: float, high: float) -> tuple[float, float]:
        if state is State.MET:
            return max(low, rate), high
        return (low, min(high, rate)) if state is State.MISSED else (low, high)

    def decide(self, rate_per_s: float, level: int, whole: bool = False) -> State:
        """Simulates at this rate, twice as much each time, until the verdict is sure or the level's share of requests is used.

        whole: uses that share even if the verdict is sure before.
        """
        traffic = self.trial.traffic
        found = self.evidence.get(rate_per_s)
        if found is None:
            found = self.evidence[rate_per_s] = Evidence(
                rate_per_s, self.criteria, self.slo, traffic.is_random, self.capacity_per_s
            )  # fmt: skip
        most = max(self.max_requests / GAP_FACTORS[level], min(self.max_requests, FEWEST_REQUESTS))
        while True:
            done = found.num_requests
            if found.samples:
                state = found.state()
                sure = state is not State.OPEN and not (whole or (self._whole and state is State.MET))
                if sure or not traffic.is_random or 2 * done > most:
                    return state
                if state is State.OPEN and not whole and self._hopeless(found, most):
                    return state
            number = done or (FIRST_REQUESTS if traffic.is_random else traffic.num_requests)
            found.add(self.trial.run(rate_per_s, traffic.seed(len(found.samples)), number))
            if self._told is not None:
                self._told()

    @staticmethod
    def _hopeless(found: Evidence, most: float) -> bool:
        """Whether the rest of `most` requests would leave an open verdict open: it is too close, or the run too short to see it met."""
        margin = found.margin()
        if margin > 0 and found.requests_needed() > most:
            return True
        return found.long_enough() and (abs(margin) + FAVOUR) * sqrt(most / found.num_requests) < STUDENT_T
