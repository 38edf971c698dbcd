"""One candidate, simulated again and again at different rates; what a run leaves for a verdict."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from kvsim.api import run_policy
from kvsim.gaps import GapRows, gap_rows
from kvsim.planning.candidates import Candidate, resources
from kvsim.planning.traffic import AS_IT_IS, Change, Traffic
from kvsim.profile import biased
from kvsim.recording import RunLog
from kvsim.result import Basis, LedgerLine, PolicyResult
from kvsim.serving import Parts
from kvsim.timeline import timeline
from kvsim.units import PS_PER_S

WARMUP_FRAC, DRAIN_FRAC = 1 / 8, 1 / 16
"""Requests that find the engine filling up, and that leave it emptying, are left out of a verdict: two mean latencies and a
relaxation time of those below, and one latency."""
MIN_LIFETIMES, MIN_RELAXATIONS = 16, 8
"""Arrivals must span so many mean latencies, and relaxation times, before a run may say that the SLO is met: a shorter one has not
seen the load, since a queue near the engine's capacity takes long to grow to what it will be."""
GAP_WINDOWS = 32
"""Stretches of a run whose token gaps are counted apart, for the spread between them."""
ALL_AT_ONCE_PER_S = 1e6
"""A rate at which all requests are there before the first step has ended."""
CAPACITY_REQUESTS, MOST_CAPACITY_REQUESTS = 1000, 32_000
_FILL_FRAC = 0.25


@dataclass(frozen=True)
class Sample:
    """One run at one rate.

    latency_ps: by metric, of the counted requests in order of arrival; TPOT of a single token is 0, which meets any limit.
    gaps: token gaps by window of time. overloaded: the queue grew until arrivals stopped (kvsim.estimators.QueueGrowth).
    span_s, e2e_s: from the first arrival to the last, and mean latency of the counted requests.
    """

    num_requests: int
    latency_ps: Mapping[str, np.ndarray]
    several: np.ndarray
    gaps: tuple[GapRows, ...]
    overloaded: bool
    span_s: float
    e2e_s: float
    output_tokens_per_s: float
    mean_batch: float
    max_batch: int
    utilisation_frac: float
    peak_pool_frac: float
    num_preemptions: int
    op_s: Mapping[str, float]
    basis: tuple[Basis, ...]
    ledger: tuple[LedgerLine, ...]
    notes: tuple[str, ...]
    loads: tuple[tuple[int, int, float], ...]
    """(decoding sequences, prompt tokens of a step, share of busy time): what the engine's steps were made of."""


@dataclass(frozen=True)
class Capacity:
    """What the engine gets through while a queue is always there.

    pool_full: sequences wait because blocks are short. batch_full: because the batch has its most sequences.
    """

    rate_per_s: float
    mean_batch: float
    pool_full: bool


def span_needed_s(rate_per_s: float, capacity_per_s: float, e2e_s: float) -> float:
    """See MIN_LIFETIMES. The relaxation time is that of a queue of random arrivals and services, 1 / (capacity (1 - √load)²)."""
    if rate_per_s >= capacity_per_s:
        return float("inf")
    relaxation_s = 1 / (capacity_per_s * (1 - (rate_per_s / capacity_per_s) ** 0.5) ** 2)
    return max(MIN_LIFETIMES * e2e_s, MIN_RELAXATIONS * relaxation_s)


class Trial:
    """A candidate under fixed conditions. factors: calibration errors as `kvsim.profile.biased` takes them."""

    def __init__(
        self, candidate: Candidate, traffic: Traffic, *, factors: Mapping[tuple[str, str] | str, float] | None = None,
        change: Change = AS_IT_IS, needs_gaps: bool = False,
    ) -> None:  # fmt: skip
        self.candidate, self.traffic, self.change, self._needs_gaps = candidate, traffic, change, needs_gaps
        parts = resources(candidate)
        self.deployment, self.plan = parts.deployment, parts.plan
        if factors is not None:
            self.deployment = self.deployment._replace(profile=biased(self.deployment.profile, factors))
        self._ledger = parts.ledger
        self._parts: Parts | None = None

    def run(self, rate_per_s: float, seed: int, num_requests: int) -> Sample:
        """Simulates; raises KvsimError for a request that cannot be served."""
        result = self._simulate(rate_per_s, seed, num_requests)
        log, summary = result.log, result.summary
        columns = log.request_columns()
        order = np.argsort(columns["index"], kind="stable")
        total = len(order)
        if self.traffic.is_random:
            order = order[round(total * WARMUP_FRAC) : total - round(total * DRAIN_FRAC)]
        else:
            order = order[self.traffic.config.warmup_requests :]
        arrival, first, finish = (columns[f"{name}_ps"][order] for name in ("arrival", "first_token", "finish"))
        gaps = columns["output_tokens"][order] - 1
        span_ps = float(columns["arrival_ps"].max() - columns["arrival_ps"].min())
        return Sample(
            num_requests=total,
            latency_ps={
                "ttft": first - arrival, "e2e": finish - arrival, "queue": columns["scheduled_ps"][order] - arrival,
                "tpot": (finish - first) / np.maximum(gaps, 1),
            },
            several=gaps > 0,
            gaps=_gap_windows(log, int(arrival.min()), int(arrival.max())) if self._needs_gaps else (),
            overloaded=summary.queue_growth is not None and summary.queue_growth.overloaded,
            span_s=span_ps / PS_PER_S, e2e_s=float((finish - arrival).mean()) / PS_PER_S,
            output_tokens_per_s=summary.output_tokens_per_s,
            mean_batch=summary.mean_decode_batch_sequences, max_batch=summary.max_running_requests,
            utilisation_frac=summary.utilisation_frac,
            peak_pool_frac=summary.peak_held_units / result.pool_units,
            num_preemptions=summary.num_preemptions,
            op_s=summary.op_s, basis=result.basis, ledger=result.ledger, notes=result.notes, loads=_loads(log),
        )  # fmt: skip

    def capacity(self, seed: int) -> Capacity:
        """Throughput with everything queued at the start, from a quarter of the answers on until the queue is empty.

        Counted in output tokens, and told as requests of mean length: which of the sampled lengths happen to end in that time
        would tell more of luck than of the engine.
        """
        num_requests = CAPACITY_REQUESTS
        while True:
            result = self._simulate(ALL_AT_ONCE_PER_S, seed, num_requests)
            log, runs = result.log, timeline(result.log)
            finish = np.sort(log.request_columns()["finish_ps"])
            from_ps = int(finish[int(len(finish) * _FILL_FRAC)])
            waiting = np.flatnonzero(runs.num_waiting > 0)
            until_ps = int(runs.start_ps[waiting[-1]]) if len(waiting) else 0
            done = int(((finish > from_ps) & (finish <= until_ps)).sum())
            if done >= len(finish) / 3 or num_requests >= MOST_CAPACITY_REQUESTS or len(finish) < num_requests:
                break
            num_requests *= 4
        if done < 2:  # everything fits the batch at once: the whole run is the best figure there is
            from_ps, until_ps = 0, log.end_ps
        inside = runs.overlap_ps(from_ps, until_ps) / np.maximum(runs.end_ps - runs.start_ps, 1)
        tokens = float(inside @ (runs.num_decodes * runs.num_steps + runs.num_first_tokens))
        mean = self.traffic.mean_output_tokens * self.change.output_x
        busy = runs.overlap_ps(from_ps, until_ps).astype(float)
        held = float(busy @ runs.held_units) / max(float(busy.sum()), 1.0) / result.pool_units
        batch = float(busy @ runs.num_decodes) / max(float(busy.sum()), 1.0)
        return Capacity(
            rate_per_s=tokens / ((until_ps - from_ps) / PS_PER_S) / mean, mean_batch=batch,
            pool_full=result.summary.num_preemptions > 0 or held > _FULL_POOL_FRAC,
        )  # fmt: skip

    def _simulate(self, rate_per_s: float, seed: int, num_requests: int) -> PolicyResult:
        workload = self.traffic.at(rate_per_s, seed, num_requests, self.change)
        scenario = self.candidate.scenario.model_copy(update={"workload": workload})
        source = self.traffic.source(workload, self.change)
        self._parts = self._parts or Parts(self.deployment, self.plan, self._ledger, source)
        return run_policy(scenario, self.deployment, self.candidate.policy, self.plan, source=source, parts=self._parts)


_FULL_POOL_FRAC = 0.9
"""Of the pool held on average while a queue waits: what is free is less than a few prompts take."""


def _gap_windows(log: RunLog, from_ps: int, until_ps: int) -> tuple[GapRows, ...]:
    edges = np.linspace(from_ps, until_ps, GAP_WINDOWS + 1).astype(np.int64).tolist()
    plain = replace(log, resumed_gaps_ps=array("q"))  # those of preempted sequences belong to no window
    windows = [gap_rows(plain, start, end) for start, end in pairwise(edges)]
    only_resumed = replace(log, steps=array("q"), stalls=array("q"))
    return tuple(rows for rows in (*windows, gap_rows(only_resumed)) if rows.num_gaps)


def _loads(log: RunLog) -> tuple[tuple[int, int, float], ...]:
    """Steps grouped by what they compute, in steps of a quarter octave, with the share of busy time of each group."""
    rows = log.step_columns()
    steps = rows["num_steps"]
    duration = steps * rows["first_step_ps"] + rows["step_growth_ps"] * (steps * (steps - 1) // 2)
    keys = np.stack([_rounded(rows["num_decodes"]), _rounded(rows["prefill_tokens"])], 1)
    kinds, where = np.unique(keys, axis=0, return_inverse=True)
    shares = np.bincount(where.ravel(), weights=duration.astype(float)) / max(float(duration.sum()), 1.0)
    return tuple((int(d), int(p), float(s)) for (d, p), s in zip(kinds, shares, strict=True))


def _rounded(values: np.ndarray) -> np.ndarray:
    """To the next quarter octave; 0 stays."""
    return np.where(values > 0, np.rint(2 ** (np.rint(4 * np.log2(np.maximum(values, 1))) / 4)), 0).astype(np.int64)
