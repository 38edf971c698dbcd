"""Headlines of papers that say little of their set-up: Scissorhands, KIVI, ThinK with KIVI. Rows without bars, with their confidence.

Batches are the largest that memory holds under Hugging Face generate on an A100-80GB, by kvsim's own ledger; throughput is simulated.
"""

from __future__ import annotations

from typing import Any

from kvsim.api import Deployment, build_ledger, build_plan, deploy, simulate
from kvsim.scenario import parse_scenario
from kvsim.validation.cases import Row
from kvsim.validation.loads import at_once, fixed
from kvsim.validation.naive import BYTES

NAME = "published"
KIVI, THINK, SCISSORHANDS = "KIVI headline", "ThinK + KIVI headline", "Scissorhands headline"
KIVI_2 = {"kind": "kivi", "bits": 2, "group_size_tokens": 32, "residual_tokens": 32}
"""The residual that ThinK states of both; KIVI's default of 128 would leave half of 161 + 338 tokens in 16 bits."""
THINK_40 = {"kind": "think", "pruned_frac": 0.4}
PROMPT, OUTPUT = 161, 338
"""Mean lengths that KIVI gives; ThinK says 160 + 338."""


def _scenario(policy: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    return {
        "gpu": "a100-sxm-80gb", "model": "llama-2-7b", "weight_dtype": "fp16", "policies": {"p": policy},
        "engine": {"kind": "huggingface", "batch_size": batch, "gpu_memory_utilization": 1.0, "attn_implementation": "eager"},
        "workload": at_once(batch, fixed(PROMPT, OUTPUT)),
    }  # fmt: skip


def _deployment(policy: list[dict[str, Any]]) -> tuple[Deployment, Any]:
    scenario = parse_scenario(_scenario(policy, 1))
    deployment = deploy(scenario)
    return deployment, build_plan(deployment, scenario.policies["p"], "policies.p")


def largest_batch(policy: list[dict[str, Any]]) -> int:
    """Sequences that memory holds to their end."""
    deployment, plan = _deployment(policy)
    return int(build_ledger(deployment, plan).pool_units // plan.peak_units(PROMPT, OUTPUT))


def peak_bytes(policy: list[dict[str, Any]], batch: int) -> float:
    """Weights, buffers and the cache of so many sequences at their longest."""
    deployment, plan = _deployment(policy)
    ledger = build_ledger(deployment, plan)
    used = sum(line.num_bytes for line in ledger.lines[2:] if line.name != "KV pool" and not line.name.startswith("of which"))
    return used + float(batch * plan.peak_units(PROMPT, OUTPUT) * plan.unit_bytes)


def output_rate(policy: list[dict[str, Any]], batch: int) -> float:
    return float(simulate(parse_scenario(_scenario(policy, batch))).policies["p"].summary.output_tokens_per_s)


def rows() -> list[Row]:
    """Four of KIVI, two of ThinK with KIVI, two of Scissorhands."""
    full, kivi, both = largest_batch([]), largest_batch([KIVI_2]), largest_batch([THINK_40, KIVI_2])
    ratio = peak_bytes([], full) / peak_bytes([KIVI_2], full)
    bytes_saved = _bytes_saved([KIVI_2])
    gain = output_rate([KIVI_2], kivi) / output_rate([], full)
    alone = output_rate([KIVI_2], 1) / output_rate([], 1)
    source = "KIVI (ICML 2024), abstract and figure 4: Llama-2-7B, A100-80GB, 161 + 338 tokens"
    low = "headline: set-up not given in full"
    found = [
        _row(KIVI, "largest batch over fp16", 4.0, kivi / full, source, "headline: up to 4x", bytes_saved),
        _row(KIVI, "throughput at its largest batch over fp16's", 3.47, gain, source, "headline: 2.35-3.47x", bytes_saved),
        _row(KIVI, "peak memory of fp16 over KIVI, one batch", 2.6, ratio, source, low, bytes_saved),
        _row(KIVI, "throughput at batch 1 over fp16's", 1.0, alone, source, "in words: none while the cache is small", bytes_saved),
    ]
    source = "ThinK (ICLR 2025), with KIVI, 160 + 338 tokens, 40 % of channels pruned"
    ratio, bytes_saved = peak_bytes([], full) / peak_bytes([THINK_40, KIVI_2], full), _bytes_saved([THINK_40, KIVI_2])
    found += [
        _row(THINK, "largest batch over fp16", 5.0, both / full, source, "headline: 4x to 5x", bytes_saved),
        _row(THINK, "peak memory of fp16 over both, one batch", 2.8, ratio, source, low, bytes_saved),
    ]
    return found + _scissorhands()


def _row(group: str, case: str, truth: float, predicted: float, source: str, confidence: str, bytes_saved: float) -> Row:
    return Row(NAME, group, case, "x", truth, predicted, source, {BYTES: bytes_saved}, "", confidence)


def _bytes_saved(policy: list[dict[str, Any]]) -> float:
    """Cache bytes of a finished sequence, fp16 over the policy."""
    last = OUTPUT - 1
    return float(_deployment([])[1].kv_bytes(PROMPT, last) / _deployment(policy)[1].kv_bytes(PROMPT, last))


def _scissorhands() -> list[Row]:
    """OPT-175B at 2,048 tokens with a fifth of them kept at most, and the same in 4 bits with their scales."""
    tokens = 2048
    scenario = {**_scenario([], 1), "model": "opt-175b", "tensor_parallel": 8}
    drop = {"kind": "scissorhands", "budget_tokens": tokens // 5}
    found = []
    for case, truth, policy, confidence in (
        ("cache, 5x", 5.0, [drop], "headline: a ratio by definition"),
        ("cache in 4 bits, 20x", 20.0, [drop, {"kind": "kv_quant", "dtype": "int4"}], "headline: scales not counted by the paper"),
    ):
        parsed = parse_scenario({**scenario, "policies": {"full": [], "p": policy}})
        deployment = deploy(parsed)
        plans = [build_plan(deployment, parsed.policies[name], name) for name in ("full", "p")]
        full, kept = (max(plan.kv_bytes(tokens // 2, step) for step in range(tokens // 4, tokens // 2)) for plan in plans)
        found.append(Row(NAME, SCISSORHANDS, case, "x", truth, full / kept, "Scissorhands (NeurIPS 2023)", {}, "", confidence))
    return found


