"""What others ran with a compressed cache and with a full one on the same machine, as scenarios and what they saw.

Groups that say `partly stated` come from sources that leave something out or ran another engine; their confidence says what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from kvsim.units import GIB
from kvsim.validation import published_compression as p
from kvsim.validation.loads import SHAREGPT_MEANS, at_once, fixed, loop

FULL = "full"
PARTLY = ", partly stated"
CALIBRATED = "the full cache's rate here set kvsim's time of an eager launch"
FP8, INT4 = [{"kind": "kv_quant", "dtype": "fp8"}], {"kind": "kv_quant", "dtype": "int4"}
KIVI = [{"kind": "kivi", "bits": 4}]
V1 = {"kind": "vllm_v1", "enable_prefix_caching": False}


@dataclass(frozen=True)
class Run:
    """One cache: the policy's blocks, what was measured by metric, and the bytes that attention reads, of those of a full cache."""

    truths: Mapping[str, float]
    policy: list[dict[str, Any]] = field(default_factory=list)
    bytes_frac: float = 1.0


@dataclass(frozen=True)
class Setting:
    """A machine and a load that several caches had. group: what compresses, and whether a source leaves something out."""

    group: str
    name: str
    gpu: str
    model: str
    engine: Mapping[str, Any]
    workload: Mapping[str, Any]
    runs: Mapping[str, Run]
    source: str
    confidence: str = ""
    batch: int = 1
    tp: int = 1
    weight_dtype: str = "bf16"
    mean_tokens: tuple[float, float] | None = None
    """Of prompt and answer, where they come from a file."""


def settings() -> list[Setting]:
    return [*_vllm_blog(), *_a100_eager(), *_l4(), *_others(), *_sparse_vllm(), *_lmdeploy(), *_hugging_face()]


def _fp8(full: Mapping[str, float], fp8: Mapping[str, float]) -> dict[str, Run]:
    return {FULL: Run(full), "fp8": Run(fp8, FP8, 0.5)}


def _vllm_blog() -> list[Setting]:
    found = []
    for gpu, lines in p.ITL_LINES.items():
        for prompt in p.ITL_PROMPTS:
            full, fp8 = ({"tpot_ms": intercept + slope * prompt} for intercept, slope in (lines["full"], lines["fp8"]))
            found.append(Setting(
                "fp8 cache", f"Llama-3.1-8B {prompt}+128", gpu, "llama-3.1-8b", {**V1, "max_model_len": 131072},
                at_once(1, fixed(prompt, 128)), _fp8(full, fp8), f"{p.VLLM_BLOG}: vLLM 0.19.1",
                "read off the line that the source fitted to its sweep",
            ))  # fmt: skip
    lengths = {"kind": "uniform", "prompt_min_tokens": 17_000, "prompt_max_tokens": 23_000, "output_min_tokens": 1_700,
               "output_max_tokens": 2_300}  # fmt: skip
    load = loop(8, 150, lengths)
    full, fp8 = ({"ttft_p50_ms": ttft, "itl_p50_ms": itl, "output_tok_s": rate} for ttft, itl, _, rate in p.UNDER_LOAD.values())
    found.append(Setting(
        "fp8 cache", "Llama-3.1-8B c=8 20000+2000", "h100-sxm", "llama-3.1-8b",
        {**V1, "max_model_len": 131072, "max_num_batched_tokens": 8192}, load, _fp8(full, fp8), f"{p.VLLM_BLOG}: vLLM 0.19.1, table 4",
        "lengths drawn uniformly within the stated 15 %; a step's tokens are vLLM's default for a server on this GPU", batch=8,
    ))  # fmt: skip
    return found


def _a100_eager() -> list[Setting]:
    """A time of prompts is the whole time of eight of which one token is asked."""
    engine = {**V1, "enforce_eager": True, "max_model_len": 32768, "max_num_batched_tokens": 8192, "front_end_s": 0}
    token_bytes, pools = 2 * 36 * 8 * 128, list(zip(p.A100_POOL_TOKENS, (2, 1), strict=True))
    found = []
    for prompt, runs in p.A100_PROMPTS.items():
        full, fp8 = ({"duration_s": seconds} for seconds, _ in runs)
        found.append(Setting(
            "fp8 cache", f"Qwen3-8B 8 prompts of {prompt}", "a100-sxm-80gb", "qwen3-8b", engine, at_once(8, fixed(prompt, 1)),
            _fp8(full, fp8), p.A100_EAGER, "tokens of a step not stated: vLLM's default offline", batch=8,
        ))  # fmt: skip
        full, fp8 = ({"itl_p50_ms": 8e3 / rate} for _, rate in runs)
        longest = prompt == max(p.A100_PROMPTS)
        if longest:
            full["kv_pool_gib"], fp8["kv_pool_gib"] = (n * size * token_bytes / GIB for n, size in pools)
        found.append(Setting(
            "fp8 cache", f"Qwen3-8B 8 x {prompt}+256", "a100-sxm-80gb", "qwen3-8b", engine, at_once(8, fixed(prompt, 256)),
            _fp8(full, fp8), p.A100_EAGER, "" if longest else CALIBRATED, batch=8,
        ))  # fmt: skip
    return found


def _l4() -> list[Setting]:
    engine = {**V1, "max_model_len": 32768, "max_num_seqs": 1, "max_num_batched_tokens": 2048}
    found = []
    for prompt, rates in p.L4_RATES.items():
        pool = {"kv_pool_gib": p.L4_POOL_GIB} if prompt == min(p.L4_RATES) else {}
        full, fp8 = ({"tpot_ms": 1e3 / rate, **pool} for rate in rates)
        found.append(Setting(
            "fp8 cache", f"Qwen3-4B {prompt}+256", "l4", "qwen3-4b", engine, at_once(1, fixed(prompt, 256)), _fp8(full, fp8), p.L4_DOCS,
            "tokens generated not stated, 256 taken",
        ))  # fmt: skip
    return found


def _others() -> list[Setting]:
    token_bytes = 2 * 64 * 8 * 128 / 4
    full, fp8 = (
        {"ttft_ms": ttft, "tpot_ms": tpot, "kv_pool_gib": tokens * size * token_bytes / GIB}
        for (ttft, tpot, tokens), size in zip(p.ADA_TP4_RUNS.values(), (2, 1), strict=True)
    )
    one_by_one = loop(1, 2, fixed(10_240, 1024))
    burst = {"arrivals": {"kind": "poisson", "rate_per_s": 128}, "num_requests": 1000, "lengths": SHAREGPT_MEANS}
    rates = ({"requests_per_s": rate} for rate in p.SGLANG_13B_REQUESTS_PER_S.values())
    return [
        Setting(
            "fp8 cache", "Qwen3-32B on 4 GPUs 10240+1024", "rtx-4090", "qwen3-32b", {**V1, "max_model_len": 40960}, one_by_one,
            _fp8(full, fp8), p.ADA_TP4, tp=4,
        ),
        Setting(
            "fp8 cache" + PARTLY, "Llama-2-13B ShareGPT", "a100-sxm-80gb", "llama-2-13b", {"kind": "sglang", "max_model_len": 4096}, burst,
            _fp8(*rates), p.SGLANG_13B,
            "memory of the card not stated, 80 GB taken; lengths by other sources' means; a release of 2024", batch=64, weight_dtype="fp16",
        ),
    ]  # fmt: skip


def _sparse_vllm() -> list[Setting]:
    kept = 4096 + 128 + 8
    policies: dict[str, list[dict[str, Any]]] = {
        FULL: [], "snapkv": [{"kind": "snapkv", "budget_tokens": kept, "window_tokens": 128}],
        "pyramid_kv": [{"kind": "pyramid_kv", "budget_tokens": kept, "window_tokens": 128}],
    }  # fmt: skip
    engine = {"kind": "sglang", "max_model_len": 131072, "chunked_prefill_size_tokens": 4096}
    runs = {
        name: Run({"itl_p50_ms": mean(times)}, policies[name], 1.0 if name == FULL else kept / 128_064)
        for name, times in p.SPARSE_VLLM_ITL_MS.items()
    }
    return [Setting(
        "evicted tokens" + PARTLY, "Qwen2.5-7B-1M 4 x 128000+128", "h100-sxm", "qwen2.5-7b-1m", engine, at_once(4, fixed(128_000, 128)),
        runs, p.SPARSE_VLLM, "its own engine, after LightLLM and nano-vLLM: SGLang stands in", batch=4,
    )]  # fmt: skip


def _lmdeploy() -> list[Setting]:
    kept = p.LMDEPLOY_KEPT_TOKENS
    policies: dict[str, list[dict[str, Any]]] = {
        FULL: [], "kivi": KIVI, "streaming_llm": [{"kind": "streaming_llm", "window_tokens": kept - 4}],
        "h2o": [{"kind": "h2o", "budget_tokens": kept}],
    }  # fmt: skip
    engine = {"kind": "vllm_v0", "enforce_eager": True, "max_model_len": 4096}
    confidence = "LMDeploy's PyTorch engine: eager vLLM V0 stands in; kept tokens as its own predictor takes them"
    found = []
    for (model, batch, prompt), rates in p.LMDEPLOY_RATES.items():
        read = {FULL: 1.0, "kivi": 5 / 16, "streaming_llm": kept / prompt, "h2o": kept / prompt}
        runs = {name: Run({"itl_p50_ms": 1e3 * batch / rate}, policies[name], read[name]) for name, rate in rates.items()}
        found.append(Setting(
            "several policies" + PARTLY, f"{model} {batch} x {prompt}+64", "rtx-a6000", model, engine, at_once(batch, fixed(prompt, 64)),
            runs, p.LMDEPLOY, confidence, batch=batch, weight_dtype="fp16",
        ))  # fmt: skip
    return found


def _hugging_face() -> list[Setting]:
    engine = {"kind": "huggingface", "max_prefill_tokens": 8192}
    found = [
        Setting(
            "full cache", f"{model} {prompt}+32", "l40s", model, engine, at_once(1, fixed(prompt, 33)),
            {FULL: Run({"ttft_ms": 1e3 * prefill, "tpot_ms": step})}, p.L40S_HF, "32 passes by hand, without generate",
        )
        for model, (prompt, prefill, step) in p.L40S_HF_RUNS.items()
    ]  # fmt: skip
    for prompt, sweeps in p.KVPRESS_SWEEPS_S.items():
        lengths = {"kind": "empirical", "path": f"kvpress-{prompt}.csv", "repeat": True}
        load = loop(1, len(p.KVPRESS_KEPT_FRACS), lengths)
        full, quanto = ({"tpot_ms": (whole - loaded) / p.KVPRESS_STEPS * 1e3} for loaded, whole in sweeps)
        runs = {FULL: Run(full), "quanto": Run(quanto, [INT4], 4.5 / 16)}
        found.append(Setting(
            "4-bit cache" + PARTLY, f"Llama-3.1-8B {prompt}+100, 20-100 % kept", "a100-sxm-80gb", "llama-3.1-8b",
            {**engine, "attn_implementation": "flash_attention_2"}, load, runs, p.KVPRESS,
            "difference of two loops that both load the model; prompts as long as what Knorm keeps stand in; PCIe or SXM not stated",
            mean_tokens=(mean(p.KVPRESS_KEPT_FRACS) * prompt, 100),
        ))  # fmt: skip
    return found
