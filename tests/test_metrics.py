"""Metrics of small logs worked out by hand, and against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsim.gaps as gaps_module
from kvsim.errors import InputError, KvsimError
from kvsim.estimators import distribution, mean_ci95, queue_growth
from kvsim.gaps import gap_rows, nearest_rank
from kvsim.metrics import SLO_KEYS, check_slo, gains, summarize
from kvsim.recording import RunLog
from kvsim.timeline import timeline

S = 10**12


def two_requests() -> RunLog:
    """A (3 tokens) arrives at 0 s, B (1 token) at 1 s, on a server of one slot that is idle from 5 s to 5 s.

    0-2 s prefill A, 2-3 s and 3-4 s decode A, 4-5 s prefill B. So TTFT is 2 and 4 s, E2E 4 and 4 s, queue 0 and 3 s.
    """
    log = RunLog()
    log.requests.extend([0, 0, 0, 2 * S, 4 * S, 10, 3, 0, 0])
    log.requests.extend([1, 1 * S, 4 * S, 5 * S, 5 * S, 20, 1, 4, 0])
    log.steps.extend([0, 2 * S, 0, 1, 0, 10, 1, 1, 0])
    log.steps.extend([2 * S, 1 * S, 0, 2, 1, 0, 0, 2, 1])
    log.steps.extend([4 * S, 1 * S, 0, 1, 0, 16, 1, 4, 0])
    log.op_ps = {"gemm": 4 * S, "host": S}
    log.peak_held_units, log.end_ps = 4, 5 * S
    return log


def test_two_requests_by_hand() -> None:
    summary = summarize(two_requests(), warmup_requests=0, slo={"ttft_p99_s": 2.0, "tpot_p99_s": 1.0, "itl_p50_s": 0.9})
    assert (summary.ttft.p50_s, summary.ttft.p99_s, summary.ttft.mean_s, summary.ttft.max_s) == (2, 4, 3, 4)
    assert (summary.tpot.num_values, summary.tpot.mean_s) == (1, 1)
    assert (summary.e2e.mean_s, summary.queue.mean_s, summary.queue.p50_s) == (4, 1.5, 0)
    assert (summary.itl.num_values, summary.itl.p50_s, summary.itl.max_s) == (2, 1, 1)
    assert (summary.duration_s, summary.requests_per_s) == (5, 2 / 5)
    assert (summary.output_tokens_per_s, summary.total_tokens_per_s) == (4 / 5, 34 / 5)
    assert (summary.goodput_frac, summary.goodput_requests_per_s) == (0.5, 1 / 5)
    assert {key: check.met for key, check in summary.slo.items()} == {
        "ttft_p99_s": False,
        "tpot_p99_s": True,
        "itl_p50_s": False,
    }
    assert (summary.mean_decode_batch_sequences, summary.max_decode_batch_sequences) == (1, 1)
    assert (summary.mean_running_requests, summary.max_running_requests) == (1, 1)
    assert (summary.mean_waiting_requests, summary.max_waiting_requests) == (2 / 5, 1)
    assert summary.utilisation_frac == 1
    assert (summary.mean_held_units, summary.peak_held_units) == (pytest.approx((2 * 1 + 2 * 2 + 1 * 4) / 5), 4)
    assert summary.mean_in_system_requests == summary.arrival_rate_times_e2e_requests == 8 / 5
    assert summary.op_s == {"gemm": 4, "host": 1}
    assert summary.ttft.mean_ci95_s is None


def test_warm_up_leaves_the_first_arrivals_out() -> None:
    summary = summarize(two_requests(), warmup_requests=1, slo={})
    assert (summary.num_requests, summary.num_warmup_requests) == (1, 1)
    assert (summary.ttft.mean_s, summary.duration_s, summary.output_tokens_per_s) == (4, 4, 1 / 4)
    assert summary.tpot.num_values == 0 and math.isnan(summary.tpot.p99_s)
    assert summary.mean_running_requests == 1  # the window is 1 s to 5 s, and the server was never idle
    assert summary.mean_in_system_requests == (3 + 4) / 4
    assert summary.goodput_frac is None


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="warmup_requests=2 must be from 0 to 1"):
        summarize(two_requests(), warmup_requests=2, slo={})
    with pytest.raises(InputError, match=r"slo\.ttft_p95_s=1"):
        summarize(two_requests(), warmup_requests=0, slo={"ttft_p95_s": 1})
    with pytest.raises(InputError, match=r"slo.ttft_p99_s=-1.0 must be a positive"):
        check_slo({"ttft_p99_s": -1.0})
    with pytest.raises(KvsimError, match="no request finished"):
        summarize(RunLog(), warmup_requests=0, slo={})
    check_slo(dict.fromkeys(SLO_KEYS, 1.0))


def test_one_token_everywhere_and_all_at_once() -> None:
    log = RunLog()
    for index in range(3):
        log.requests.extend([index, 0, 0, S, S, 5, 1, 0, 0])
    log.steps.extend([0, S, 0, 1, 0, 15, 3, 3, 0])
    summary = summarize(log, warmup_requests=0, slo={"tpot_p99_s": 0.1})
    assert summary.goodput_frac == 1 and summary.queue_growth is None
    assert summary.mean_decode_batch_sequences == 0 and summary.itl.num_values == 0
    assert summary.max_running_requests == 3
    assert math.isnan(gains(summary, summary).tpot_x) and gains(summary, summary).e2e_x == 1


rows = st.lists(
    st.tuples(st.integers(1, 60), st.integers(-3, 6), st.integers(1, 12), st.integers(0, 4)).filter(
        lambda row: row[0] + row[1] * (row[2] - 1) > 0
    ),
    min_size=0,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(rows, st.data())
def test_gap_percentiles_equal_those_of_every_gap_written_out(
    series: list[tuple[int, ...]], data: st.DataObject
) -> None:
    log, gaps, now = RunLog(), [], 0
    for row, (first, growth, num, decodes) in enumerate(series):
        log.steps.extend([now, first, growth, num, decodes, 0, 0, 0, 0])
        now += num * first + growth * num * (num - 1) // 2
        stalled = data.draw(st.integers(0, decodes))
        if stalled:
            log.stalls.extend([row, 7, stalled])
        gaps += [first + 7] * stalled + [first] * (decodes - stalled)
        gaps += [first + growth * j for j in range(1, num) for _ in range(decodes)]
    resumed = data.draw(st.lists(st.integers(1, 500), max_size=3))
    log.resumed_gaps_ps.extend(resumed)
    gaps = sorted(gaps + resumed)
    found = gap_rows(log)
    assert found.num_gaps == len(gaps)
    few = data.draw(st.sampled_from([0, 10, gaps_module._FEW_GAPS]))  # by bisection alone, by both, by sorting alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps_module, "_FEW_GAPS", few)
        for percent in (1, 50, 90, 99, 100) if gaps else ():
            assert found.percentile_ps(percent) == np.percentile(gaps, percent, method="inverted_cdf")
    if gaps:
        assert found.mean_ps() == pytest.approx(np.mean(gaps))


def test_gap_percentiles_of_a_long_run_need_no_expansion() -> None:
    """10^12 gaps: half a growing row of 10^9 steps for 500 sequences, half equal steps."""
    log = RunLog()
    log.steps.extend([0, 10**7, 3, 10**9, 500, 0, 0, 0, 0])
    log.steps.extend([4 * 10**18, 5, 0, 10**9, 500, 0, 0, 0, 0])
    found = gap_rows(log)
    assert found.num_gaps == 10**12
    assert [found.percentile_ps(percent) for percent in (50, 75, 100)] == [
        5,
        10**7 + 3 * (5 * 10**8 - 1),
        10**7 + 3 * (10**9 - 1),
    ]


@given(st.integers(1, 10**6), st.integers(1, 100))
def test_nearest_rank_covers_at_least_the_share_and_no_more(count: int, percent: int) -> None:
    rank = nearest_rank(count, percent)
    assert 100 * rank >= percent * count and (rank == 1 or 100 * (rank - 1) < percent * count)


def test_rows_that_share_a_start_are_one_run() -> None:
    log = RunLog()
    log.steps.extend([0, 10, 1, 3, 2, 0, 0, 5, 1])  # 33
    log.steps.extend([0, 50, 0, 1, 2, 0, 0, 6, 1])  # 50
    log.steps.extend([100, 4, 0, 1, 1, 7, 1, 2, 0])
    runs = timeline(log)
    assert runs.start_ps.tolist() == [0, 100] and runs.end_ps.tolist() == [83, 104]
    assert runs.num_steps.tolist() == [4, 1] and runs.held_units.tolist() == [6, 2]
    assert runs.prefill_tokens.tolist() == [0, 7] and runs.num_decodes.tolist() == [2, 1]
    assert runs.overlap_ps(80, 102).tolist() == [3, 2]
    assert runs.binned(runs.num_decodes, np.array([0, 50, 100, 104])) == pytest.approx([2, 33 * 2 / 50, 1])
    assert timeline(RunLog()).start_ps.tolist() == []


def test_percentiles_agree_with_numpy() -> None:
    values = np.random.default_rng(1).integers(1, 10**14, 997)
    found = distribution(values)
    for percent, value_s in ((50, found.p50_s), (90, found.p90_s), (99, found.p99_s)):
        assert value_s == np.percentile(values, percent, method="inverted_cdf") / S


def test_interval_covers_the_mean_of_a_correlated_series() -> None:
    """AR(1) with correlation 0.8 about 5: 95 % intervals cover it in 400 series, give or take 4 standard errors.

    Batches of 100 keep a little correlation, so that coverage lies a percent or two below 95.
    """
    rng, covered, num_series = np.random.default_rng(2), 0, 400
    for _ in range(num_series):
        noise, series = rng.normal(size=2100), np.empty(2100)
        series[0] = noise[0]
        for i in range(1, 2100):
            series[i] = 0.8 * series[i - 1] + noise[i]
        values = 5 + series[100:]
        half = mean_ci95(values)
        covered += half is None or abs(values.mean() - 5) <= half
    assert abs(covered / num_series - 0.94) < 4 * (0.94 * 0.06 / num_series) ** 0.5


def test_no_interval_for_few_values_or_a_growing_queue() -> None:
    rng = np.random.default_rng(3)
    assert mean_ci95(rng.normal(size=99)) is None
    assert mean_ci95(rng.normal(size=100)) is not None
    assert mean_ci95(np.arange(1000) + rng.normal(size=1000)) is None
    assert mean_ci95(np.ones(400)) == 0


def test_overload_is_seen_and_a_busy_steady_queue_is_not() -> None:
    """M/D/1: at load 1.3 the queue grows by 0.3/1.3 of the arrivals; at load 0.8 it does not, in any of 20 runs."""

    def growth(load: float, seed: int) -> object:
        arrival_s = np.cumsum(np.random.default_rng(seed).exponential(1.0, 2000))
        start_s, free_s = np.empty(2000), 0.0
        for i, time_s in enumerate(arrival_s):
            start_s[i] = max(time_s, free_s)
            free_s = start_s[i] + load
        found = queue_growth((arrival_s * S).astype(np.int64), (start_s * S).astype(np.int64))
        assert found is not None
        return found

    overloaded = growth(1.3, 0)
    assert overloaded.overloaded and overloaded.waiting_at_last_arrival == pytest.approx(2000 * 0.3 / 1.3, rel=0.2)
    assert overloaded.taken_up_per_s == pytest.approx(1 / 1.3, rel=0.02)
    assert not any(growth(0.8, seed).overloaded for seed in range(20))
