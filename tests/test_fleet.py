"""Fleets from a scenario's YAML to the reports: one replica is no fleet, groups differ where they say so, mistakes end in a line."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvsim import frames
from kvsim.api import simulate
from kvsim.cli import main
from kvsim.errors import InputError, KvsimError
from kvsim.reports.files import summary_data, to_json, write_outputs, write_requests_csv
from kvsim.reports.saved import read_run
from kvsim.reports.terminal import render_text
from kvsim.result import Result
from kvsim.scenario import parse_scenario
from kvsim.uncertainty import error_bands

TINY = str(Path(__file__).parent / "theory" / "tiny.yaml")
BASE: dict[str, Any] = {
    "gpu": "l4-24gb", "model": TINY, "engine": {"kind": "vllm_v1", "max_num_seqs": 32}, "policies": {"full": []},
    "workload": {
        "arrivals": {"kind": "poisson", "rate_per_s": 500}, "num_requests": 80, "warmup_requests": 5,
        "lengths": {"kind": "fixed", "prompt_tokens": 200, "output_tokens": 20},
    },
}  # fmt: skip


def result_of(**fields: Any) -> Result:
    return simulate(parse_scenario({**BASE, **fields}))


def written(result: Result, path: Path) -> tuple[str, bytes]:
    write_requests_csv(result, path)
    return to_json(result), path.read_bytes()


def test_a_fleet_of_one_is_no_fleet(tmp_path: Path) -> None:
    plain = written(result_of(), tmp_path / "plain.csv")
    assert written(result_of(replicas=1), tmp_path / "one.csv") == plain
    grouped = result_of(fleet=[{"gpu": "l4-24gb"}])
    data, rows = summary_data(grouped), written(grouped, tmp_path / "group.csv")[1]
    expected = json.loads(plain[0])
    assert rows == plain[1]
    assert {**data, "scenario": 0} == {**expected, "scenario": 0}
    assert "replicas" not in expected["policies"]["full"]


def test_a_group_overrides_what_it_names() -> None:
    """Two groups of one replica each, of which all traffic goes to one by weight of 1000 to 0.001: as that one alone."""
    engine = {"kind": "vllm_v0", "max_num_seqs": 4}
    own = {"gpu": "a100-sxm-80gb", "tensor_parallel": 2, "engine": engine, "weight_dtype": "fp8", "profile": "datasheet"}
    alone = result_of(**own).policies["full"]
    fleet = result_of(fleet=[{**own, "weight": 1000}, {"weight": 0.001}]).policies["full"]
    first, second = fleet.replicas
    assert (first.num_requests, second.num_requests) == (75, 0)
    assert first.log == alone.log and first.ledger == alone.ledger and first.pool_units == alone.pool_units
    assert fleet.summary.ttft == alone.summary.ttft
    assert fleet.summary.utilisation_frac == pytest.approx(alone.summary.utilisation_frac / 2)
    assert fleet.imbalance_x == pytest.approx(2)
    assert not len(second.log.requests) and second.mean_e2e_s != second.mean_e2e_s


def test_a_mixed_fleet_of_two_gpus_and_two_policies() -> None:
    """The faster GPU answers more under a router that looks; a group's own policy stays whatever the others run."""
    fleet = [
        {"gpu": "h100-sxm-80gb"}, {"name": "old", "replicas": 2, "policy": [{"kind": "snapkv", "budget_tokens": 64}]},
    ]  # fmt: skip
    workload = {**BASE["workload"], "arrivals": {"kind": "poisson", "rate_per_s": 100}, "num_requests": 400}
    result = result_of(
        gpu="l40s-48gb", model="llama-3.1-8b", fleet=fleet, workload=workload, router={"kind": "least_outstanding_tokens"}
    )
    policy = result.policies["full"]
    assert [replica.group for replica in policy.replicas] == ["h100-sxm-80gb", "old", "old"]
    assert policy.replicas[0].num_requests > max(replica.num_requests for replica in policy.replicas[1:])
    assert [replica.description for replica in policy.replicas] == ["full", "snapkv", "snapkv"]
    assert policy.description == "full / snapkv" and result.baseline is None
    assert {"h100", "l40s"} <= {name for name in ("h100", "l40s") for row in policy.basis if name in row.source}


@pytest.mark.parametrize("stream", ["inline", "side"])
def test_side_streams_and_prefix_caches_belong_to_each_replica(stream: str, tmp_path: Path) -> None:
    rows = [
        {"arrival_s": 0.001 * i, "prompt_tokens": 128, "output_tokens": 9, "prefix_hashes": [7, 8, 9, 100 + i]} for i in range(24)
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    workload = {"trace": {"path": str(tmp_path / "trace.jsonl"), "format": "jsonl", "hash_block_tokens": 32}}
    engine = {"kind": "vllm_v1", "policy_stream": stream}
    policies = {"full": [], "snapkv": [{"kind": "snapkv", "budget_tokens": 64}]}
    result = result_of(workload=workload, engine=engine, policies=policies, replicas=3, router={"kind": "least_kv_use"})
    for replica in result.policies["full"].replicas:
        cached = replica.log.request_columns()["cached_tokens"].tolist()
        assert cached[0] == 0 and max(cached) == 96  # nobody finds what another replica has computed
    side = [replica.log.side_ps for replica in result.policies["snapkv"].replicas]
    assert all(side) if stream == "side" else not any(side)


def test_reports_show_replicas(tmp_path: Path) -> None:
    policies = {"full": [], "snapkv": [{"kind": "snapkv", "budget_tokens": 64}]}
    result = result_of(replicas=3, router={"kind": "random", "seed": 4}, policies=policies)
    text = render_text(result)
    assert "3 replicas" in text and "Replicas under full (busiest: " in text and "Replicas under snapkv" in text
    assert "Replicas" not in render_text(result_of())
    write_outputs(result, tmp_path, perfetto=True)
    summary = json.loads((tmp_path / "summary.json").read_text())["policies"]["full"]
    assert [replica["num_requests"] for replica in summary["replicas"]] == [r.num_requests for r in result.policies["full"].replicas]
    assert sum(replica["share_frac"] for replica in summary["replicas"]) == pytest.approx(1) and summary["imbalance_x"] >= 1
    rows = list(csv.DictReader((tmp_path / "requests.csv").open()))
    for name, policy in result.policies.items():
        for number, replica in enumerate(policy.replicas):
            own = {int(row["index"]) for row in rows if row["policy"] == name and int(row["replica"]) == number}
            assert own == set(replica.log.request_columns()["index"].tolist())
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert "What each replica behind the router had of the work" in (tmp_path / "report.html").read_text()
    again = read_run(tmp_path).result.policies["full"]
    for saved, replica in zip(again.replicas, result.policies["full"].replicas, strict=True):
        assert replace(saved, log=replica.log) == replica
    frame = frames.steps(result)
    assert [len(log.step_columns()["start_ps"]) for log in result.policies["full"].logs] == [
        int(((frame.policy == "full") & (frame.replica == number)).sum()) for number in range(3)
    ]
    assert names == [f"{policy}, replica {number}" for policy in policies for number in range(3)]
    assert (tmp_path / "over_time.png").exists()


@pytest.mark.parametrize("kind", ["vllm_v0", "sglang", "trtllm", "huggingface", "flexgen"])
def test_every_engine_as_a_fleet(kind: str) -> None:
    """Each replica keeps accounts of its own: time by Op adds up to its busy time, to the picosecond."""
    result = result_of(engine={"kind": kind}, replicas=2, router={"kind": "least_outstanding_tokens"})
    for log in result.policies["full"].logs:
        rows = log.step_columns()
        steps = rows["num_steps"]
        busy_ps = steps * rows["first_step_ps"] + rows["step_growth_ps"] * (steps * (steps - 1) // 2)
        assert sum(log.op_ps.values()) == int(busy_ps.sum()) > 0


def test_bands_of_a_fleet() -> None:
    """A fleet's draws bias every group: with two of the same GPU the band is about as wide as one replica's, not narrower."""
    common: dict[str, Any] = {"workload": {**BASE["workload"], "arrivals": {"kind": "all_at_once"}}}
    one = error_bands(parse_scenario({**BASE, **common}), 8)["full"].by_metric["tpot_p50_s"]
    two = error_bands(parse_scenario({**BASE, **common, "fleet": [{}, {"name": "b"}]}), 8)["full"].by_metric["tpot_p50_s"]
    assert two.p84 / two.p16 == pytest.approx(one.p84 / one.p16, rel=0.15) and one.p84 / one.p16 > 1.01


WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"replicas": 0}, ("replicas=0 must be >= 1", "the default is 1")),
    ({"replicas": 1001}, ("replicas=1001 must be <= 1,000",)),
    ({"replicas": 2.5}, ("replicas=2.5 must be a whole number",)),
    ({"replica": 2}, ("replica is not a known field", "did you mean replicas?")),
    ({"router": "round_robin"}, ("router='round_robin' must be a mapping", "try router: {kind: round_robin}")),
    ({"router": {"kind": "least_tokens"}}, ("router.kind='least_tokens' is not known",)),
    ({"router": {}}, ("router.kind is missing", "use one of round_robin")),
    ({"router": {"kind": "round_robin", "seed": 3}}, ("router.seed is not a known field", "belongs to kind random or power_of_two")),
    ({"router": {"kind": "random", "seed": -1}}, ("router.seed=-1 must be >= 0",)),
    ({"fleet": {"gpu": "l4-24gb"}}, ("fleet={'gpu': 'l4-24gb'} must be a list", "put it in [ ]")),
    ({"fleet": [{"gpus": "l4-24gb"}]}, ("fleet[0].gpus is not a known field", "did you mean gpu?")),
    ({"fleet": [{}, {"count": 2}]}, ("fleet[1].count is not a known field",)),
    ({"fleet": [{"weight": 0}]}, ("fleet[0].weight=0 must be >= 0.001",)),
    ({"fleet": [{"engine": {"kind": "vllm_v1", "max_seqs": 3}}]}, ("fleet[0].engine.max_seqs is not a known field", "max_num_seqs")),
    ({"fleet": [{}, {"gpu": "l5"}]}, ("fleet[1].gpu='l5' is not in the catalogue",)),
    ({"fleet": [{}, {"tensor_parallel": 3}]}, ("fleet[1].tensor_parallel=3 must divide",)),
    (
        {"fleet": [{}, {"engine": {"kind": "vllm_v1", "front_end_s": 0.01}}]},
        ("fleet[1].engine.front_end_s=0.01 must be 0.005 as in the first group", "give all groups the same"),
    ),
    ({"fleet": [{"replicas": 2}], "replicas": 3}, ("replicas=3 must not be given beside fleet", "leave one of them out")),
    (
        {"fleet": [{"weight": 2}, {}], "router": {"kind": "least_kv_use"}},
        ("fleet[0].weight=2.0 has no meaning under router.kind=least_kv_use", "another router"),
    ),
    (
        {"fleet": [{}, {"policy": [{"kind": "h2o", "kept_frac": 0.5}, {"kind": "window"}]}]},
        ("fleet[1].policy", "h2o", "window"),
    ),
    (
        {"fleet": [{}, {"engine": {"kind": "vllm_v1", "num_gpu_blocks": 5}, "name": "small"}]},
        ("request", "(small)", "must fit the KV pool"),
    ),
    ({"fleet": [{}, {"engine": {"kind": "vllm_v1", "gpu_memory_utilization": 0.01}}]}, ("fleet[1]: ", "does not fit")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "says"), WRONG, ids=lambda value: str(value)[:60] if isinstance(value, dict) else "")
def test_bad_input_is_one_line(fields: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(KvsimError) as caught:
        result_of(**fields)
    text = str(caught.value)
    assert all(part in text for part in says) and "\n" not in text, text


def test_contradictions_show_before_anything_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = [{}, {"engine": {"kind": "vllm_v1", "block_size_tokens": 32}}]
    policies = {"full": [], "kvc": [{"kind": "kv_compress", "compression_ratio": 2, "block_size_tokens": 16}]}
    told: list[str] = []
    with pytest.raises(InputError):
        simulate(parse_scenario({**BASE, "fleet": fleet, "policies": policies}), lambda name, done: told.append(name))
    assert not told
    path = tmp_path / "scenario.json"
    path.write_text(json.dumps({**BASE, "replicas": 2, "fleet": [{}]}))
    assert main(["run", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
