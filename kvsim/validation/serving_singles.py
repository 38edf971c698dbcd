"""Serving runs of others, continued: one stream, tensor parallelism, AMD, Hugging Face, consumer cards."""

from __future__ import annotations

from kvsim.validation.loads import at_once, fixed, loop, sharegpt
from kvsim.validation.serving_run import A100, H100, NO_SXM, RTX_4090, VLLM_11, Run

_AMD_S = {
    "llama-3.1-70b": {
        (1, 128): 17.236, (8, 128): 19.677, (32, 128): 24.932, (128, 128): 46.484, (1, 2048): 17.500, (32, 2048): 25.966,
        (128, 2048): 52.394,
    },
    "llama-3.1-405b": {
        (1, 128): 48.453, (8, 128): 54.226, (32, 128): 68.901, (128, 128): 117.027, (1, 2048): 48.362, (32, 2048): 70.538,
        (128, 2048): 125.471,
    },
}  # fmt: skip
"""fp8 on eight MI300X: model → (batch, prompt tokens) → seconds of 2,048 output tokens."""
_AMD_TOK_S = {
    "llama-3.1-70b": {
        (128, 2048, 3200): (16581.5, 13383.3), (128, 4096, 1500): (13667.3, 11203.6), (500, 2000, 2000): (13367.1, 10963.3),
        (2048, 2048, 1500): (8352.6, 7560.9),
    },
    "llama-3.1-405b": {
        (128, 2048, 1500): (4275.0, 3867.7), (128, 4096, 1500): (3356.7, 3043.3), (500, 2000, 2000): (3201.4, 2905.6),
        (2048, 2048, 500): (2179.7, 2174.1),
    },
}  # fmt: skip
"""The same with fp8 caches: (prompt tokens, output tokens, requests at once) → tokens a second under two releases. Output tokens, since
more than at a batch of 128 must come of more requests."""
_AMD_README = "github.com/ROCm/vllm, docs/dev-docker/README.md: vLLM 0.10.0"
_AMD_SITE = "amd.com, ROCm hub, AI performance results of June 2025: vLLM 0.9.0.1"
_HF_RATES = {
    ("qwen2.5-7b", 1): 39.02, ("qwen2.5-7b", 6144): 38.75, ("qwen2.5-7b", 14336): 30.65, ("qwen2.5-7b", 30720): 19.53,
    ("qwen2.5-1.5b", 1): 35.29, ("qwen2.5-1.5b", 14336): 36.31, ("qwen2.5-1.5b", 30720): 32.53,
}  # fmt: skip
"""Qwen2-VL-7B and 2B, whose language models these are: prompt tokens → tokens a second of 2,048."""
_TT = "github.com/tenstorrent/tt-inference-server issue {}: GPU references under vLLM"
_TT_TPOT_MS = (
    (340, A100, "qwen3-1.7b", 1, {(128, 128): 4.6, (1024, 128): 4.8, (2048, 128): 5.0}, "A100 of 80 GB and SXM taken"),
    (394, RTX_4090, "qwen3-4b", 1, {(128, 1024): 10.4, (4096, 128): 10.9}, ""),
    (125, RTX_4090, "qwen2.5-7b", 1, {(128, 1024): 17.2, (2048, 128): 17.2}, ""),
    (143, H100, "qwen2.5-72b", 2, {(128, 128): 30.9, (4096, 128): 31.1}, "16 bits taken; utilization not stated"),
)
_4090_LOOPS = {4: 210.0, 16: 644.0, 48: 1190.0}
_5090 = "github.com/{}: inference-benchmarker of Hugging Face, 100 requests a second, 800 users at most"
_5090_VLLM = {**VLLM_11, "max_num_batched_tokens": 2048, "max_model_len": 1024}
_5090_ENGINES = (
    ("vLLM bf16", "bf16", _5090_VLLM, {"output_tok_s": 3708.0}, "vllm-project/vllm issue 16515"),
    ("vLLM fp8", "fp8", _5090_VLLM, {"output_tok_s": 5418.0}, "vllm-project/vllm issue 16515"),
    ("TensorRT-LLM fp8", "fp8", {"kind": "trtllm", "max_model_len": 2048, "kv_cache_dtype": "fp8"},
     {"output_tok_s": 7435.27, "kv_pool_gib": 16.05}, "NVIDIA/TensorRT-LLM issue 4275"),
)  # fmt: skip
"""Llama-3.1-8B on an RTX 5090 of one user in May 2025, releases of the time."""


def _amd() -> list[Run]:
    found = [
        Run("AMD", f"{model} fp8 tp8 b={batch} {prompt}+2048", "mi300x-192gb", model,
            {**VLLM_11, "max_num_batched_tokens": 16384, "max_num_seqs": 1024, "max_model_len": 16384},
            at_once(batch, fixed(prompt, 2048)), {"output_tok_s": batch * 2048 / seconds}, f"{_AMD_README}, benchmark_latency.py",
            tp=8, weight_dtype="fp8", batch=batch)
        for model, rows in _AMD_S.items()
        for (batch, prompt), seconds in rows.items()
    ]  # fmt: skip
    for model, loads in _AMD_TOK_S.items():
        for (prompt, output, requests), rates in loads.items():
            engine = {
                **VLLM_11, "max_num_batched_tokens": 131072, "max_num_seqs": requests, "max_model_len": 8192, "kv_cache_dtype": "fp8",
            }  # fmt: skip
            for release, rate, source in zip(("0.9", "0.10"), rates, (_AMD_SITE, _AMD_README), strict=True):
                found.append(Run(
                    "AMD", f"{model} fp8 tp8 {requests} x {prompt}+{output}, vLLM {release}", "mi300x-192gb", model, engine,
                    at_once(requests, fixed(prompt, output)), {"output_tok_s": rate}, f"{source}, benchmark_throughput.py",
                    tp=8, weight_dtype="fp8", batch=requests,
                ))  # fmt: skip
    found.append(Run(
        "AMD", "qwen3-8b c=32 1024+1024, one GPU", "mi300x-192gb", "qwen3-8b", {"kind": "vllm_v1", "max_model_len": 32768},
        loop(32, 100, fixed(1024, 1024)), {"output_tok_s": 2701.39, "tpot_ms": 9.42, "ttft_ms": 645.02},
        "github.com/vllm-project/recipes pull request 431: Qwen3Guard-Gen-8B, vLLM of April 2026",
        "settings not stated; one GPU of eight by its times", batch=32,
    ))  # fmt: skip
    return found


def runs() -> list[Run]:
    found = _amd()
    found += [
        Run("Hugging Face", f"{model} {prompt}+2048", A100, model,
            {"kind": "huggingface", "max_model_len": 32768, "attn_implementation": "flash_attention_2", "repeat_kv": True},
            loop(1, 1, fixed(prompt, 2048)), {"output_tok_s": rate}, "github.com/QwenLM/Qwen2-VL, README: transformers 4.38.2, batch 1",
            f"{NO_SXM}; flash-attention after that release's repeat_kv")
        for (model, prompt), rate in _HF_RATES.items()
    ]  # fmt: skip
    for issue, gpu, model, tp, rows, more in _TT_TPOT_MS:
        missing = "; ".join(filter(None, ("version not stated, 0.8 or 0.9", "TTFT, of cached prompts, is not compared", more)))
        for (prompt, output), tpot in rows.items():
            engine = {**VLLM_11, "max_model_len": 8192, **({"gpu_memory_utilization": 0.97} if model == "qwen2.5-72b" else {})}
            found.append(Run(
                "tensor parallel" if tp > 1 else "one stream", f"{model} tp{tp} {prompt}+{output}, {gpu[:4]}", gpu, model, engine,
                loop(1, 2, fixed(prompt, output)), {"tpot_ms": tpot}, _TT.format(issue), missing, tp=tp,
            ))  # fmt: skip
    pull = "github.com/vllm-project/vllm pull request 2192: vLLM of December 2023, custom all-reduce, benchmark_latency.py"
    found += [
        Run("tensor parallel", f"{model} fp16 tp{tp} b={batch} 256+256, {gpu[:4]}", gpu, model, {"kind": "vllm_v0", "max_model_len": 2048},
            at_once(batch, fixed(256, 256)), {"output_tok_s": batch * 256 / seconds}, pull, missing, tp=tp, weight_dtype="fp16",
            batch=batch)
        for gpu, model, tp, batch, seconds, missing in (
            (A100, "llama-2-70b", 4, 64, 14.57, NO_SXM), (A100, "llama-33b", 2, 64, 14.38, NO_SXM),
            ("t4-16gb", "llama-2-7b", 2, 32, 17.51, "PCIe taken"),
        )
    ]  # fmt: skip
    found += [
        Run("tensor parallel" if tp > 1 else "one stream", f"Llama-3-8B tp{tp} b={batch} 128+8, SGLang", H100, "llama-3.1-8b",
            {"kind": "sglang", "max_model_len": 8192, "overlap_schedule": False, "chunked_prefill_size_tokens": 16384},
            at_once(batch, fixed(128, 8)), {"tpot_ms": tpot},
            "github.com/sgl-project/sglang issue 1008: sglang.bench_latency of August 2024, CUDA graphs",
            "GPU not stated, an H100 by its rates; steps run one after the other", tp=tp, batch=batch)
        for tp, batch, tpot in ((1, 1, 7.37), (1, 128, 11.84), (8, 1, 3.35))
    ]  # fmt: skip
    found += [
        Run("4090 under load", f"Mistral-7B c={clients} 256+100", RTX_4090, "mistral-7b-v0.3", {**VLLM_11, "max_model_len": 8192},
            loop(clients, 300, {"kind": "lognormal", "prompt_mean_tokens": 256, "prompt_cv": 0.01, "output_mean_tokens": 100.4,
                                 "output_cv": 0.4, "output_max_tokens": 128}),
            {"output_tok_s": rate}, "mushfiqrahman.dev, Benchmarking Mistral-7B on RTX 4090",
            "version not stated; answers of up to 128 tokens, 100 in the mean", batch=clients)
        for clients, rate in _4090_LOOPS.items()
    ]  # fmt: skip
    found += [
        Run("5090 under load", f"Llama-3.1-8B, {name}", "rtx-5090-32gb", "llama-3.1-8b", engine, loop(800, 4000, fixed(200, 178)),
            truths, _5090.format(issue),
            "answers of some 200 tokens: 178 in the mean, by what 10 requests a second gave", weight_dtype=dtype, batch=256)
        for name, dtype, engine, truths, issue in _5090_ENGINES
    ]  # fmt: skip
    found.append(Run(
        "8-bit weights", "Qwen3-VL-32B fp8, 1000 ShareGPT at once, L40S", "l40s-48gb", "qwen3-32b",
        {**VLLM_11, "max_num_batched_tokens": 2048, "max_model_len": 24000}, at_once(1000, sharegpt(217.4, 190.0)),
        {"output_tok_s": 621.91}, "github.com/vllm-project/vllm pull request 29217, before: vLLM of November 2025",
        "lengths by their means; kernel of block-scaled fp8 not tuned", weight_dtype="fp8", batch=128,
    ))  # fmt: skip
    return found
