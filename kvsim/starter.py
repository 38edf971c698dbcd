"""`kvsim init`: a commented scenario out of a few answers, checked to load, to fit and to bear its traffic."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvsim.api import build_ledger, build_plan, deploy, simulate
from kvsim.catalogue import is_path
from kvsim.engines import ENGINES
from kvsim.engines.base import Engine
from kvsim.errors import DoesNotFitError, InputError, KvsimError
from kvsim.hardware import load_gpu
from kvsim.lengths import Lognormal
from kvsim.memory import check_fits
from kvsim.model import Model, load_model
from kvsim.policies import POLICIES
from kvsim.scenario import Scenario, parse_scenario
from kvsim.schema import field_rows, kind_of
from kvsim.serving import RequestCheck, check_context
from kvsim.units import GIB

LOAD_FRAC = 0.7
"""Of the requests per second that the first policy serves when all wait at once: busy, and not overloaded."""
PROBE_REQUESTS = 400
NUM_REQUESTS, WARMUP_REQUESTS = 1000, 50
BATCH_SIZE = 8
"""Of the Hugging Face engine, whose own default is one request at a time."""
SMALL_GPU_BYTES, SMALL_GPU_PREFILL_TOKENS = 35 * GIB, 2048
"""SGLang's own chunked_prefill_size below 35 GiB (python/sglang/srt/server_args.py)."""


class Traffic(NamedTuple):
    """Lognormal lengths, cut at the maxima."""

    prompt_mean_tokens: int
    prompt_max_tokens: int
    output_mean_tokens: int
    output_max_tokens: int
    source: str


TRAFFIC = {
    "chat": Traffic(1155, 8192, 211, 1024, "means of the Azure LLM inference trace, conversation, 2023"),
    "summarise": Traffic(8000, 30000, 300, 1024, "assumed: documents of some 6,000 words, answers of a page"),
    "rag": Traffic(6000, 15000, 250, 1024, "assumed: a dozen retrieved passages, answers of a paragraph"),
}
SPREAD = {"chat": (0.96, 0.77), "summarise": (0.6, 0.6), "rag": (0.4, 0.8)}
"""Coefficients of variation of prompts and answers: of the same trace for chat, else assumed."""
TRACE_FORMATS = {".csv": "csv", ".jsonl": "jsonl"}
FULL = "full"


@dataclass(frozen=True)
class Answers:
    """What the user chose. traffic: a name of TRAFFIC, or a file of TRACE_FORMATS. rate_per_s, tensor_parallel: None to find one.

    policies: kinds, "+" between those of one composition. folder: where the scenario will lie.
    """

    gpu: str
    model: str
    engine: str
    traffic: str
    policies: tuple[str, ...]
    rate_per_s: float | None = None
    tensor_parallel: int | None = None
    weight_dtype: str = "bf16"
    folder: Path = Path()


def starter_text(answers: Answers) -> str:
    """The YAML of a scenario. Raises InputError for answers that contradict each other, DoesNotFitError for too small a GPU."""
    scenario = _that_fits(answers)
    if answers.traffic in TRAFFIC and answers.rate_per_s is None:
        scenario = _with_rate(scenario, _bearable_rate_per_s(scenario))
    return _text(scenario, answers)


def policy_blocks(name: str, prompt_tokens: int, block_tokens: int) -> list[dict[str, Any]]:
    """The blocks of a composition such as snapkv+kivi, each at half of a prompt's tokens or at its papers' usual setting."""
    budget = max(64, prompt_tokens // 128 * 64)
    settings: dict[str, dict[str, Any]] = {
        "keyformer": {"kept_frac": 0.5}, "h2o": {"kept_frac": 0.5}, "scissorhands": {"budget_tokens": budget},
        "kv_compress": {"compression_ratio": 4, "block_size_tokens": block_tokens}, "snapkv": {"budget_tokens": budget},
        "pyramid_kv": {"budget_tokens": budget}, "ada_kv": {"budget_tokens": budget}, "window": {"window_tokens": budget},
        "streaming_llm": {"sink_tokens": 4, "window_tokens": budget - 4}, "think": {"pruned_frac": 0.4}, "kivi": {"bits": 4},
        "kv_quant": {"dtype": "fp8"},
    }  # fmt: skip
    known = [kind_of(policy) for policy in POLICIES]
    kinds = [part.strip().replace("-", "_") for part in name.split("+")]
    for kind in kinds:
        if kind not in known:
            raise InputError("--policies", kind, "is not a policy", f"use {', '.join(known)}, with + between those that compose")
    return [{"kind": kind, **settings.get(kind, {})} for kind in kinds if kind != FULL]


def _that_fits(answers: Answers) -> Scenario:
    """With the fewest GPUs that hold the model and the longest request, of a trace every one, under every policy."""
    load_gpu(answers.gpu)
    model = load_model(answers.model)
    chosen = answers.tensor_parallel
    sizes = [chosen] if chosen is not None else [tp for tp in model.valid_tps() if tp in (1, 2, 4, 8)]
    refused: KvsimError | None = None
    for tp in sizes:
        scenario = parse_scenario(_data(answers, model, tp), answers.folder)
        deployment = deploy(scenario)
        plans = [build_plan(deployment, policies, f"policies.{name}") for name, policies in scenario.policies.items()]
        workload, lengths = scenario.workload, scenario.workload.lengths
        recorded = list(workload.requests(answers.folder)) if workload.trace is not None else []
        for request in recorded:
            check_context(request, model.name, deployment.max_tokens)
        try:
            for plan in plans:
                ledger = build_ledger(deployment, plan)
                check = RequestCheck(deployment, plan, ledger.pool_units)
                for request in recorded:
                    check(request)
                if isinstance(lengths, Lognormal):
                    longest = (lengths.prompt_max_tokens or 0, lengths.output_max_tokens or 0)
                    check_fits(plan, ledger.pool_units, "workload.lengths.prompt_max_tokens", *longest)
        except KvsimError as error:
            refused = error
            continue
        return scenario
    assert refused is not None
    if chosen is not None:
        raise refused
    raise DoesNotFitError(f"no tensor_parallel of {', '.join(map(str, sizes))} will do; with the largest: {refused}")


def _data(answers: Answers, model: Model, tp: int) -> dict[str, Any]:
    kind = answers.engine
    if kind not in (kinds := [kind_of(engine) for engine in ENGINES]):
        raise InputError("--engine", kind, "is not an engine", f"use {', '.join(kinds)}")
    traffic = _cut(answers.traffic, model) if answers.traffic in TRAFFIC else None
    engine: dict[str, Any] = {"kind": kind}
    if traffic is not None:
        engine["max_model_len"] = traffic.prompt_max_tokens + traffic.output_max_tokens
        if kind == "trtllm" and traffic.prompt_max_tokens > 8192:  # its default budget for whole prompts
            engine["chunked_context"] = True
    if kind == "sglang" and load_gpu(answers.gpu).hbm_bytes < SMALL_GPU_BYTES:
        engine["chunked_prefill_size_tokens"] = SMALL_GPU_PREFILL_TOKENS
    if kind == "huggingface":
        engine["batch_size"] = BATCH_SIZE
    block_tokens = next(engine for engine in ENGINES if kind_of(engine) == kind)().block_tokens
    prompt_tokens = traffic.prompt_mean_tokens if traffic else 2048
    policies = {name: policy_blocks(name, prompt_tokens, block_tokens) for name in answers.policies}
    by_kind = {kind_of(policy): policy for policy in POLICIES}
    if any(by_kind[block["kind"]].per_head_lengths for blocks in policies.values() for block in blocks):
        engine["per_head_kv"] = True
    return {
        "name": f"{model.name} on {tp} x {load_gpu(answers.gpu).name}, {Path(answers.traffic).stem}",
        "gpu": _from_folder(answers.gpu, answers.folder), "model": _from_folder(answers.model, answers.folder),
        "tensor_parallel": tp, "weight_dtype": answers.weight_dtype, "engine": engine,
        "workload": _workload(answers, traffic), "policies": policies, "slo": {"ttft_p99_s": 2.0, "tpot_p99_s": 0.1},
    }  # fmt: skip


def _cut(name: str, model: Model) -> Traffic:
    """The traffic, its longest requests cut to the model's context."""
    traffic, context = TRAFFIC[name], model.max_context_tokens
    output_max = min(traffic.output_max_tokens, max(context // 4, 1))
    prompt_max = min(traffic.prompt_max_tokens, context - output_max)
    if traffic.prompt_mean_tokens > 0.9 * prompt_max or traffic.output_mean_tokens > 0.9 * output_max:
        rule = f"has prompts of {traffic.prompt_mean_tokens:,} tokens on average, too long for the {context:,} of {model.name}"
        raise InputError("--traffic", name, rule, "choose a model with a longer context, or other traffic")
    return traffic._replace(prompt_max_tokens=prompt_max, output_max_tokens=output_max)


def _workload(answers: Answers, traffic: Traffic | None) -> dict[str, Any]:
    if traffic is None:
        form = TRACE_FORMATS.get(Path(answers.traffic).suffix)
        if form is None:
            known = f"use {', '.join(TRAFFIC)}, or a file {' or '.join(TRACE_FORMATS)} of your own requests"
            raise InputError("--traffic", answers.traffic, "is not known", known)
        if answers.rate_per_s is not None:
            raise InputError("--rate", answers.rate_per_s, "must not be given for a trace, which has its own", "leave it out")
        if not Path(answers.traffic).is_file():
            raise InputError("--traffic", answers.traffic, "does not exist", "give the path of a trace")
        return {"trace": {"path": os.path.relpath(answers.traffic, answers.folder), "format": form, "limit": 2000}}
    prompt_cv, output_cv = SPREAD[answers.traffic]
    lengths = {"kind": "lognormal", **traffic._asdict(), "prompt_cv": prompt_cv, "output_cv": output_cv}
    del lengths["source"]
    return {
        "arrivals": {"kind": "poisson", "rate_per_s": answers.rate_per_s or 1.0}, "lengths": lengths,
        "num_requests": NUM_REQUESTS, "warmup_requests": WARMUP_REQUESTS, "seed": 0,
    }  # fmt: skip


def _from_folder(name: str, folder: Path) -> str:
    """Paths in a scenario start from its folder."""
    return os.path.relpath(Path(name).expanduser(), folder) if is_path(name) and Path(name).expanduser().exists() else name


def _bearable_rate_per_s(scenario: Scenario) -> float:
    """Two digits of LOAD_FRAC of what the first policy serves when everyone waits."""
    first = next(iter(scenario.policies))
    workload = scenario.workload.model_dump(mode="json", exclude_unset=True)
    workload |= {"arrivals": {"kind": "all_at_once"}, "num_requests": PROBE_REQUESTS, "warmup_requests": 0}
    data = scenario.model_dump(mode="json", exclude_unset=True) | {"workload": workload, "slo": {}}
    data["policies"] = {first: data["policies"][first]}
    rate_per_s = LOAD_FRAC * simulate(parse_scenario(data, scenario.base_dir)).policies[first].summary.requests_per_s
    return float(f"{rate_per_s:.2g}")


def _with_rate(scenario: Scenario, rate_per_s: float) -> Scenario:
    data = scenario.model_dump(mode="json", exclude_unset=True)
    data["workload"]["arrivals"]["rate_per_s"] = rate_per_s
    return parse_scenario(data, scenario.base_dir)


# -- text ---------------------------------------------------------------------------------------------------------------


def _text(scenario: Scenario, answers: Answers) -> str:
    workload, rate = scenario.workload, ""
    if answers.traffic in TRAFFIC and answers.rate_per_s is None:
        first = next(iter(scenario.policies))
        rate = f"  # The rate is {LOAD_FRAC:.0%} of what {first} served in a simulation where all requests wait at once.\n"
    source = f"  # {TRAFFIC[answers.traffic].source}; put your own numbers, or a trace, here.\n" if answers.traffic in TRAFFIC else ""
    traffic = workload.model_dump(mode="json", exclude_unset=True)
    return f"""# Written by kvsim init. `kvsim run THIS_FILE` simulates it, `kvsim show THIS_FILE` resolves it without simulating.
# All fields: docs/scenarios.md; `kvsim schema` makes editors complete and check them.
name: {flow_yaml(scenario.name)}
gpu: {flow_yaml(scenario.gpu)}  # kvsim list gpus
model: {flow_yaml(scenario.model)}  # kvsim list models, or the path of a Hugging Face config.json
tensor_parallel: {scenario.tensor_parallel}  # GPUs that share each layer
weight_dtype: {scenario.weight_dtype}  # fp32, fp16, bf16, fp8, int8 or int4

engine:  # kvsim list engines
{_engine_lines(scenario.engine, scenario.engine.for_gpu(load_gpu(answers.gpu), scenario.tensor_parallel))}
workload:
{source}{rate}{_lines(traffic)}
# The whole cache, [], is what the others are compared with; blocks in one list compose (kvsim list policies).
policies:
{_policy_lines(scenario)}
# Limits in seconds: METRIC_STATISTIC_s with ttft, tpot, e2e, queue or itl, and mean, p50, p90, p99 or max.
slo: {flow_yaml(dict(scenario.slo))}
"""


def _engine_lines(engine: Engine, on_gpu: Engine) -> str:
    """Its own fields and those that differ from the defaults, each with its meaning; unset ones as comments. on_gpu: with defaults of its
    GPU, so that what is written down is what would be taken."""
    values = {
        name: value if value is None else chosen
        for (name, value), chosen in zip(engine.model_dump(mode="json").items(), on_gpu.model_dump(mode="json").values(), strict=True)
    }
    lines = [f"  kind: {values['kind']}"]
    own = {row.name for row in field_rows(type(engine), Engine)}
    for row in field_rows(type(engine)):
        value = values[row.name]
        if row.name in (own | {"kv_cache_dtype"}) or value != type(engine).model_fields[row.name].default:
            entry = f"# {row.name}:" if value is None else f"{row.name}: {flow_yaml(value)}"
            lines.append(f"  {entry}  # {row.meaning.split(';')[0]}")
    return "\n".join(lines) + "\n"


def _policy_lines(scenario: Scenario) -> str:
    lines = []
    for name, policies in scenario.policies.items():
        blocks = [policy.model_dump(mode="json", exclude_unset=True) for policy in policies]
        lines.append(f"  {flow_yaml(name)}: {flow_yaml(blocks)}")
    return "\n".join(lines) + "\n"


def _lines(block: Mapping[str, Any]) -> str:
    return "".join(f"  {name}: {flow_yaml(value)}\n" for name, value in block.items())


def flow_yaml(value: Any) -> str:
    """One line, blocks in braces."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {flow_yaml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(flow_yaml, value)) + "]"
    if isinstance(value, float) and math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{value:.0f}"
    plain = isinstance(value, str) and value.replace("-", "").replace("_", "").replace(".", "").isalnum() and value[0].isalpha()
    return value if plain and value not in ("true", "false", "null", "yes", "no", "on", "off") else json.dumps(value, ensure_ascii=False)
