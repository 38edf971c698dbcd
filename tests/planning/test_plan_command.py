"""`kvsim plan` end to end: files, tables, exit codes, wrong input; and the rate found, on seeds that the search has not seen."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvsim.cli import main
from kvsim.commands.exit_codes import BAD_INPUT, DONE, NO_OPTION
from kvsim.planning.evidence import Evidence, criteria
from kvsim.planning.result import PlanResult
from kvsim.planning.robustness import World, robust_rate
from kvsim.planning.run import plan
from kvsim.planning.spec import PlanSpec, load_plan, parse_plan
from kvsim.planning.trial import Trial
from kvsim.reports.plan_files import CSV_FIELDS, plan_markdown
from kvsim.reports.plan_terminal import plan_text

ROOT = Path(__file__).parents[2]
DATA: dict[str, Any] = {
    "name": "small plan",
    "model": "llama-3.1-8b",
    "engine": {"kind": "vllm_v1", "max_model_len": 8192},
    "workload": {
        "arrivals": {"kind": "poisson", "rate_per_s": 8}, "num_requests": 500,
        "lengths": {
            "kind": "lognormal", "prompt_mean_tokens": 500, "output_mean_tokens": 30, "prompt_max_tokens": 4000, "output_max_tokens": 300,
        },
    },
    "policies": {"full": [], "kv-fp8": [{"kind": "kv_quant", "dtype": "fp8"}]},
    "slo": {"ttft_p90_s": 1.0, "tpot_p90_s": 0.05},
    "plan": {
        "target_rate_per_s": 100, "currency": "USD", "max_requests": 1000,
        "gpus": {"a100-sxm-80gb": {"price_per_gpu_hour": 1.5}, "t4-16gb": {"price_per_gpu_hour": 0.2}},
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(DATA, sort_keys=False))
    return tmp_path


@pytest.fixture(scope="module")
def small() -> PlanResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvsim.planning.run.LEAST_REQUESTS", 200)
        patch.setattr("kvsim.planning.run.MOST_REQUESTS", 300)
        return plan(parse_plan(DATA), draws=3, seeds=2, jobs=1)


def test_options_are_ranked_and_add_up(small: PlanResult) -> None:
    usable = [option for option in small.options if option.reason is None]
    assert [option.name for option in small.options[len(usable) :]] == ["1 x t4-16gb, full", "1 x t4-16gb, kv-fp8"]
    assert all("does not fit on 1 x t4-16gb" in (option.reason or "") for option in small.options[len(usable) :])
    assert len(usable) == 2 and [o.cost_per_hour for o in usable] == sorted(o.cost_per_hour for o in usable if o.cost_per_hour)
    for option in usable:
        assert option.rate_per_s and option.failing_rate_per_s and option.replicas and option.num_gpus and option.watts
        assert option.rate_per_s < option.failing_rate_per_s <= (option.capacity_per_s or 0)
        assert option.replicas * option.rate_per_s >= 100 > (option.replicas - 1) * option.rate_per_s
        assert option.cost_per_hour == pytest.approx(1.5 * option.num_gpus) and option.watts == 400 * option.num_gpus
        assert sum(option.resource_share_frac.values()) == pytest.approx(1) == pytest.approx(sum(option.op_share_frac.values()))
        met = [probe.rate_per_s for probe in option.probes if probe.decided and probe.meets_slo]
        assert max(met) == option.rate_per_s and option.ledger and option.basis and option.binds


def test_the_best_option_is_looked_at_closer(small: PlanResult) -> None:
    best = small.options[0]
    assert best.share_met_frac is not None and best.robust_rate_per_s is not None and best.rate_per_s is not None
    assert best.robust_rate_per_s <= best.rate_per_s
    assert {"output length", "prompt length", "burstiness of arrivals", "gpu_memory_utilization", "time of gemm"} <= {
        row.name for row in best.sensitivity
    }
    rows = {row.name: row for row in best.sensitivity}
    assert rows["time of gemm"].rate_at_low_per_s > rows["time of gemm"].rate_at_high_per_s  # quicker kernels bear more
    assert rows["prompt length"].rate_at_low_per_s > rows["prompt length"].rate_at_high_per_s
    assert not small.options[1].sensitivity and small.options[1].robust_rate_per_s is None


def test_reports_say_the_same(small: PlanResult) -> None:
    text, markdown = plan_text(small), plan_markdown(small)
    for part in ("small plan", "1 x a100-sxm-80gb", "Cannot be deployed", "router", "USD", "What the rate of"):
        assert part in text and part in markdown
    assert " ".join(small.summary[0].split()) in " ".join(text.split())


def test_any_number_of_jobs_gives_the_same_plan() -> None:
    scenario = parse_plan(DATA | {"plan": {**DATA["plan"], "sensitivity_options": 0}})
    assert plan(scenario, draws=2, seeds=2, jobs=2) == plan(scenario, draws=2, seeds=2, jobs=1)


def test_command_writes_all_or_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "plan.yaml", "--draws", "0", "--jobs", "1", "--policy", "full", "--out", "out"]
    command += ["--set", "plan.sensitivity_options=0"]
    assert main([*command, "--json"]) == DONE
    printed = capsys.readouterr().out
    assert printed == (folder / "out" / "plan.json").read_text()
    read = PlanResult.model_validate_json(printed)
    assert read.schema_version == 1 and read.num_draws == 0 and json.loads(printed)["currency"] == "USD"
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"plan.csv", "plan.json", "plan.md", "report.html", "report.md", "pareto.svg"} <= names
    rows = list(csv.DictReader((folder / "out" / "plan.csv").open()))
    assert [row["name"] for row in rows] == [option.name for option in read.options] and list(rows[0])[1:] == list(CSV_FIELDS)
    assert float(rows[0]["rate_per_s"]) == read.options[0].rate_per_s
    assert main([*command, "-q"]) == DONE and capsys.readouterr().out == ""


def test_an_slo_nobody_can_meet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "plan.yaml", "--draws", "0", "--jobs", "1", "--set", "slo={ttft_p90_s: 0.0001}", "--out", "out"]
    assert main(command) == NO_OPTION
    captured = capsys.readouterr()
    assert "No candidate can bear 100 requests/s within ttft_p90_s <= 0.0001" in captured.err and "Traceback" not in captured.err
    result = PlanResult.model_validate_json((folder / "out" / "plan.json").read_text())
    assert all(option.reason for option in result.options)
    assert "even at" in (result.options[0].reason or "") and "limit 0.0001" in (result.options[0].reason or "")


WRONG = {
    "slo={}": ["slo is missing", "try slo:"],
    "plan=null": ["gpu is missing", "1 more problem after this"],
    "plan=[3]": ["gpu is missing", "1 more problem after this"],
    "plan.target_rate_per_s=0": ["plan.target_rate_per_s=0 must be > 0"],
    "plan.gpus.t4-16gb={}": ["plan must give price_per_gpu_hour for every GPU", "t4-16gb has none"],
    "plan.gpus={h100-smx: {}}": ["plan must have prices to go with currency=USD"],
    "plan.gpus={h100-smx: {price_per_gpu_hour: 2}}": ["plan.gpus.h100-smx is not in the catalogue", "did you mean h100-sxm"],
    "plan.gpus={l4: {price_per_gpu_hour: -2}}": ["plan.gpus.l4.price_per_gpu_hour=-2 must be >= 0"],
    "plan.currency=null": ["plan must name the currency"],
    "plan.tensor_parallel=[2, 2]": ["plan.tensor_parallel=[2, 2] must name each choice once"],
    "plan.engines=[{max_num_seq: 4}]": ["plan.engines[0].max_num_seq is not a known field", "did you mean max_num_seqs?"],
    "plan.engines=[{kind: vllm}]": ["plan.engines[0].kind='vllm' is not known"],
    "plan.min_goodput_frac=99": ["plan.min_goodput_frac=99 must be < 1"],
    "plan.goodput=1": ["plan.goodput is not a known field"],
    "policies={a: [{kind: snapkv, budget_tokens: 9000}]}": ["policies.a[0].budget_tokens=9000 must be below the context of 8192 tokens"],
    "workload.arrivals={kind: all_at_once}": ["workload.arrivals.kind='all_at_once' has no request rate"],
    "model=llama-9": ["model='llama-9' is not in the catalogue"],
    "replicas=3": ["replicas=3 must not be given, because a plan finds the number"],
    "fleet=[{gpu: l4}]": ["fleet must not be given"],
    "slo={ttft_p99: 1}": ["slo.ttft_p99=1", "did you mean ttft_p99_s?"],
}


@pytest.mark.parametrize("setting", WRONG)
def test_wrong_input_ends_in_one_line(setting: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["plan", "plan.yaml", "--out", "out", "--jobs", "1", "--set", setting]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("kvsim: error: ") and captured.err.count("\n") == 1, captured.err
    for part in WRONG[setting]:
        assert part in captured.err, captured.err
    assert sorted(folder.rglob("*")) == before


def test_a_file_without_a_plan_and_a_plan_that_is_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {name: value for name, value in DATA.items() if name != "plan"} | {"gpu": "l4"}
    (folder / "plain.yaml").write_text(yaml.safe_dump(plain))
    assert main(["plan", "plain.yaml"]) == BAD_INPUT
    assert "plan is missing; try plan: {target_rate_per_s: 40}" in capsys.readouterr().err
    assert main(["run", "plan.yaml", "--set", "gpu=l4"]) == BAD_INPUT
    assert "plan is a block of `kvsim plan` alone" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("in the way")
    assert main(["plan", "plan.yaml", "--out", "file"]) == BAD_INPUT
    assert "--out='file' must be a directory" in capsys.readouterr().err
    (folder / "locked").mkdir(mode=0o500)
    if not os.access(folder / "locked", os.W_OK):  # root may write everywhere
        assert main(["plan", "plan.yaml", "--out", "locked/out"]) == BAD_INPUT
        assert "cannot be written" in capsys.readouterr().err


def test_the_example_is_a_plan_of_twelve() -> None:
    from kvsim.planning.candidates import candidates

    scenario = load_plan(ROOT / "scenarios" / "plan_llama70b.yaml")
    assert len(candidates(scenario, 1155.0)) == 12


def test_every_field_of_a_plan_is_on_its_page() -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for name, field in PlanSpec.model_fields.items():
        assert f"| `{name}` |" in page and field.description, name


# -- the rate found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slo", [{"ttft_p50_s": 0.1}, pytest.param({"ttft_p90_s": 0.5}, marks=pytest.mark.slow)], ids=str)
def test_the_rate_found_passes_and_five_percent_more_fails(slo: dict[str, float]) -> None:
    """On seeds far from those of the search, in runs longer than most of its own."""
    lengths = {
        "kind": "lognormal", "prompt_mean_tokens": 200, "output_mean_tokens": 20, "prompt_max_tokens": 2000, "output_max_tokens": 200,
    }  # fmt: skip
    fields = {
        "gpu": "a100-sxm-80gb", "slo": slo, "policies": {"full": []}, "engine": {**DATA["engine"], "max_num_seqs": 16},
        "workload": {**DATA["workload"], "lengths": lengths},
        "plan": {"target_rate_per_s": 40, "max_requests": 32_000, "sensitivity_options": 0},
    }  # fmt: skip
    scenario = parse_plan(DATA | fields)
    (option,) = plan(scenario, draws=0).options
    assert option.rate_per_s is not None

    from kvsim.planning.candidates import candidates
    from kvsim.planning.traffic import Traffic

    traffic = Traffic(scenario.workload, scenario.base_dir)
    (candidate,) = candidates(scenario, traffic.mean_prompt_tokens)
    trial = Trial(candidate, traffic)
    verdicts = []
    for rate in (option.rate_per_s, 1.05 * option.rate_per_s):
        samples = [trial.run(rate, 10_000 + seed, 20_000) for seed in range(2)]
        verdicts.append(Evidence(rate, criteria(slo, None), slo, True, samples=samples).meets())
    assert verdicts == [True, False]


# -- the robust rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 20, 57])
def test_the_robust_rate_is_the_quantile_of_thresholds(number: int) -> None:
    """With thresholds that are known: all but 5 % of worlds hold it, to its tolerance, and few worlds are tried often."""
    thresholds = {draw: 8.0 + 4.0 * ((7 * draw) % number) / number for draw in range(number)}
    worlds = [World(None, None, (), (), draw, 0, 0) for draw in range(number)]  # type: ignore[arg-type]
    tried = []

    def run(asked: Any) -> list[bool]:
        tried.extend(asked)
        return [rate < thresholds[world.draw] for world, rate in asked]

    outcome = robust_rate(worlds, 10.0, run)
    expected = min(10.0, sorted(thresholds.values())[int(0.05 * number + 1e-9)])
    assert outcome.robust_rate_per_s is not None
    assert expected / 1.02 - 1e-9 <= outcome.robust_rate_per_s <= expected
    assert outcome.share_met_frac == sum(value > 10 for value in thresholds.values()) / number
    assert len(tried) < 4 * number
    assert robust_rate(worlds, 1000.0, run).robust_rate_per_s is None
