from __future__ import annotations

import csv
import json
import math
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from fakes import make_log, make_result

from kvsim.errors import InputError
from kvsim.reports.figures.chart import Chart
from kvsim.reports.files import FILE_NAMES, REQUEST_COLUMNS, to_json, write_outputs
from kvsim.result import Result


@pytest.fixture(scope="module")
def result() -> Result:
    return make_result()


def test_equal_inputs_give_equal_bytes(result: Result, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_outputs(make_result(), tmp_path / name, perfetto=True)
    for name in set(FILE_NAMES) - {"requests.parquet"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_json_is_strict_and_complete(result: Result) -> None:
    data = json.loads(to_json(result), parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    assert data["schema_version"] == 1 and data["baseline"] == "full"
    assert data["policy_order"] == ["full", "snapkv+think", "[kivi]"]
    assert data["scenario"]["workload"] == {"num_requests": 300, "rate": None, "lengths": [1, 2]}
    kivi = data["policies"]["[kivi]"]
    assert kivi["summary"]["ttft"]["p99_s"] == result.policies["[kivi]"].summary.ttft.p99_s
    assert kivi["summary"]["slo"]["ttft_p99_s"] == {
        "limit_s": 2.0,
        "met": True,
        "value_s": kivi["summary"]["ttft"]["p99_s"],
    }
    assert kivi["gains_over_baseline"]["kv_per_sequence_x"] == 1155 / 600
    assert {line["name"] for line in kivi["ledger"]} == {"weights", "activations", "policy state", "KV pool"}
    assert math.isclose(sum(kivi["op_share_frac"].values()), 1)
    assert "log" not in kivi and data["verdict"] and data["warnings"]


def test_what_is_not_plain_data_is_refused(result: Result) -> None:
    from dataclasses import replace

    with pytest.raises(TypeError, match="PosixPath"):
        to_json(replace(result, scenario={"trace": Path("x")}))
    assert '"n": 3' in to_json(replace(result, scenario={"n": np.int64(3)}))


def test_csv_times_are_exact(result: Result, tmp_path: Path) -> None:
    write_outputs(result, tmp_path, plots=False)
    with (tmp_path / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == REQUEST_COLUMNS and len(rows) == 3 * 300
    logged = result.policies["snapkv+think"].log.request_columns()
    finish_ps = dict(zip(logged["index"].tolist(), logged["finish_ps"].tolist(), strict=True))
    own = [row for row in rows if row["policy"] == "snapkv+think"]
    assert [int(row["index"]) for row in own] == list(range(300))
    assert all(Decimal(row["finish_s"]) * 10**12 == finish_ps[int(row["index"])] for row in own)
    assert [row["is_warmup"] for row in own] == ["1"] * 20 + ["0"] * 280
    for row in own:
        gaps = int(row["output_tokens"]) - 1
        if gaps:
            decode_s = Decimal(row["finish_s"]) - Decimal(row["first_token_s"])
            assert abs(Decimal(row["tpot_s"]) * gaps - decode_s) * 10**12 <= Decimal(gaps) / 2
        else:
            assert row["tpot_s"] == ""
        assert Decimal(row["queue_s"]) == Decimal(row["scheduled_s"]) - Decimal(row["arrival_s"])


def test_parquet_holds_the_same_rows(result: Result, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    write_outputs(result, tmp_path, plots=False, requests_format="parquet")
    write_outputs(result, tmp_path / "csv", plots=False)
    table = pq.read_table(tmp_path / "requests.parquet").to_pydict()
    with (tmp_path / "csv" / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(table) == REQUEST_COLUMNS
    for name in ("arrival_s", "tpot_s"):
        assert table[name] == [float(row[name]) if row[name] else None for row in rows]
    assert table["output_tokens"] == [int(row["output_tokens"]) for row in rows]


def test_parquet_without_pyarrow_names_the_extra_and_leaves_nothing(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"kvsim\[parquet\]"):
        write_outputs(result, tmp_path / "out", requests_format="parquet")
    assert not (tmp_path / "out").exists()


def test_nothing_half_written_when_a_step_fails(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_outputs(result, tmp_path, plots=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvsim.reports.files.write_requests_csv", full_disk)
    other = make_result(logs={"full": make_log(num_requests=30)}, warmup=0)
    with pytest.raises(InputError, match=r"--out=.*No space left"):
        write_outputs(other, tmp_path, plots=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_output_place_that_cannot_be_written_is_an_input_error(result: Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"^--out=") as caught:
            write_outputs(result, place)
        assert caught.value.field == "--out"
    with pytest.raises(InputError, match="must be csv or parquet"):
        write_outputs(result, tmp_path, requests_format="xlsx")  # type: ignore[arg-type]


def test_files_of_an_earlier_run_do_not_stay_beside_new_ones(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stub_save(chart: Chart, folder: Path) -> list[Path]:
        for kind in ("png", "svg"):
            (folder / f"{chart.name}.{kind}").write_bytes(b"")
        return []

    monkeypatch.setattr("kvsim.reports.figures.chart.save", stub_save)
    monkeypatch.setattr("kvsim.reports.html.page.page", lambda report: "")
    (tmp_path / "mine.txt").write_text("kept")
    first = write_outputs(result, tmp_path, perfetto=True)
    assert {path.name for path in first} == set(FILE_NAMES) - {"requests.parquet"}
    second = write_outputs(result, tmp_path, plots=False, report=False)
    assert {path.name for path in second} == {"summary.json", "requests.csv", "timeline.csv"}
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "requests.csv", "timeline.csv", "mine.txt"}
