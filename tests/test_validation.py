"""Predictions against experiments, in a reduced form, with the bars that are met as assertions; and the machinery around them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kvsim.cli import main
from kvsim.scenario import parse_scenario
from kvsim.validation import keyformer, kv_compress, memory, requests, silicon
from kvsim.validation.cases import Case, Truth
from kvsim.validation.run import run_case, run_cases, validate

MEASURED = Path(__file__).resolve().parents[2] / "shared" / "measured"
needs_measured = pytest.mark.skipif(not MEASURED.exists(), reason=f"{MEASURED} is absent")


def test_cache_bytes_are_exact() -> None:
    (bar,) = memory.bars(memory.rows())
    assert bar.met, bar


def test_keyformers_speed_ups() -> None:
    bars = keyformer.bars(run_cases(keyformer.cases(), 1))
    assert len(bars) == 6
    for bar in bars:
        assert bar.met, bar.text


def test_kv_compress_batches() -> None:
    """Throughput is a bar that is missed (docs/validation.md says why), so it is not asserted here."""
    bars = kv_compress.bars(run_cases(kv_compress.cases(quick=True), 1))
    batches = [bar for bar in bars if "largest batch" in bar.text]
    assert len(batches) == 2
    for bar in batches:
        assert bar.met, bar


@needs_measured
def test_a_real_run_request_by_request() -> None:
    rows = requests.rows(MEASURED)
    bars = requests.bars(rows)
    assert len(bars) == 8
    for bar in bars:
        assert bar.met, bar
    for row in rows:  # without the prefix hits everything is a little slower, never faster
        if row.group == "without prefix hits" and row.case == "mean":
            assert 0.0 < row.error < 0.06, row


@needs_measured
def test_serving_on_h100() -> None:
    """Every eighth row; TTFT misses its bar (27 %), so it is held to what it shows, well below the peer's 53.9 %."""
    rows = run_cases(silicon.cases(MEASURED, quick=True), 2)
    assert not [row for row in rows if math.isnan(row.predicted)]
    bars = {bar.text.split(":")[0]: bar for bar in silicon.bars(rows) if "over validate" in bar.text}
    assert bars["tpot_ms"].value < 0.11 and bars["ttft_ms"].value < 0.48
    for metric in ("tpot_ms", "ttft_ms"):
        mine = [row for row in rows if row.metric == metric]
        naive = sum(abs(row.naive["roofline"] / row.truth - 1) for row in mine) / len(mine)
        assert bars[metric].value < naive


@needs_measured
def test_calibrate_groups_are_not_scored() -> None:
    rows = run_cases([case for case in silicon.cases(MEASURED, quick=True) if case.group.startswith("calibrate")][:3], 1)
    assert rows and not silicon.bars(rows)


def test_no_case_reaches_beyond_the_scenario() -> None:
    """No profile, no constant: hardware and engine calibration alone may move a prediction."""
    cases = [*kv_compress.cases(quick=False), *keyformer.cases()]
    if MEASURED.exists():
        cases += silicon.cases(MEASURED, quick=True)
    for case in cases:
        assert "profile" not in case.scenario
        parse_scenario(case.scenario)
        assert case.source and case.truths and len(case.scenario["policies"]) == 1


def test_rows_do_not_depend_on_processes() -> None:
    cases = keyformer.cases()[:3]
    assert run_cases(cases, 1) == run_cases(cases, 2)


def test_a_refused_scenario_is_a_row_with_a_reason() -> None:
    case = keyformer.cases()[0]
    data = {**case.scenario, "gpu": "t4"}
    (row,) = run_case(Case("published", "g", "too small", data, (Truth("output_tok_s", 1.0),), "made up"))
    assert math.isnan(row.predicted) and "does not fit" in row.note


def test_suites_without_their_data_say_so(tmp_path: Path) -> None:
    report = validate(("memory", "requests", "silicon"), tmp_path)
    assert [text.split(":")[0] for text in report.skipped] == ["requests", "silicon"]
    assert {row.suite for row in report.rows} == {"memory"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "memory", "--out", str(tmp_path / "v")]) == 0
    told = capsys.readouterr()
    assert "cache bytes" in told.out and "met" in told.out
    assert {path.name for path in (tmp_path / "v").iterdir()} == {"validation.json", "rows.csv", "tables.md"}
    assert main(["validate", "memory", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["bars"][0]["met"] is True and len(content["rows"]) == 5
    assert main(["validate", "--measured", str(tmp_path / "none")]) == 2
    assert "must be a folder" in capsys.readouterr().err
    assert main(["validate", "everything"]) == 2
