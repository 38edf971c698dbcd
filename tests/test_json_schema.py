"""The JSON Schema accepts every scenario of the repository, and refuses what kvsim refuses field by field."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from kvsim.cli import main
from kvsim.errors import InputError
from kvsim.hardware import list_gpus
from kvsim.json_schema import scenario_schema
from kvsim.scenario import load_scenario, parse_scenario
from kvsim.schema import kind_of

ROOT = Path(__file__).parent.parent
SCENARIOS = sorted(path for path in (ROOT / "scenarios").glob("*.yaml") if not path.name.startswith(("sweep_", "plan_")))
BASE: dict[str, Any] = yaml.safe_load((ROOT / "scenarios" / "a100_llama8b.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(scenario_schema())


def changed(dotted: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(BASE)
    block, *_ = data, None
    *path, last = [int(part) if part.isdigit() else part for part in dotted.split("/")]
    for part in path:
        block = block[part]
    if value is DROP:
        del block[last]
    else:
        block[last] = value
    return data


DROP = object()


def accepted(data: dict[str, Any]) -> bool:
    try:
        parse_scenario(data, ROOT)
    except InputError:
        return False
    return True


def test_it_is_a_schema_of_its_draft(validator: Draft202012Validator) -> None:
    Draft202012Validator.check_schema(scenario_schema())
    assert scenario_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_of_the_repository_is_valid(path: Path, validator: Draft202012Validator) -> None:
    load_scenario(path)
    assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))] == []


def test_scenarios_with_every_default_written_out_are_valid(validator: Draft202012Validator) -> None:
    from kvsim.engines import ENGINES
    from kvsim.policies import POLICIES

    needs = {"scissorhands": {"budget_tokens": 100}, "kv_compress": {"compression_ratio": 2}, "h2o": {"kept_frac": 0.5}}
    data = changed("policies", {kind_of(p): [{"kind": kind_of(p), **needs.get(kind_of(p), {})}] for p in POLICIES})
    for engine in ENGINES:
        data["engine"] = {"kind": kind_of(engine)}
        written = parse_scenario(data, ROOT).model_dump(mode="json")
        assert list(validator.iter_errors(written)) == [], kind_of(engine)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [("gpus", "a100"), ("gpu", 3), ("gpu", DROP), ("tensor_parallel", 9), ("tensor_parallel", 0), ("tensor_parallel", "two"),
     ("weight_dtype", "bf17"), ("engine/kind", "vllm"), ("engine/kind", DROP), ("engine/max_num_seqs", 0),
     ("engine/max_num_seqs", 2.5), ("engine/max_seqs", 3), ("engine/gpu_memory_utilization", 1.1), ("engine/watermark_frac", 0.1),
     ("workload/num_requests", 0), ("workload/arrivals/rate_per_s", -1), ("workload/arrivals", {"kind": "poison"}),
     ("workload/lengths/prompt_mean_tokens", "1k"), ("workload/oops", 1), ("policies", {}), ("policies", ["full"]),
     ("policies/snapkv", {"kind": "snapkv"}), ("policies/snapkv/0/budget_token", 3), ("policies/h2o-50/0/kept_frac", 1.5),
     ("policies/snapkv/0/kind", DROP), ("slo", {"ttft_p98_s": 1}), ("slo", {"ttft_p99_s": "1 s"}), ("base_dir", "/tmp")],
)  # fmt: skip
def test_what_kvsim_refuses_the_schema_refuses(dotted: str, value: Any, validator: Draft202012Validator) -> None:
    data = changed(dotted, value)
    assert list(validator.iter_errors(data))
    assert not accepted(data) or dotted == "slo"  # whose keys are checked with the deployment


@pytest.mark.parametrize(
    ("dotted", "value"),
    [("gpu", "a100"), ("gpu", "mine.yaml"), ("model", "path/config.json"), ("engine/max_model_len", None), ("slo", {}),
     ("workload/arrivals", {"kind": "uniform", "rate_per_s": 1}), ("policies/full", [{"kind": "full"}]), ("name", DROP)],
)  # fmt: skip
def test_what_kvsim_takes_the_schema_takes(dotted: str, value: Any, validator: Draft202012Validator) -> None:
    data = changed(dotted, value)
    assert accepted(data) and list(validator.iter_errors(data)) == []


def test_editors_find_names_units_and_meanings() -> None:
    schema = scenario_schema()
    assert schema["properties"]["gpu"]["anyOf"][0]["enum"] == list_gpus()
    engine = schema["$defs"]["VllmV1"]["properties"]
    assert engine["block_size_tokens"]["description"] == "tokens of a KV block [tokens]"
    for name, block in schema["$defs"].items():
        for field, content in block["properties"].items():
            assert field == "kind" or content.get("description"), f"{name}.{field}"
            assert content["title"] == field


def test_the_command_prints_it_and_the_documents_say_how(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["schema"], ["schema", "scenario"]):
        assert main(argv) == 0
        assert json.loads(capsys.readouterr().out) == scenario_schema()
    page = (ROOT / "docs" / "scenarios.md").read_text(encoding="utf-8")
    assert re.search(r"^# yaml-language-server: \$schema=kvsim\.schema\.json$", page, re.MULTILINE)
    assert main(["schema", "gpu"]) == 2
