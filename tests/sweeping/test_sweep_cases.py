"""Cases: ids that depend on what is simulated and on nothing else, and rows that say what `simulate` says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sweeps

import kvsim
from kvsim.metrics import SLO_KEYS
from kvsim.reports.compare import gains_over_baseline
from kvsim.scenario import parse_scenario
from kvsim.sweeping.cases import Plan, Work
from kvsim.sweeping.rows import COLUMNS, COUNTS, GAINS, LATENCIES, RATES, simulate_case
from kvsim.sweeping.spec import load_sweep
from kvsim.sweeping.table import result_rows


def plan(vary: dict[str, Any], base: dict[str, Any] | None = None, folder: Path = Path()) -> Plan:
    wanted = load_sweep({"scenario": base or sweeps.scenario(), "vary": vary})
    return Plan(replace(wanted, base_dir=folder))


def ids(vary: dict[str, Any], base: dict[str, Any] | None = None, folder: Path = Path()) -> list[str]:
    return [case.id for case in plan(vary, base, folder).cases]


def test_ids_depend_on_what_is_simulated() -> None:
    base = ids({"workload.seed": [0, 1]})
    assert len(set(base)) == 4
    assert ids({"workload.seed": [1, 0]}) == base[2:] + base[:2]
    assert ids({"workload.seed": [0, 1], "engine.max_num_seqs": [256]}) == base, "a default that is written out"
    assert ids({"workload.seed": [0, 1], "name": ["other title"]}) == base
    turned = dict(reversed(sweeps.scenario().items()))
    assert ids({"workload.seed": [0, 1]}, turned) == base
    for change in ({"engine.max_num_seqs": [255]}, {"slo.ttft_p99_s": [2]}, {"gpu": ["h100-sxm-80gb"]}):
        assert not set(ids({"workload.seed": [0, 1], **change})) & set(base)


def test_ids_are_the_same_in_every_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sweeps; from kvsim.sweeping.cases import Plan;"
        "from kvsim.sweeping.spec import load_sweep;"
        "print(*[c.id for c in Plan(load_sweep(sweeps.sweep_file(3))).cases])"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env={"PYTHONHASHSEED": "77"})
    assert done.stdout.split() == [case.id for case in Plan(load_sweep(sweeps.sweep_file(3))).cases]


def test_a_file_that_changed_is_another_case(tmp_path: Path) -> None:
    base = sweeps.scenario()
    del base["workload"]
    base["workload"] = {"trace": {"path": "t.csv", "format": "csv"}}
    head = "arrival_s,prompt_tokens,output_tokens\n"
    (tmp_path / "t.csv").write_text(head + "0,5,5\n")
    before = ids({"workload.seed": [0]}, base, tmp_path)
    assert ids({"workload.seed": [0]}, base, tmp_path) == before
    (tmp_path / "t.csv").write_text(head + "0,5,6\n")
    assert not set(ids({"workload.seed": [0]}, base, tmp_path)) & set(before)


def test_a_policy_that_nothing_touches_is_simulated_once() -> None:
    found = plan({"policies.snapkv[0].budget_tokens": [64, 128, 256]})
    assert len(found.cases) == 6 and len(list(found.work({}))) == 4
    assert len({case.id for case in found.cases if case.policy == "full"}) == 1
    done = {work.id: simulate_case(work) for work in found.work({})}
    rows = result_rows(found, done)
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert len({row["ttft_mean_s"] for row in rows if row["policy"] == "full"}) == 1


def test_an_invalid_policy_takes_no_other_with_it() -> None:
    found = plan({"policies.snapkv[0].budget_tokens": [16, 128]})  # 16 is below its window
    assert [bool(case.error) for case in found.cases] == [False, True, False, False]
    assert "policies.snapkv[0].window_tokens=32 must be below budget_tokens=16" in found.cases[1].error
    rows = result_rows(found, {})
    assert [row["status"] for row in rows] == ["pending", "invalid", "pending", "pending"]


def test_rows_say_what_simulate_says() -> None:
    base = sweeps.scenario() | {"slo": {"ttft_p99_s": 1e-4, "tpot_p99_s": 1.0}}  # no prefill is that quick
    found = plan({"workload.arrivals.rate_per_s": [50, 2000]}, base)
    rows = result_rows(found, {work.id: simulate_case(work) for work in found.work({})})
    for point in (0, 1):
        base["workload"]["arrivals"]["rate_per_s"] = (50, 2000)[point]
        result = kvsim.simulate(parse_scenario(base))
        gains = gains_over_baseline(result)
        for row in rows[2 * point : 2 * point + 2]:
            policy = result.policies[row["policy"]]
            summary = policy.summary
            assert row["status"] == "ok" and row["error"] is None and row["composition"] == policy.description
            for metric in ("ttft", "tpot", "e2e", "queue", "itl"):
                for statistic in ("mean", "p50", "p90", "p99", "max"):
                    assert row[f"{metric}_{statistic}_s"] == getattr(getattr(summary, metric), f"{statistic}_s")
            for name in (*COUNTS, *RATES):
                if hasattr(summary, name):
                    assert row[name] == getattr(summary, name), name
            for gain in GAINS:
                assert row[gain] == gains[row["policy"]][gain.removeprefix("gain_")], gain
            assert row["meets_slo"] == all(check.met for check in summary.slo.values())
            assert row["peak_kv_frac"] <= 1 and row["peak_kv_bytes"] <= row["kv_pool_bytes"]
            (total,) = (line.num_bytes for line in policy.ledger if line.name == "GPU memory")
            assert row["peak_kv_bytes"] < row["peak_memory_bytes"] < total
            assert 0 <= row["measured_frac"] <= 1 + 1e-9
    assert [row["meets_slo"] for row in rows] == [False] * 4 and rows[0]["goodput_frac"] == 0
    assert set(LATENCIES) == set(SLO_KEYS)


def test_a_number_that_is_not_defined_is_null() -> None:
    base = sweeps.scenario()
    base["workload"]["lengths"]["output_tokens"] = 1  # no second token, no TPOT
    base["slo"] = {}
    (row, _) = (simulate_case(work) for work in plan({"workload.seed": [0]}, base).work({}))
    assert row["status"] == "ok" and row["tpot_mean_s"] is None and row["goodput_frac"] is None and row["meets_slo"] is None
    assert not [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    json.dumps(row)  # Python's own types only


def test_errors_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(**fields: Any) -> dict[str, Any]:
        return simulate_case(Work("x", {**sweeps.scenario(), "policies": {"full": []}, **fields}, "."))

    found = row(model="llama-3.1-70b")
    assert found["status"] == "does_not_fit" and "GiB a GPU short" in found["error"]
    found = row(model="nope")
    assert found["status"] == "invalid" and "model='nope' is not in the catalogue" in found["error"]
    assert set(found) == set(COLUMNS) and found["ttft_p50_s"] is None

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("kvsim.sweeping.rows.run_policy", broken)
    found = row()
    assert found["status"] == "bug"
    assert found["error"].startswith("ZeroDivisionError: division by zero (test_sweep_cases.py:")


def test_gains_are_over_the_first_full_cache_of_the_point() -> None:
    base = sweeps.scenario()
    base["policies"] = {"snapkv": sweeps.POLICIES["snapkv"], "plain": [], "also": [{"kind": "full"}]}
    found = plan({"workload.seed": [0, 1]}, base)
    done = {work.id: simulate_case(work) for work in found.work({})}
    rows = result_rows(found, done)
    assert [row["gain_e2e_x"] for row in rows if row["policy"] == "plain"] == [1.0, 1.0]
    assert rows[0]["gain_e2e_x"] == rows[1]["e2e_mean_s"] / rows[0]["e2e_mean_s"]
    del base["policies"]["plain"], base["policies"]["also"]
    assert all(row["gain_e2e_x"] is None for row in result_rows(plan({"workload.seed": [0, 1]}, base), done))
