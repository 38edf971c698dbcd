from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import make_log, make_result

from kvsim.reports.files import PLOT_NAMES
from kvsim.reports.plots import PALETTE, PLOTS, gain_bars, latency_cdf, over_time, save_plots, time_by_op
from kvsim.result import Result


@pytest.fixture(scope="module")
def result() -> Result:
    return make_result()


def test_names_agree_with_those_the_files_module_clears() -> None:
    assert tuple(PLOTS) == PLOT_NAMES


def test_cdf_reaches_one_and_starts_at_the_fastest_counted_request(result: Result) -> None:
    axis = latency_cdf(result).axes[2]
    for line, policy in zip(axis.get_lines(), result.policies.values(), strict=True):
        assert line.get_ydata()[-1] == 1
        assert line.get_xdata()[-1] == policy.summary.e2e.max_s
        assert line.get_ydata()[0] == 1 / policy.summary.num_requests


def test_time_by_op_bars_add_up(result: Result) -> None:
    (axis,) = time_by_op(result).axes
    total_s = sum(bar.get_width() for bar in axis.patches)
    assert total_s == pytest.approx(sum(sum(p.summary.op_s.values()) for p in result.policies.values()))


def test_over_time_keeps_the_mean(result: Result) -> None:
    axis = over_time(result).axes[1]
    waiting = axis.get_lines()[0].get_ydata()
    log = result.policies["full"].log
    everything = make_result(logs={"full": log}, warmup=0).policies["full"].summary
    assert waiting.mean() == pytest.approx(everything.mean_waiting_requests, rel=0.01)


def test_gains_are_drawn_against_a_baseline_only(result: Result, tmp_path: Path) -> None:
    figure = gain_bars(result)
    assert figure is not None and len(figure.axes[0].patches) == 2
    alone = make_result(logs={"full": make_log(num_requests=30)}, warmup=0)
    assert gain_bars(alone) is None
    assert [path.name for path in save_plots(alone, tmp_path)] == [name for name in PLOT_NAMES if name != "gains.png"]


def test_awkward_names_and_many_policies_draw(tmp_path: Path) -> None:
    log = make_log(num_requests=20)
    result = make_result(logs={name: log for name in ("full", *(f"$_{i}" for i in range(len(PALETTE) + 1)))}, warmup=0)
    assert len(save_plots(replace(result, title="costs $5 a $day"), tmp_path)) == 4
