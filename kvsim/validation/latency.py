"""Latencies and queue lengths of a measured run and of its simulation, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvsim.api import deploy
from kvsim.result import PolicyResult
from kvsim.scenario import Scenario
from kvsim.units import PS_PER_S
from kvsim.validation.cases import Row
from kvsim.validation.naive import roofline_of

TYPICAL = "median error of a request"
LIMITS = {
    ("mean", "ttft_s"): 0.03, ("mean", "tpot_ms"): 0.03, ("mean", "e2e_s"): 0.03,
    ("P99", "ttft_s"): 0.06, ("P99", "tpot_ms"): 0.06, ("P99", "e2e_s"): 0.06,
    (TYPICAL, "ttft_s"): 0.15, (TYPICAL, "e2e_s"): 0.05,
}  # fmt: skip
"""Bars, by case and metric."""
NUM_BINS = 200
"""Of the run's duration, for counts over time."""

Spans = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Start and end in seconds of each request's stay in a state, by state."""


def simulated_times(result: PolicyResult) -> dict[str, np.ndarray]:
    """By request, in order of arrival: ttft_s, tpot_ms, e2e_s, output_tokens, and arrival_s, scheduled_s, finish_s."""
    logged = result.log.request_columns()
    order = np.argsort(logged["index"])
    arrival, scheduled, first, finish, tokens = (
        logged[name][order] for name in ("arrival_ps", "scheduled_ps", "first_token_ps", "finish_ps", "output_tokens")
    )
    return {
        "ttft_s": (first - arrival) / PS_PER_S,
        "tpot_ms": (finish - first) / PS_PER_S / np.maximum(tokens - 1, 1) * 1e3,
        "e2e_s": (finish - arrival) / PS_PER_S, "output_tokens": tokens,
        "arrival_s": arrival / PS_PER_S, "scheduled_s": scheduled / PS_PER_S, "finish_s": finish / PS_PER_S,
    }  # fmt: skip


def roofline_times(scenario: Scenario, prompt_tokens: np.ndarray, output_tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Each request alone on the datasheet: no queue, no batch, no engine."""
    d = deploy(scenario)
    unlike = set(zip(prompt_tokens.tolist(), output_tokens.tolist(), strict=True))
    one = {pair: roofline_of(d.gpu, d.model, d.tp, d.weight_dtype, 1, *pair) for pair in unlike}
    each = [one[pair] for pair in zip(prompt_tokens.tolist(), output_tokens.tolist(), strict=True)]
    ttft, tpot = (np.array([values[name] for values in each]) for name in ("ttft_ms", "tpot_ms"))
    e2e = (ttft + tpot * (output_tokens - 1)) / 1e3
    return {"ttft_s": ttft / 1e3, "tpot_ms": tpot, "e2e_s": e2e, "output_tokens": output_tokens}


def compare_latencies(
    truth: Mapping[str, np.ndarray], simulated: Mapping[str, np.ndarray], suite: str, group: str, source: str, paired: bool = True,
    naive: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> list[Row]:  # fmt: skip
    """Mean and percentiles of TTFT, TPOT and E2E, and, where request i is the same on both sides, single requests.

    TPOT is that of requests with a second token. naive: what naive models say of the same requests, by name.
    """
    guesses = naive or {}
    found = []
    for metric in ("ttft_s", "tpot_ms", "e2e_s"):
        real, value = (_of(side, metric) for side in (truth, simulated))
        if not len(real) or not len(value):
            continue
        means = {name: float(_of(side, metric).mean()) for name, side in guesses.items()}
        found.append(Row(suite, group, "mean", metric, float(real.mean()), float(value.mean()), source, means))
        for percent in (50, 90, 99):
            at = [float(np.percentile(side, percent)) for side in (real, value)]
            ranks = {name: float(np.percentile(_of(side, metric), percent)) for name, side in guesses.items()}
            found.append(Row(suite, group, f"P{percent}", metric, at[0], at[1], source, ranks))
        if paired:
            known = real > 0
            if known.any():
                sizes = np.abs(value[known] / real[known] - 1)
                for case, percent in ((TYPICAL, 50), ("90 % of requests within", 90)):
                    found.append(Row(suite, group, case, metric, 1.0, 1.0 + float(np.percentile(sizes, percent)), source))
    return found


def _of(side: Mapping[str, np.ndarray], metric: str) -> np.ndarray:
    values: np.ndarray = side[metric][side["output_tokens"] > 1] if metric == "tpot_ms" else side[metric]
    return values


def compare_counts(truth: Spans, simulated: Spans, suite: str, group: str, source: str) -> list[Row]:
    """Requests in each state: time average, maximum, and how far apart the two are over time, in units of the average."""
    found = []
    for state, (start, end) in truth.items():
        others = simulated[state]
        edges = np.linspace(0.0, max(float(end.max()), float(others[1].max())), NUM_BINS + 1)
        real, value = mean_counts(start, end, edges), mean_counts(*others, edges)
        metric = f"requests {state}"
        found.append(Row(suite, group, "mean", metric, float(real.mean()), float(value.mean()), source))
        peaks = [float(_most(*side)) for side in ((start, end), others)]
        found.append(Row(suite, group, "most at once", metric, peaks[0], peaks[1], source))
        if real.mean() > 0:
            apart = float(np.abs(value - real).mean() / real.mean())
            found.append(Row(suite, group, f"mean distance over time, {NUM_BINS} bins", metric, 1.0, 1.0 + apart, source))
    return found


def mean_counts(start: np.ndarray, end: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Time average, in each bin between `edges`, of the number of intervals [start, end) that are open."""

    def total(at: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Integral from 0 to each `at` of the number of `times` that have passed."""
        ranked = np.sort(times)
        passed = np.searchsorted(ranked, at, side="right")
        sums = np.concatenate([[0.0], np.cumsum(ranked)])
        area: np.ndarray = at * passed - sums[passed]
        return area

    counts: np.ndarray = np.diff(total(edges, start) - total(edges, end)) / np.maximum(np.diff(edges), 1e-300)
    return counts


def _most(start: np.ndarray, end: np.ndarray) -> int:
    start, end = np.sort(start[end > start]), np.sort(end[end > start])
    return int((np.arange(1, len(start) + 1) - np.searchsorted(end, start, side="right")).max(initial=0))


def limits_of(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """The rows that have a bar, with its limit."""
    return [(row, LIMITS[row.case, row.metric]) for row in rows if (row.case, row.metric) in LIMITS]
