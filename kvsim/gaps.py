"""Token gaps (ITL) of a run, and their exact percentiles, without ever writing the tokens out.

A row of steps gives `weight` sequences one gap in each of its steps: first_ps, first_ps + growth_ps, and so on. How
many gaps of a row are at most x is therefore a closed form, and a percentile is found by bisecting the integer x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvsim.recording import RunLog

_FEW_GAPS = 3_000
"""Below so many a percentile is quicker found by sorting them."""


@dataclass(frozen=True, slots=True)
class GapRows:
    """Arithmetic series of gaps, growth_ps >= 0, as int64 arrays of shape [rows].

    A negative weight takes gaps away that another row has: a stalled sequence leaves its row and comes back as its own.
    """

    first_ps: np.ndarray
    growth_ps: np.ndarray
    num_steps: np.ndarray
    weight: np.ndarray

    @property
    def num_gaps(self) -> int:
        return int((self.num_steps * self.weight).sum())

    def mean_ps(self) -> float:
        """Mean over all gaps; in floating point, since the sum itself need not fit into 64 bits."""
        if not self.num_gaps:
            return float("nan")
        row_sum_ps = self.num_steps * self.first_ps + self.growth_ps * (self.num_steps * (self.num_steps - 1) // 2)
        return float(row_sum_ps.astype(float) @ self.weight.astype(float)) / self.num_gaps

    def percentile_ps(self, percent: int) -> int:
        """The smallest gap that at least `percent` % of all gaps do not exceed: always a gap that occurred."""
        rank = nearest_rank(self.num_gaps, percent)
        first, growth, num, weight = self.first_ps, self.growth_ps, self.num_steps, self.weight
        last = first + growth * (num - 1)
        low, high = int(first.min()) - 1, int(last.max())  # gaps <= low: fewer than rank; gaps <= high: at least rank
        settled = 0  # gaps of the rows that lie wholly at or below `low`
        while high - low > 1:
            if num.sum() <= _FEW_GAPS:
                return _ranked(first, growth, num, weight, rank - settled)
            middle = (low + high) // 2
            steps_at_most = np.clip((middle - first) // np.maximum(growth, 1) + 1, 0, num)
            below = settled + int((steps_at_most * weight).sum())
            if below >= rank:
                high, keep = middle, first <= middle
            else:
                low, keep = middle, last > middle
                settled += int((num * weight)[~keep].sum())
            if not keep.all():
                first, growth, num, weight, last = (a[keep] for a in (first, growth, num, weight, last))
        return high


def _ranked(first: np.ndarray, growth: np.ndarray, num: np.ndarray, weight: np.ndarray, rank: int) -> int:
    """The smallest gap of these rows that `rank` gaps do not exceed, by writing them out."""
    step = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
    gaps, weights = np.repeat(first, num) + np.repeat(growth, num) * step, np.repeat(weight, num)
    order = np.lexsort((weights, gaps))  # among equal gaps those taken away come first, so that counts never overshoot
    return int(gaps[order][np.argmax(np.cumsum(weights[order]) >= rank)])


def nearest_rank(count: int, percent: int) -> int:
    """1-based rank of the smallest of `count` sorted values that at least `percent` % of them do not exceed."""
    return max(1, -(-count * percent // 100))


def gap_rows(log: RunLog, from_ps: int | None = None, until_ps: int | None = None) -> GapRows:
    """The gaps of the rows that start in [from_ps, until_ps), stalls included, and all gaps that span a preemption."""
    steps, stalls = log.step_columns(), log.stall_columns()
    inside = np.ones(len(steps["start_ps"]), bool)
    if from_ps is not None:
        inside &= steps["start_ps"] >= from_ps
    if until_ps is not None:
        inside &= steps["start_ps"] < until_ps
    stalled = inside[stalls["step_row"]]
    stalled_first = steps["first_step_ps"][stalls["step_row"]][stalled]
    stalled_sequences = stalls["num_sequences"][stalled]
    resumed = np.array(log.resumed_gaps_ps, dtype=np.int64)
    ones, zeros = np.ones(len(resumed), np.int64), np.zeros(len(resumed), np.int64)
    stall_ones, stall_zeros = np.ones_like(stalled_first), np.zeros_like(stalled_first)
    first = (steps["first_step_ps"][inside], stalled_first, stalled_first + stalls["extra_ps"][stalled], resumed)
    growth = (steps["step_growth_ps"][inside], stall_zeros, stall_zeros, zeros)
    num = (steps["num_steps"][inside], stall_ones, stall_ones, ones)
    weight = (steps["num_decodes"][inside], -stalled_sequences, stalled_sequences, ones)
    return _normalised(*(np.concatenate(parts).astype(np.int64) for parts in (first, growth, num, weight)))


def _normalised(first: np.ndarray, growth: np.ndarray, num: np.ndarray, weight: np.ndarray) -> GapRows:
    """Drop empty rows, read shrinking rows backwards, and fold rows of equal steps into one step of more weight."""
    some = (num > 0) & (weight != 0)
    first, growth, num, weight = first[some], growth[some], num[some], weight[some]
    first = np.where(growth < 0, first + growth * (num - 1), first)
    growth = np.abs(growth)
    equal = (growth == 0) | (num == 1)
    weight = np.where(equal, weight * num, weight)
    return GapRows(first, np.where(equal, 0, growth), np.where(equal, 1, num), weight)
