"""Serving as others ran it, by the setting that it exercises: tensor parallelism, weights of 8 and 4 bits, long prompts, full pools...

A run says what its source states; `missing` is what that leaves out, empty where model, dtype, engine version, lengths and load are
all there. Runs are on any GPU, also on those with measured profiles. What chose a constant of the simulator is not in here.
"""

from __future__ import annotations

from typing import Any

from kvsim.validation import serving_singles
from kvsim.validation.loads import at_once, fixed, loop, sharegpt
from kvsim.validation.serving_run import A100, H100, NO_SXM, VLLM_11, Run

# -- GPUStack's performance lab: engines on one A100, offered everything at once -----------------------------------------

_LAB = "github.com/gpustack/gpustack, docs/performance-lab/{}: {}, `vllm bench serve`, all at once"
_LAB_ENGINES: dict[str, dict[str, Any]] = {
    "vLLM 0.11.0": {**VLLM_11, "max_num_batched_tokens": 2048},
    "SGLang 0.5.5.post1": {"kind": "sglang"},
    "TensorRT-LLM 1.2.0rc1": {"kind": "trtllm"},
}
_LAB_PROMPTS = {
    "qwen3-14b": {(32000, 99, 100): (4430.14, 445.58), (3996, 200, 500): (5153.42, 254.61), (1996, 100, 500): (5967.13, 301.73)},
    "qwen3-32b": {(32000, 77, 100): (1798.45, 67.87), (3996, 200, 500): (1837.08, 96.19), (1996, 100, 500): (2521.38, 143.23)},
}
"""vLLM in 16 bits: (prompt tokens, output tokens in the mean, requests) → total tokens a second, mean TPOT in ms."""
_LAB_SHAREGPT = {
    ("qwen3-14b", "vLLM 0.11.0", "bf16"): 1887.31, ("qwen3-14b", "vLLM 0.11.0", "int4"): 1801.74,
    ("qwen3-14b", "vLLM 0.11.0", "fp8"): 1604.75, ("qwen3-14b", "SGLang 0.5.5.post1", "bf16"): 2542.06,
    ("qwen3-14b", "TensorRT-LLM 1.2.0rc1", "bf16"): 2770.99,
    ("qwen3-32b", "vLLM 0.11.0", "bf16"): 832.43, ("qwen3-32b", "vLLM 0.11.0", "int4"): 850.81,
    ("qwen3-32b", "vLLM 0.11.0", "fp8"): 751.46,
    ("qwen3-32b", "SGLang 0.5.5.post1", "bf16"): 672.56, ("qwen3-32b", "TensorRT-LLM 1.2.0rc1", "bf16"): 987.91,
}  # fmt: skip
"""Output tokens a second of 1,000 ShareGPT requests. int4 is AWQ, fp8 in blocks of 128 and computed in 16 bits by Marlin."""
_LAB_LATENCY = {
    ("vLLM 0.11.0", "bf16"): (7.38, 64.00), ("SGLang 0.5.3.post3", "bf16"): (7.19, 27.70),
    ("TensorRT-LLM 1.2.0rc1", "bf16"): (7.67, 51.61), ("SGLang 0.5.3.post3", "fp8"): (5.65, 39.66),
}  # fmt: skip
"""Mean TPOT and TTFT in ms of Qwen3-8B under four clients."""


def _lab() -> list[Run]:
    found = []
    for model, rows in _LAB_PROMPTS.items():
        page = f"{model}/a100.md"
        engine = {**_LAB_ENGINES["vLLM 0.11.0"], "max_model_len": 32768}
        for (prompt, output, requests), (total, tpot) in rows.items():
            setting = "long prompts" if prompt > 30000 else "full pool" if model == "qwen3-32b" else "prompts beside decodes"
            found.append(Run(
                setting, f"{model}, {requests} of {prompt}+{output} at once, vLLM", A100, model, engine,
                at_once(requests, fixed(prompt, output)), {"total_tok_s": total, "tpot_ms": tpot}, _LAB.format(page, "vLLM 0.11.0"),
                f"{NO_SXM}; the chat template's tokens are in the prompt", batch=8,
            ))  # fmt: skip
    for (model, version, dtype), rate in _LAB_SHAREGPT.items():
        engine = {**_LAB_ENGINES[version], **({"max_model_len": 32768} if model == "qwen3-32b" else {})}
        setting = {"bf16": "full pool" if model == "qwen3-32b" else "ShareGPT at once", "int4": "4-bit weights"}.get(dtype, "8-bit weights")
        found.append(Run(
            setting, f"{model} {dtype}, 1000 ShareGPT at once, {version.split()[0]}", A100, model, engine,
            at_once(1000, sharegpt(217.4, 201.5)), {"output_tok_s": rate}, _LAB.format(f"{model}/a100.md", version),
            f"{NO_SXM}; lengths by their means", weight_dtype=dtype, batch=256,
        ))  # fmt: skip
    for (version, dtype), (tpot, ttft) in _LAB_LATENCY.items():
        engine = next(engine for name, engine in _LAB_ENGINES.items() if name.split()[0] == version.split()[0])
        engine = {**engine, "max_num_batched_tokens": 8192, "max_num_seqs": 1024} if "vLLM" in version else engine
        found.append(Run(
            "8-bit weights" if dtype == "fp8" else "four clients", f"Qwen3-8B {dtype} c=4 233+221, {version.split()[0]}", H100, "qwen3-8b",
            engine, loop(4, 100, sharegpt(232.6, 220.6)), {"tpot_ms": tpot, "ttft_ms": ttft},
            f"github.com/gpustack/gpustack, docs/performance-lab/qwen3-8b/h100-latency.md: {version}", "lengths by their means",
            weight_dtype=dtype, batch=4,
        ))  # fmt: skip
    return found


# -- Lambda: vLLM 0.5.4 on A100s and H100s, the recorded lengths ---------------------------------------------------------

_LAMBDA = "github.com/LambdaLabsML/vllm-benchmark, results_v0 and benchmark_v0.md: vLLM 0.5.4"
_LAMBDA_ENGINE = {"kind": "vllm_v0", "max_model_len": 2000, "max_num_seqs": 1024, "gpu_memory_utilization": 0.95}
_LAMBDA_TEN = (
    (A100, "mistral-7b-v0.3", 1, "bf16", "mistral-7b, 10", 203.888, 13.905),
    (A100, "mistral-7b-v0.3", 8, "bf16", "mistral-7b, 10", 399.149, 8.615),
    (H100, "mistral-7b-v0.3", 1, "bf16", "mistral-7b, 10", 336.735, 8.954),
    (A100, "llama-3.1-70b", 8, "fp8", "llama-3.1-70b, 10 on A100", 183.090, 18.722),
    (H100, "llama-3.1-70b", 4, "fp8", "llama-3.1-70b, 10 on H100", 196.690, 14.959),
    (H100, "llama-3.1-8b", 1, "fp8", "llama-3.1-8b, 10 on H100", 258.892, 6.229),
)  # fmt: skip
"""Ten requests: GPU, model, GPUs, dtype, lengths, output tokens a second, mean TPOT in ms."""
_LAMBDA_320 = {A100: {1: 1591.4, 2: 1861.61, 4: 2228.35, 8: 2381.43}, H100: {1: 3281.19, 2: 3758.54, 4: 4133.32, 8: 4397.11}}
"""Mistral-7B, 320 requests: GPUs → output tokens a second. Answers of the run on one A100 are taken for all."""


def _lambda() -> list[Run]:
    found = [
        Run("V0, ten requests", f"{model} {dtype} tp{tp}, {gpu[:4]}", gpu, model, _LAMBDA_ENGINE, lengths,
            {"output_tok_s": rate, "tpot_ms": tpot}, _LAMBDA, tp=tp, weight_dtype=dtype, batch=2)
        for gpu, model, tp, dtype, lengths, rate, tpot in _LAMBDA_TEN
    ]  # fmt: skip
    return found + [
        Run("V0, 320 requests", f"mistral-7b-v0.3 tp{tp}, {gpu[:4]}", gpu, "mistral-7b-v0.3", _LAMBDA_ENGINE, "mistral-7b, 320",
            {"output_tok_s": rate}, _LAMBDA, tp=tp, batch=160)
        for gpu, rates in _LAMBDA_320.items() for tp, rate in rates.items()
    ]  # fmt: skip


# -- TensorRT-LLM's own tables -------------------------------------------------------------------------------------------

_TRT = "github.com/NVIDIA/TensorRT-LLM, docs/source/performance/perf-overview.md, release 1.0: `trtllm-bench throughput`, PyTorch backend"
_TRT_RATES = {
    (H100, "llama-3.1-8b", 1): {(128, 2048): 22714, (500, 2000): 17660, (1000, 1000): 15220, (2048, 128): 3450, (5000, 500): 3459,
                                 (20000, 2000): 1351, (128, 128): 28312},
    ("h200-sxm-141gb", "llama-3.1-8b", 1): {(128, 2048): 26221, (1000, 1000): 17744, (2048, 128): 3538, (5000, 500): 3902},
    ("h200-sxm-141gb", "llama-3.1-70b", 1): {(128, 2048): 4336, (1000, 1000): 2909, (2048, 128): 442, (20000, 2000): 283},
    (H100, "llama-3.1-70b", 2): {(128, 2048): 6651, (1000, 1000): 4205, (2048, 128): 762, (5000, 500): 898, (20000, 2000): 437},
}  # fmt: skip
"""Output tokens a second of fp8 checkpoints: (prompt, output) → rate."""
_TRT_REQUESTS = {(128, 128): 30000, (128, 2048): 3000, (500, 2000): 3000, (1000, 1000): 3000, (2048, 128): 3000, (5000, 500): 1500,
                 (20000, 2000): 1000}  # fmt: skip
_TRT_SIMULATED = 3000
_TRT_FIRST = (
    (H100, "llama-2-7b", 1, "fp8", 36.0), ("l40s-48gb", "llama-2-7b", 1, "fp8", 73.0), (A100, "llama-2-7b", 1, "fp16", 133.0),
    (A100, "llama-2-70b", 4, "fp16", 377.0), (H100, "llama-2-70b", 4, "fp8", 109.0),
)  # fmt: skip
"""First token of 2,048 in ms, release 0.5."""


def _trtllm() -> list[Run]:
    found = []
    for (gpu, model, tp), rates in _TRT_RATES.items():
        for (prompt, output), rate in rates.items():
            requests = min(_TRT_REQUESTS[prompt, output], _TRT_SIMULATED)
            engine = {
                "kind": "trtllm", "kv_cache_dtype": "fp8", "cuda_graph_max_batch_size": 8192, "kv_cache_free_frac": 0.95,
                "max_num_tokens": max(8192, prompt + 2000), "max_model_len": prompt + output + 64,
            }  # fmt: skip
            found.append(Run(
                "fp8 at most load, TensorRT-LLM", f"{model} tp{tp} {prompt}+{output}, {gpu[:4]}", gpu, model, engine,
                at_once(requests, fixed(prompt, output)), {"output_tok_s": float(rate)}, _TRT,
                "tokens of a step and the pool's share not stated; KV in fp8 as the checkpoints have it"
                + (f"; {requests} of {_TRT_REQUESTS[prompt, output]} requests" if requests < _TRT_REQUESTS[prompt, output] else ""),
                tp=tp, weight_dtype="fp8", batch=256,
            ))  # fmt: skip
    return found + [
        Run("first token, TensorRT-LLM", f"{model} {dtype} tp{tp}, {gpu[:4]}", gpu, model,
            {"kind": "trtllm", "max_model_len": 4096, "front_end_s": 0}, loop(1, 1, fixed(2048, 1)), {"ttft_ms": ttft},
            "github.com/NVIDIA/TensorRT-LLM, docs/source/performance.md of release 0.5",
            "its C++ runtime, not the PyTorch flow", tp=tp, weight_dtype=dtype)
        for gpu, model, tp, dtype, ttft in _TRT_FIRST
    ]  # fmt: skip


def runs() -> list[Run]:
    return [*_lab(), *_lambda(), *_trtllm(), *serving_singles.runs()]
