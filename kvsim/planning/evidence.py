"""Whether an SLO is met at one rate, as far as the runs simulated there can tell.

"p99 <= limit" and "at least 99 % are within the limit" are one statement for nearest-rank percentiles, so every percentile is
judged as a share. Requests that follow each other share a queue, so the share's error comes from batch means (Law & Kelton,
chapter 9), told as the number of independent requests that would say as much, and the score test (Wilson 1927) of that many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvsim.gaps import GapRows, nearest_rank
from kvsim.metrics import SLO_METRICS
from kvsim.planning.result import Probe
from kvsim.planning.trial import Sample, span_needed_s
from kvsim.units import PS_PER_S, ps

STUDENT_T = 2.045
"""One-sided 97.5 % with 29 degrees of freedom, so that the two ends of a bracket hold together in 95 %."""
NUM_BATCHES = 30
MAX_CORRELATION = 0.9
FEW = 10
"""Misses below which their clustering is judged by the same number of latencies at the percentile instead."""
GOODPUT = "goodput_frac"


class State(Enum):
    MET, MISSED, OPEN = "met", "missed", "open"


class Criterion(NamedTuple):
    """One condition. share: of requests (or token gaps) that must be within limit_ps; None where their mean must be."""

    key: str
    metric: str
    limit_ps: int
    share: float | None


_E2E = Criterion("e2e_mean_s", "e2e", 1, None)


class Judged(NamedTuple):
    """value: the share within the limit, or the mean in seconds. distance: from the bound in standard errors, above 0 if met."""

    state: State
    value: float
    distance: float


def criteria(slo: Mapping[str, float], min_goodput_frac: float | None) -> tuple[Criterion, ...]:
    found = []
    for key, limit_s in slo.items():
        metric, statistic = key.removesuffix("_s").split("_")
        share = {"mean": None, "max": 1.0}[statistic] if statistic in ("mean", "max") else int(statistic[1:]) / 100
        found.append(Criterion(key, metric, ps(limit_s), share))
    if min_goodput_frac is not None:
        found.append(Criterion(GOODPUT, GOODPUT, 0, min_goodput_frac))
    return tuple(found)


@dataclass
class Evidence:
    """All runs at one rate."""

    rate_per_s: float
    criteria: Sequence[Criterion]
    slo: Mapping[str, float]
    is_random: bool
    capacity_per_s: float = float("inf")
    samples: list[Sample] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return sum(sample.num_requests for sample in self.samples)

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)

    def judged(self) -> dict[str, Judged]:
        return {criterion.key: self._judge(criterion) for criterion in self.criteria}

    def state(self) -> State:
        """MISSED where one condition is, or where the queue grew; MET where all are and the runs were long enough to know."""
        if any(sample.overloaded for sample in self.samples):
            return State.MISSED
        states = [judged.state for judged in self.judged().values()]
        if State.MISSED in states:
            return State.MISSED
        if State.OPEN in states or not self.long_enough():
            return State.OPEN
        return State.MET

    def long_enough(self) -> bool:
        return not self.is_random or max(sample.span_s for sample in self.samples) >= self._span_needed_s()

    def requests_needed(self) -> float:
        """Of a run that may say MET."""
        return self.rate_per_s * self._span_needed_s()

    def _span_needed_s(self) -> float:
        longest = max(self.samples, key=lambda sample: sample.num_requests)
        return span_needed_s(self.rate_per_s, self.capacity_per_s, longest.e2e_s)

    def margin(self) -> float:
        """Standard errors between the tightest condition and its bound, above 0 where it is met."""
        return min(judged.distance for judged in self.judged().values())

    def tightest(self) -> Criterion:
        """The condition that is nearest to being missed, or missed by most."""
        judged = self.judged()
        return min(self.criteria, key=lambda criterion: judged[criterion.key].distance)

    def meets(self) -> bool:
        """What the runs say at face value."""
        if any(sample.overloaded for sample in self.samples):
            return False
        judged = self.judged()
        return all(_holds(criterion, judged[criterion.key].value) for criterion in self.criteria)

    # -- one condition --------------------------------------------------------------------------------------------

    def _judge(self, criterion: Criterion) -> Judged:
        if criterion.share is None:
            return self._judge_mean(criterion)
        hits, counts = self._batches([self._hits(sample, criterion) for sample in self.samples])
        share, total = float(hits.sum() / counts.sum()), float(counts.sum())
        if not self.is_random or criterion.share == 1.0:
            return Judged(State.MET if _holds(criterion, share) else State.MISSED, share, share - criterion.share)
        effect = _design_effect(hits, counts, self._joins())
        if total * (1 - share) < FEW and criterion.metric != GOODPUT:
            at_percentile = self._limits_at(criterion)
            effect = max(effect, _design_effect(*self._batches(at_percentile), self._joins()))
        stderr = (criterion.share * (1 - criterion.share) * effect / total) ** 0.5  # as it would be at the bound
        return _judged(share, (share - criterion.share) / stderr)

    def _judge_mean(self, criterion: Criterion) -> Judged:
        sums, counts = self._batches([self._sums(sample, criterion.metric) for sample in self.samples])
        mean_ps = float(sums.sum() / max(float(counts.sum()), 1.0))
        if not self.is_random:
            state = State.MET if mean_ps <= criterion.limit_ps else State.MISSED
            return Judged(state, mean_ps / PS_PER_S, (criterion.limit_ps - mean_ps) / criterion.limit_ps)
        stderr = max(_variance(sums, counts, self._joins()) ** 0.5, 1e-9 * criterion.limit_ps)
        return _judged(mean_ps / PS_PER_S, (criterion.limit_ps - mean_ps) / stderr)

    def _hits(self, sample: Sample, criterion: Criterion) -> tuple[np.ndarray, np.ndarray]:
        """(within the limit, all), by request or by window of token gaps."""
        if criterion.metric == GOODPUT:
            met = good(sample, self.slo)
            return met.astype(float), np.ones(len(met))
        if criterion.metric == "itl":
            return _gap_hits(sample.gaps, criterion.limit_ps)
        values = _values(sample, criterion.metric)
        return (values <= criterion.limit_ps).astype(float), np.ones(len(values))

    def _limits_at(self, criterion: Criterion) -> list[tuple[np.ndarray, np.ndarray]]:
        """Hits under the limit that the latencies seen would just meet."""
        assert criterion.share is not None
        value_ps = int(self.percentile_s(criterion.metric, round(100 * criterion.share)) * PS_PER_S)
        return [self._hits(sample, criterion._replace(limit_ps=value_ps)) for sample in self.samples]

    def _sums(self, sample: Sample, metric: str) -> tuple[np.ndarray, np.ndarray]:
        if metric == "itl":
            counts = np.array([float(rows.num_gaps) for rows in sample.gaps])
            return np.array([rows.mean_ps() * rows.num_gaps for rows in sample.gaps]), counts
        values = _values(sample, metric)
        return values.astype(float), np.ones(len(values))

    def _sizes(self) -> list[int]:
        """Batches by run: as many as its share of all requests."""
        total = self.num_requests
        return [max(1, round(NUM_BATCHES * sample.num_requests / total)) for sample in self.samples]

    def _batches(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        sums, counts = [], []
        for (values, weights), number in zip(parts, self._sizes(), strict=True):
            edges = np.linspace(0, len(values), number + 1).astype(int)
            for start, end in pairwise(edges.tolist()):
                sums.append(float(values[start:end].sum()))
                counts.append(float(weights[start:end].sum()))
        return np.array(sums), np.array(counts)

    def _joins(self) -> np.ndarray:
        """For each batch but the last, whether the next one follows it in the same run."""
        joins = [part for number in self._sizes() for part in [True] * (number - 1) + [False]]
        return np.array(joins[:-1], bool)

    # -- for people -----------------------------------------------------------------------------------------------

    def percentile_s(self, metric: str, percent: int) -> float:
        if metric == "itl":
            rows = [rows for sample in self.samples for rows in sample.gaps]
            joined = GapRows(*(np.concatenate([getattr(r, name) for r in rows]) for name in GapRows.__dataclass_fields__))
            return joined.percentile_ps(percent) / PS_PER_S
        values = np.sort(np.concatenate([_values(sample, metric) for sample in self.samples]))
        return float(values[nearest_rank(len(values), percent) - 1]) / PS_PER_S if len(values) else 0.0

    def latency_s(self) -> dict[str, float]:
        """By SLO key: p50 and p99 of every latency, and what the SLO names."""
        metrics = [name for name in SLO_METRICS if name != "itl" or any(sample.gaps for sample in self.samples)]
        found = {f"{metric}_p{percent}_s": self.percentile_s(metric, percent) for metric in metrics for percent in (50, 99)}
        for criterion in self.criteria:
            if criterion.share is None:
                found[criterion.key] = self._judge_mean(criterion).value
            elif criterion.metric != GOODPUT:
                found[criterion.key] = self.percentile_s(criterion.metric, round(100 * criterion.share))
        return found

    def probe(self) -> Probe:
        weights = np.array([sample.num_requests for sample in self.samples], float)
        weights /= weights.sum()

        def mean(name: str) -> float:
            return float(weights @ [getattr(sample, name) for sample in self.samples])

        state = self.state()
        within = np.concatenate([good(sample, self.slo) for sample in self.samples])
        return Probe(
            rate_per_s=self.rate_per_s, num_requests=self.num_requests, num_seeds=len(self.samples),
            meets_slo=state is State.MET or (state is State.OPEN and self.meets()), decided=state is not State.OPEN,
            latency_s=self.latency_s(),
            goodput_frac=float(within.mean()) if any(not key.startswith("itl_") for key in self.slo) else None,
            output_tokens_per_s=mean("output_tokens_per_s"), mean_batch=mean("mean_batch"),
            mean_in_system=self.rate_per_s * self._judge_mean(_E2E).value,
            utilisation_frac=mean("utilisation_frac"), peak_pool_frac=max(sample.peak_pool_frac for sample in self.samples),
        )  # fmt: skip


def _judged(value: float, distance: float) -> Judged:
    state = State.MET if distance >= STUDENT_T else State.MISSED if distance <= -STUDENT_T else State.OPEN
    return Judged(state, value, distance)


def _holds(criterion: Criterion, value: float) -> bool:
    """A share of 0.99 of 1000 is 990, whatever binary fractions make of it."""
    if criterion.share is None:
        return value * PS_PER_S <= criterion.limit_ps
    return value >= criterion.share - 1e-12


def _values(sample: Sample, metric: str) -> np.ndarray:
    values = sample.latency_ps[metric]
    return values[sample.several] if metric == "tpot" else values


def good(sample: Sample, slo: Mapping[str, float]) -> np.ndarray:
    """Which requests are within every limit, whichever statistic its key names (kvsim.metrics)."""
    met = np.ones(len(sample.several), bool)
    for key, limit_s in slo.items():
        metric = key.split("_")[0]
        if metric != "itl":
            met &= (sample.latency_ps[metric] <= ps(limit_s)) | (~sample.several if metric == "tpot" else False)
    return met


def _gap_hits(gaps: Sequence[GapRows], limit_ps: int) -> tuple[np.ndarray, np.ndarray]:
    hits = []
    for rows in gaps:
        steps = np.clip((limit_ps - rows.first_ps) // np.maximum(rows.growth_ps, 1) + 1, 0, rows.num_steps)
        hits.append(float((steps * rows.weight).sum()))
    return np.array(hits), np.array([float(rows.num_gaps) for rows in gaps])


def _variance(sums: np.ndarray, counts: np.ndarray, joins: np.ndarray) -> float:
    """Of the ratio of the totals: from batch to batch, more where neighbours in a run are still alike."""
    number, total = len(sums), float(counts.sum())
    if number < 2 or total <= 0:
        return float("inf")
    rest = sums - counts * (sums.sum() / total)
    squares = float(rest @ rest)
    if squares <= 0:
        return 0.0
    correlation = min(max(float((rest[1:] * rest[:-1])[joins].sum()) / squares, 0.0), MAX_CORRELATION)
    return squares * number / (number - 1) / total**2 * (1 + correlation) / (1 - correlation)


def _design_effect(hits: np.ndarray, counts: np.ndarray, joins: np.ndarray) -> float:
    """How many times more a share varies than one of independent requests would; at least 1."""
    total = float(counts.sum())
    share = float(hits.sum()) / total
    independent = share * (1 - share) / total
    return max(1.0, _variance(hits, counts, joins) / independent) if independent > 0 else 1.0
