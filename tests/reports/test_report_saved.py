"""A results folder read back gives the report that was written; a folder that is none gives one clear line and no file."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_log, make_result
from plan_fakes import make_plan

from kvsim.cli import main
from kvsim.commands.exit_codes import BAD_INPUT, DONE
from kvsim.reports.files import to_json, write_outputs
from kvsim.reports.names import PAIR_NAMES, PLAN_NAMES, RUN_NAMES
from kvsim.reports.saved import SavedRun, read_run, saved_run
from kvsim.reports.terminal import SECTIONS, render_text
from kvsim.result import Band, Bands, Result

NAN = float("nan")


def small_result(num_requests: int = 60) -> Result:
    logs = {"full": make_log(num_requests=num_requests), "[kivi]": make_log(num_requests=num_requests, slots=40)}
    return make_result(logs=logs, warmup=5)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_outputs(small_result(), folder, plots=False, report=False)
    return folder


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    """One of its own, to break."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture
def plan_folder(tmp_path: Path) -> Path:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text(make_plan().model_dump_json())
    return tmp_path / "plan"


# -- round trip --------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Equal, NaN to NaN."""
    return json.dumps(asdict(a), sort_keys=True) == json.dumps(asdict(b), sort_keys=True)


def test_what_is_read_is_what_was_written(run_folder: Path) -> None:
    result, read = small_result(), read_run(run_folder)
    assert read.has_requests and read.bins is not None
    assert list(read.result.policies) == list(result.policies)
    for name, policy in result.policies.items():
        back = read.result.policies[name]
        assert same(back.summary, policy.summary) and back.basis == policy.basis and back.ledger == policy.ledger
        mine, theirs = back.log.request_columns(), policy.log.request_columns()
        order = np.argsort(theirs["index"], kind="stable")
        assert all((mine[column] == theirs[column][order]).all() for column in theirs)
    in_memory = saved_run(result, to_json(result))
    for name, bins in read.bins.items():
        assert in_memory.bins is not None
        assert (bins.time_s == in_memory.bins[name].time_s).all()
        assert all((bins.values[key] == value).all() for key, value in in_memory.bins[name].values.items())


def test_the_terminal_report_can_be_made_from_the_folder(run_folder: Path) -> None:
    assert render_text(read_run(run_folder).result, sections=SECTIONS) == render_text(small_result(), sections=SECTIONS)


def test_numbers_that_are_none_come_back_as_none(tmp_path: Path) -> None:
    from dataclasses import replace

    result = make_result(logs={"full": make_log(num_requests=20)}, warmup=0, slo={})
    policy = result.policies["full"]
    summary = replace(policy.summary, itl=replace(policy.summary.itl, p99_s=NAN), queue_growth=None)
    bands = {"full": Bands(4, {"tpot_p50_s": Band(1.0, 2.0, 3.0, 4.0, 5.0)})}
    result = replace(result, policies={"full": replace(policy, summary=summary, kv_bytes_per_sequence=NAN)}, bands=bands)
    write_outputs(result, tmp_path, plots=False)
    back = read_run(tmp_path).result
    assert same(back.policies["full"].summary, summary) and back.bands == bands
    assert back.policies["full"].kv_bytes_per_sequence != back.policies["full"].kv_bytes_per_sequence
    assert back.policies["full"].summary.goodput_frac is None


def test_published_quality_comes_back_and_is_shown(tmp_path: Path) -> None:
    from dataclasses import replace

    from kvsim.reports.run_report import run_report

    quality = make_plan().options[0].quality
    result = small_result()
    policies = dict(result.policies) | {"[kivi]": replace(result.policies["[kivi]"], quality=quality)}
    write_outputs(replace(result, policies=policies), tmp_path, plots=False, report=False)
    back = read_run(tmp_path)
    assert back.result.policies["[kivi]"].quality == quality and back.result.policies["full"].quality is None
    (found,) = [section for section in run_report(back, charts=False).sections if section.slug == "quality"]
    (table,) = found.parts
    assert table.kind == "table" and [row[0].text for row in table.rows] == ["[kivi]"]


def test_parquet_requests_give_the_same_report(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_outputs(small_result(), tmp_path, plots=False, report=False, requests_format="parquet")
    one, other = read_run(run_folder), read_run(tmp_path)
    for name in one.result.policies:
        assert one.result.policies[name].log.requests == other.result.policies[name].log.requests


def test_report_makes_the_bytes_that_run_wrote(tmp_path: Path) -> None:
    write_outputs(make_result(logs={"full": make_log(num_requests=60)}, warmup=5), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    made = set(RUN_NAMES) - {"gains.png", "gains.svg"}
    assert made <= set(before)
    for name in made:
        (tmp_path / "out" / name).unlink()
    assert main(["report", str(tmp_path / "out"), "-q"]) == DONE
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_run_writes_no_report_where_none_is_asked_for(tmp_path: Path) -> None:
    made = write_outputs(make_result(logs={"full": make_log(num_requests=30)}, warmup=5), tmp_path, report=False)
    names = {path.name for path in made}
    assert "report.html" not in names and "latency_cdf.png" in names


def test_a_folder_of_an_older_run_reports_what_it_holds(folder: Path) -> None:
    (folder / "timeline.csv").unlink()
    (folder / "requests.csv").unlink()
    found = read_run(folder)
    assert not found.has_requests and found.bins is None
    assert main(["report", str(folder), "-q"]) == DONE
    text = (folder / "report.html").read_text()
    assert "no timeline.csv" in text and "no requests.csv" in text and "chart-time_by_op" in text
    assert not (folder / "latency_cdf.png").exists()


def test_reports_of_a_plan_go_where_they_are_sent(plan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(plan_folder), "--out", str(tmp_path / "elsewhere"), "--no-plots"]) == DONE
    names = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert names == {name for name in PLAN_NAMES if not name.endswith((".png", ".svg"))}
    assert [path.name for path in plan_folder.iterdir()] == ["plan.json"]
    assert "wrote" in capsys.readouterr().err
    page = (tmp_path / "elsewhere" / "report.md").read_text()
    assert page.startswith("# Llama-3.1-70B, chat, 40 requests/s\n") and "| 1. 2 x h100-sxm-80gb, kivi-4bit |" in page


def test_csv_of_a_run_has_the_numbers_of_its_summary(folder: Path) -> None:
    assert main(["report", str(folder), "-q", "--no-plots"]) == DONE
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "policies.csv").open() as file:
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    for name, policy in summary["policies"].items():
        assert float(rows[name]["ttft_p99_s"]) == policy["summary"]["ttft"]["p99_s"]
        assert float(rows[name]["gain_e2e_x"]) == policy["gains_over_baseline"]["e2e_x"]


def test_a_report_does_not_leave_an_earlier_ones_files(folder: Path) -> None:
    for name in ("gains.png", "over_time.svg"):
        (folder / name).write_bytes(b"old")
    (folder / "mine.txt").write_text("kept")
    assert main(["report", str(folder), "-q", "--no-plots"]) == DONE
    assert not (folder / "gains.png").exists() and (folder / "mine.txt").exists() and (folder / "requests.csv").exists()


# -- compare -----------------------------------------------------------------------------------------------------------


def test_compare_shows_what_differs_and_what_changes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = small_result(90)
    write_outputs(other, tmp_path / "b", plots=False, report=False)
    data = json.loads((tmp_path / "b" / "summary.json").read_text())
    data["scenario"]["engine"]["max_num_seqs"] = 64
    (tmp_path / "b" / "summary.json").write_text(json.dumps(data))
    assert main(["compare", str(folder), str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == DONE
    text = capsys.readouterr().out
    assert "engine.max_num_seqs" in text and max(len(line) for line in text.splitlines()) <= 100
    assert {path.name for path in (tmp_path / "c").iterdir()} == set(PAIR_NAMES)
    before = small_result().policies["[kivi]"].summary.tpot.mean_s
    after = other.policies["[kivi]"].summary.tpot.mean_s
    with (tmp_path / "c" / "compare.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if (row["policy"], row["metric"]) == ("[kivi]", "tpot_mean_s")]
    assert (float(row["a"]), float(row["b"])) == (before, after)
    assert float(row["change_frac"]) == pytest.approx(after / before - 1)
    assert f"{100 * (after / before - 1):+.1f}" in text


def test_a_run_compared_with_itself_does_not_change(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(folder), str(folder)]) == DONE
    text = capsys.readouterr().out
    assert "The scenarios are the same." in text and "What differs" not in text and "+0.0" in text


def pair_of(a: Result, b: Result) -> Any:
    from kvsim.reports.pair import Pair

    def saved(result: Result) -> SavedRun:
        return saved_run(result, to_json(result))

    return Pair.of(saved(a), saved(b), "a", "b")


def test_policies_are_matched_by_name_or_where_each_run_has_one() -> None:
    from kvsim.reports.pair import verdict

    log = make_log(num_requests=20)

    def run(*names: str) -> Result:
        return make_result(logs=dict.fromkeys(names, log), warmup=0)

    assert [match.name for match in pair_of(run("full", "a", "b"), run("c", "b", "full")).matches()] == ["full", "b", "a", "c"]
    (match,) = pair_of(run("full"), run("kivi")).matches()
    assert match.name == "full / kivi" and match.a is not None and match.b is not None
    strangers = pair_of(run("full", "a"), run("b"))
    assert "no policy in common" in verdict(strangers)[0] and not strangers.both()


def test_doubts_name_other_requests_and_versions() -> None:
    from dataclasses import replace

    from kvsim.reports.pair import doubts

    a = small_result()
    b = replace(a, scenario=dict(a.scenario) | {"workload": {"num_requests": 1}}, versions={"kvsim": "9"})
    lines = " ".join(doubts(pair_of(a, b)))
    assert "different requests" in lines and "different versions" in lines and "different" not in " ".join(doubts(pair_of(a, a)))


# -- wrong input -------------------------------------------------------------------------------------------------------


def change(name: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(edit(data)))

    return broken


def text(name: str, edit: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(edit((folder / name).read_text())) and None  # type: ignore[func-returns-value]


def _policy(data: Any, **fields: Any) -> Any:
    data["policies"]["full"] |= fields
    return data


WRONG_RUNS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no results: neither summary.json nor plan.json"),
    "a run and a plan": (lambda folder: (folder / "plan.json").write_text("{}"), "holds a plan and a run"),
    "cut off": (text("summary.json", lambda found: found[:500]), "summary.json is not valid JSON (line"),
    "not UTF-8": (lambda folder: (folder / "summary.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON (UnicodeDecodeError)"),
    "too deep": (lambda folder: (folder / "summary.json").write_text("[" * 100_000), "is not valid JSON (RecursionError)"),
    "NaN": (text("summary.json", lambda found: found.replace('"seed": 0', '"seed": NaN')), "is not valid JSON (ValueError)"),
    "a list": (lambda folder: (folder / "summary.json").write_text("[]"), "must hold a JSON object"),
    "newer": (change("summary.json", lambda data: data | {"schema_version": 2}), "schema_version=2 is newer than 1"),
    "no version": (lambda folder: (folder / "summary.json").write_text("{}"), "must be a whole number from 1"),
    "version true": (change("summary.json", lambda data: data | {"schema_version": True}), "must be a whole number from 1"),
    "no policies": (change("summary.json", lambda data: data | {"policy_order": []}), "policy_order=[] must list the policies"),
    "unknown policy": (change("summary.json", lambda data: data | {"policy_order": ["nobody"]}), "policy_order=['nobody'] must list"),
    "no summary": (change("summary.json", lambda data: _policy(data, summary=None)), "policies.full.summary is not as kvsim writes it"),
    "text as number": (change("summary.json", lambda data: _policy(data, pool_units="many")), "policies.full.pool_units is not as kvsim"),
    "no title": (change("summary.json", lambda data: {k: v for k, v in data.items() if k != "title"}), "title is not as kvsim writes it"),
    "other heads": (text("requests.csv", lambda found: found.replace("finish_s", "end_s", 1)), "requests.csv has no column finish_s"),
    "empty requests": (text("requests.csv", lambda found: ""), "requests.csv has no column policy"),
    "bad cell": (text("requests.csv", lambda found: found.replace("\nfull,0,", "\nfull,x,", 1)), "requests.csv, line 2 is not a row"),
    "huge cell": (text("requests.csv", lambda found: found.replace("\nfull,0,", f"\nfull,{2**70},", 1)), "line 2 is not a row of requests"),
    "short row": (text("requests.csv", lambda found: found + "full,1\n"), "is not a row of requests"),
    "other policy": (text("requests.csv", lambda found: found.replace("\nfull,0,", "\nnobody,0,", 1)), "policy='nobody' is not one of"),
    "another run's": (text("requests.csv", lambda found: "\n".join(found.split("\n")[:9]) + "\n"), "files of two runs"),
    "other timeline": (text("timeline.csv", lambda found: "a,b\n"), "timeline.csv must have the columns policy, time_s"),
    "bad timeline": (text("timeline.csv", lambda found: found + "full,1,nan,2,3\n"), "is not a row of this run"),
}  # fmt: skip


def complains(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error of a command that refuses."""
    code = main(argv)
    captured = capsys.readouterr()
    assert code == BAD_INPUT and captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("kvsim: error: ")
    return captured.err


@pytest.mark.parametrize("case", WRONG_RUNS)
def test_a_broken_folder_is_one_line_and_nothing_is_written(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, says = WRONG_RUNS[case]
    spoil(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert says in complains(["report", str(folder)], capsys)
    assert says in complains(["compare", str(folder), str(folder), "--out", str(folder / "new")], capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


WRONG_PLANS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "newer": (change("plan.json", lambda data: data | {"schema_version": 99}), "schema_version=99 is newer"),
    "unknown field": (change("plan.json", lambda data: data | {"colour": "red"}), "plan.json: colour is not as kvsim writes it"),
    "no options": (change("plan.json", lambda data: {k: v for k, v in data.items() if k != "options"}), "options is not as kvsim"),
    "cut off": (text("plan.json", lambda found: found[:300]), "plan.json is not valid JSON"),
}


@pytest.mark.parametrize("case", WRONG_PLANS)
def test_a_broken_plan_is_one_line(case: str, plan_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, says = WRONG_PLANS[case]
    spoil(plan_folder)
    assert says in complains(["report", str(plan_folder)], capsys)
    assert [path.name for path in plan_folder.iterdir()] == ["plan.json"]


def test_wrong_arguments(folder: Path, plan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "DIR='nowhere' does not exist" in complains(["report", "nowhere"], capsys)
    assert "is a file, not a folder of results" in complains(["report", str(tmp_path / "file")], capsys)
    assert "--out=" in complains(["report", str(folder), "--out", str(tmp_path / "file")], capsys)
    assert "--out=" in complains(["compare", str(folder), str(folder), "--out", str(tmp_path / "file")], capsys)
    assert "holds a plan, not a run" in complains(["compare", str(folder), str(plan_folder)], capsys)
    assert "Missing argument" in complains(["compare", str(folder)], capsys)


def test_a_full_disk_leaves_the_old_report(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "-q", "--no-plots"]) == DONE
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvsim.reports.write.markdown", full_disk)
    assert "No space left" in complains(["report", str(folder), "--no-plots"], capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
