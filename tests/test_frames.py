"""Frames hold the numbers of the result itself, in seconds and bytes, and say what is missing without pandas."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest

from kvsim import frames
from kvsim.api import simulate
from kvsim.errors import InputError
from kvsim.reports.compare import gains_over_baseline
from kvsim.reports.files import REQUEST_COLUMNS, write_requests_csv
from kvsim.result import Result
from kvsim.scenario import load_scenario, select_policies

pd = pytest.importorskip("pandas")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def result() -> Result:
    overrides = {"workload.num_requests": 80, "workload.warmup_requests": 10}
    scenario = load_scenario(ROOT / "scenarios" / "a100_llama8b.yaml", overrides)
    return simulate(select_policies(scenario, ["full", "snapkv", "kv-compress-4x"]))


def test_summary_has_the_numbers_of_the_result(result: Result) -> None:
    table = result.to_frame()
    assert list(table.index) == list(result.policies) and table.index.name == "policy"
    gains = gains_over_baseline(result)
    for name, policy in result.policies.items():
        row, summary = table.loc[name], policy.summary
        assert row.ttft_p99_s == summary.ttft.p99_s and row.tpot_mean_s == summary.tpot.mean_s and row.itl_max_s == summary.itl.max_s
        assert row.output_tokens_per_s == summary.output_tokens_per_s and row.num_preemptions == summary.num_preemptions
        assert row.gain_tpot_x == gains[name]["tpot_x"] and row.description == policy.description
        assert row.pool_bytes == policy.pool_units * policy.unit_bytes
        assert row.slo_met == all(check.met for check in summary.slo.values())
    assert table.loc["kv-compress-4x", "published_quality_frac"] == 0.9 and math.isnan(table.loc["full", "published_quality_frac"])


def test_requests_are_those_of_the_csv_file(result: Result, tmp_path: Path) -> None:
    table = frames.requests(result)
    write_requests_csv(result, tmp_path / "requests.csv")
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(table.columns) == list(REQUEST_COLUMNS) and len(table) == len(rows) == 3 * 80
    for name in REQUEST_COLUMNS[3:]:
        assert list(table[name].astype(float)) == pytest.approx([float(row[name] or "nan") for row in rows], nan_ok=True), name
    assert table.is_warmup.sum() == 30
    counted = table[(table.policy == "snapkv") & ~table.is_warmup]
    assert counted.ttft_s.mean() == pytest.approx(result.policies["snapkv"].summary.ttft.mean_s)


def test_steps_add_up_to_the_tokens_and_to_the_time(result: Result) -> None:
    table, asked = frames.steps(result), frames.requests(result)
    for name, policy in result.policies.items():
        own = table[table.policy == name]
        made = (own.num_decodes * own.num_steps + own.num_first_tokens).sum()
        assert made == asked[asked.policy == name].output_tokens.sum()
        device_s = sum(policy.summary.op_s.values())
        assert own.duration_s.sum() == pytest.approx(device_s, rel=1e-6)
        assert (own.start_s.diff().dropna() >= 0).all()


def test_ledger_and_ops(result: Result) -> None:
    lines, shares = frames.ledger(result), frames.ops(result)
    for name, policy in result.policies.items():
        own = lines[lines.policy == name].set_index("line")
        assert own.loc["KV pool", "num_bytes"] == next(line.num_bytes for line in policy.ledger if line.name == "KV pool")
        times = shares[shares.policy == name]
        assert times.share_frac.sum() == pytest.approx(1) and times.seconds.sum() == pytest.approx(sum(policy.summary.op_s.values()))
        assert (times.bias_low <= times.bias_high).all()


def test_without_pandas_it_is_one_line(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for make in (frames.summary, frames.requests, frames.steps, frames.ledger, frames.ops, Result.to_frame):
        with pytest.raises(InputError, match=r"needs pandas, which is not installed; pip install 'kvsim\[notebook\]'"):
            make(result)
