"""The suite `compression`: transcriptions against the sources' own ratios, gains, bars, what transformers adds, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean

import pytest

from kvsim.cli import main
from kvsim.hardware import list_gpus
from kvsim.scenario import parse_scenario
from kvsim.validation import compression
from kvsim.validation import published_compression as published
from kvsim.validation.cases import METRICS, Row
from kvsim.validation.compression_settings import CALIBRATED, FULL, PARTLY, settings
from kvsim.validation.naive import BYTES, ROOFLINE
from kvsim.validation.run import run_cases, validate


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with compression.model_folder() as folder:
        found = run_cases(compression.cases(Path(folder)), 1)
    return [*found, *compression.gains(found)]


def test_transcriptions_give_the_ratios_that_the_sources_state() -> None:
    slopes = {gpu: lines["fp8"][1] / lines["full"][1] for gpu, lines in published.ITL_LINES.items()}
    assert slopes == {"h100-sxm": pytest.approx(0.54, abs=0.005), "b200": pytest.approx(0.54, abs=0.005)}
    (_, full_itl, full_s, full_rate), (_, itl, seconds, rate) = published.UNDER_LOAD.values()
    assert rate / full_rate - 1 == pytest.approx(0.149, abs=0.001) and itl / full_itl - 1 == pytest.approx(-0.148, abs=0.001)
    assert full_rate * full_s == pytest.approx(rate * seconds, rel=0.001) == pytest.approx(150 * 2000, rel=0.02)
    full, snapkv, _ = (mean(times) for times in published.SPARSE_VLLM_ITL_MS.values())
    assert full / snapkv == pytest.approx(1.69, abs=0.01)
    full_tokens, fp8_tokens = published.A100_POOL_TOKENS
    assert fp8_tokens == pytest.approx(2 * full_tokens, rel=1e-4)


def test_cases_are_plain_scenarios() -> None:
    with compression.model_folder() as folder:
        cases = compression.cases(Path(folder))
        for case in cases:
            assert "profile" not in case.scenario and len(case.scenario["policies"]) == 1
            parse_scenario(case.scenario)
            assert case.source and case.truths and ROOFLINE in case.naive
            assert all(truth.metric in METRICS for truth in case.truths)
            assert case.confidence or PARTLY not in case.group, case.name
        assert len(compression.cases(Path(folder), quick=True)) < len(cases) / 2
    assert len({(case.group, case.name) for case in cases}) == len(cases)


def test_a_setting_has_a_full_cache_and_differs_by_the_policy_alone() -> None:
    for setting in settings():
        assert FULL in setting.runs and not setting.runs[FULL].policy and setting.runs[FULL].bytes_frac == 1.0
        assert any(name.startswith(setting.gpu) for name in list_gpus()), setting.gpu
        for name, run in setting.runs.items():
            assert run.truths.keys() == setting.runs[FULL].truths.keys(), (setting.name, name)
            assert name == FULL or (run.policy and 0 < run.bytes_frac < 1), (setting.name, name)


def test_a_gain_is_full_over_compressed_in_time_and_the_inverse_in_rate() -> None:
    name = "Llama-3.1-8B c=8 20000+2000"
    pairs = [
        Row("compression", "g", f"{name}, {cache}", metric, truth, guess, "a source", {ROOFLINE: roof})
        for metric, full, fp8 in (
            ("itl_p50_ms", (20.0, 30.0, 12.0), (10.0, 20.0, 8.0)), ("output_tok_s", (5.0, 4.0, 9.0), (10.0, 6.0, 18.0)),
            ("kv_pool_gib", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        )
        for cache, (truth, guess, roof) in ((FULL, full), ("fp8", fp8))
    ]  # fmt: skip
    assert [(row.metric, row.truth, row.predicted, row.naive) for row in compression.gains(pairs)] == [
        ("x itl_p50_ms", 2.0, 1.5, {BYTES: 2.0, ROOFLINE: 1.5}),
        ("x output_tok_s", 2.0, 1.5, {BYTES: 2.0, ROOFLINE: 2.0}),
    ]


def test_bars_are_over_stated_rows_that_calibrated_nothing(rows: list[Row]) -> None:
    bars = compression.bars(rows)
    assert len(bars) == 2 and all(bar.met for bar in bars), bars
    for group, confidence in ((f"fp8 cache{PARTLY}: x", ""), ("fp8 cache: x", CALIBRATED)):
        wrong = [Row("compression", group, "y", metric, 1.0, 9.0, "a source", confidence=confidence) for metric in ("tpot_ms", "x tpot_ms")]
        assert compression.bars([*rows, *wrong * 200]) == bars
    wrong = [Row("compression", "fp8 cache: x", "y", "x tpot_ms", 1.0, 9.0, "a source")] * 200
    assert [bar.met for bar in compression.bars([*rows, *wrong])] == [True, False]


def test_stated_gains_beat_both_naive_models(rows: list[Row]) -> None:
    mine = [row for row in rows if row.metric.startswith("x ") and PARTLY not in row.group]
    error = mean(abs(row.error) for row in mine)
    for name in (ROOFLINE, BYTES):
        assert error < 0.6 * mean(abs(row.naive[name] / row.truth - 1) for row in mine), name
    assert all(abs(row.error) < 0.15 for row in mine)


def test_a_quantised_cache_of_transformers_is_slower_where_it_was(rows: list[Row]) -> None:
    """Byte ratios promise 3.6 times the speed; the source lost nearly half of it at 128k."""
    mine = {row.case.split()[1]: row for row in rows if row.metric == "x tpot_ms" and row.case.endswith("quanto")}
    assert len(mine) == len(published.KVPRESS_SWEEPS_S)
    for prompt in ("32000+100,", "64000+100,", "128000+100,"):
        assert mine[prompt].truth < 0.8 and mine[prompt].predicted < 0.8 and mine[prompt].naive[BYTES] > 3


def test_the_suite_needs_no_measured_files(tmp_path: Path) -> None:
    report = validate(("compression",), tmp_path, quick=True)
    assert not report.skipped and {row.suite for row in report.rows} == {"compression"}
    assert not [row for row in report.rows if math.isnan(row.predicted)]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["validate", "compression", "--quick", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert code == (0 if all(bar["met"] for bar in content["bars"]) else 1)
    assert {bar["suite"] for bar in content["bars"]} == {"compression"}
    assert any(row["metric"].startswith("x ") for row in content["rows"])
