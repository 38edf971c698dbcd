"""End-to-end serving on H100 under vLLM, TensorRT-LLM and SGLang (`h100_silicon_dense.csv` of the measured data).

Only `calibrate` groups of `silicon_split.csv` chose anything here: the client protocol of each source, the settings of its engines
where they are not stated, and the seconds of the front end. The bars are over the `validate` groups. Rows without a stated
concurrency are counted, not scored.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from kvsim.validation.cases import Bar, Case, Row, Truth
from kvsim.validation.naive import roofline

NAME = "silicon"
MODELS = {
    "Qwen/Qwen3-32B": "qwen3-32b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
}
PEER = "table-based peer"
"""A published simulator over the same kernel tables predicted 562 of these rows: TPOT MAPE 13.1 %, TTFT 53.9 %."""


class Protocol(NamedTuple):
    """How a source's client drove the engine: a closed loop. spare_tokens: what its engines compute in a step beside one prompt
    and a token for each client; None: their defaults."""

    requests_per_concurrency: int
    length_range_frac: float
    spare_tokens: int | None
    basis: str


PROTOCOLS = {
    "InferenceMAX-dump": Protocol(10, 0.2, None, "its harness sends 10 x concurrency prompts with lengths of 0.8-1.0 x nominal"),
    # Of the publisher's repository (ai-dynamo/aiconfigurator): eval/benchmarks/genai_perf_runner.py sends 10 x concurrency requests
    # of fixed lengths; generator/rule_plugin/benchmark sets max_num_tokens = max_batch_size + ISL + 1500, its batch size being the
    # concurrency. On the calibrate groups that beats 2,048 and 8,192 tokens under vLLM and 8,192 under TensorRT-LLM.
    "NVIDIA-sweep": Protocol(10, 0.0, 1500, "its evaluation tool: 10 x concurrency requests of fixed lengths, all clients at once"),
}
ENGINES: dict[str, dict[str, Any]] = {
    # 0.12 and before: asynchronous scheduling became the default in 0.14. 8,192 batched tokens is the server's default on H100.
    "vllm": {"kind": "vllm_v1", "async_scheduling": False, "max_num_batched_tokens": 8192},
    "trtllm": {"kind": "trtllm", "max_num_tokens": 8192},
    "sglang": {"kind": "sglang"},  # which the publisher's rule for max_prefill_tokens makes worse on the calibrate groups
}
STEP_TOKENS = {"vllm": "max_num_batched_tokens", "trtllm": "max_num_tokens"}


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def cases(measured: Path, quick: bool) -> list[Case]:
    """Every scored row. quick: every eighth of each group, none with long answers."""
    split = {tuple(r[c] for c in ("model", "engine", "tp", "weight_dtype")): r["split"] for r in _table(measured / "silicon_split.csv")}
    found: list[Case] = []
    seen: dict[str, int] = {}
    for row in _table(measured / "h100_silicon_dense.csv"):
        if row["concurrency_stated"] != "1" or row["suspect"] != "0":
            continue
        key = tuple(row[c] for c in ("model", "engine", "tp", "weight_dtype"))
        group = f"{split[key]}: {MODELS[key[0]]} {key[1]} tp{key[2]} {key[3]}"
        seen[group] = seen.get(group, 0) + 1
        if quick and (seen[group] % 8 != 1 or int(row["output_tokens"]) > 1024):
            continue
        for kv_dtype in ("auto", "fp8") if key[3] == "fp8" else ("auto",):
            found.append(_case(row, group, kv_dtype))
    return found


def _case(row: dict[str, str], group: str, kv_dtype: str) -> Case:
    clients, prompt, output = (int(float(row[c])) for c in ("concurrency", "input_tokens", "output_tokens"))
    protocol, model, tp = PROTOCOLS[row["source"]], MODELS[row["model"]], int(row["tp"])
    engine = {**ENGINES[row["engine"]], "max_model_len": max(prompt + output + 64, 2048), "kv_cache_dtype": kv_dtype}
    if protocol.spare_tokens is not None and row["engine"] in STEP_TOKENS:
        engine[STEP_TOKENS[row["engine"]]] = clients + prompt + protocol.spare_tokens
    if row["engine"] == "vllm":
        engine["max_num_seqs"] = max(256, clients)
    scenario = {
        "gpu": "h100-sxm-80gb", "model": model, "tensor_parallel": tp, "weight_dtype": row["weight_dtype"], "engine": engine,
        "workload": {
            "arrivals": {"kind": "closed_loop", "clients": clients, "length_range_frac": protocol.length_range_frac},
            "lengths": {"kind": "fixed", "prompt_tokens": prompt, "output_tokens": output},
            "num_requests": protocol.requests_per_concurrency * clients,
        },
        "policies": {"full": []},
    }  # fmt: skip
    naive = roofline("h100-sxm-80gb", model, tp, row["weight_dtype"], clients, prompt, output)
    return Case(
        NAME, group, f"c={clients} {prompt}+{output} KV {kv_dtype}", scenario,
        (Truth("tpot_ms", float(row["tpot_ms"])), Truth("ttft_ms", float(row["ttft_ms"]))),
        f"{row['source']}, {row['engine']} {row['engine_version']}".strip(), {"roofline": naive},
    )  # fmt: skip


def bars(rows: list[Row]) -> list[Bar]:
    """Over the validate groups; fp8 rows, whose KV dtype is not stated, by the mean error of both."""
    found = []
    for metric, limit, group_limit in (("tpot_ms", 0.10, 0.18), ("ttft_ms", 0.27, None)):
        errors: dict[str, list[float]] = {}
        for row in rows:
            if row.group.startswith("validate") and row.metric == metric:
                errors.setdefault(row.group, []).append(abs(row.error))
        if not errors:
            continue
        every = [error for group in errors.values() for error in group]
        found.append(Bar(NAME, f"{metric}: MAPE over validate groups", mean(every), limit))
        if group_limit is not None:
            worst = max(errors, key=lambda group: mean(errors[group]))
            found.append(Bar(NAME, f"{metric}: MAPE of the worst group ({worst})", mean(errors[worst]), group_limit))
    return found
