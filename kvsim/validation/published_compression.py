"""Numbers that others published of the same machine with a full and a compressed cache, as their sources print them."""

from __future__ import annotations

VLLM_BLOG = "vLLM blog, 2026-04-22, 'The State of FP8 KV-Cache and Attention Quantization in vLLM'"
ITL_LINES = {
    "h100-sxm": {"full": (6.44, 4.37e-5), "fp8": (6.58, 2.37e-5)},
    "b200": {"full": (3.93, 1.80e-5), "fp8": (3.96, 9.72e-6)},
}
"""Llama-3.1-8B, one stream, 128 tokens generated: intercept in ms and slope in ms a token of ITL over the prompt, swept from 256 to
125,000 tokens (figures 2 and 5, in words)."""
ITL_PROMPTS = (1024, 8192, 32768, 100_000)
UNDER_LOAD = {"full": (763.6, 15.18, 672.6, 450.3), "fp8": (742.8, 12.93, 585.2, 517.5)}
"""Table 4: medians of TTFT and ITL in ms, seconds in all, output tokens a second: Llama-3.1-8B on an H100, 150 requests by 8 clients, some
20,000 + 2,000 tokens each, 15 % more or less."""

A100_EAGER = "github.com/vllm-project/vllm issue 42058: vLLM 0.26.0, Qwen3-8B, enforce_eager, 8 prompts at once, 256 tokens generated"
A100_PROMPTS = {
    1024: ((0.541, 227.8), (0.569, 228.8)), 4096: ((2.277, 227.3), (2.332, 238.6)),
    8192: ((5.001, 228.2), (5.132, 232.2)), 16384: ((11.790, 219.2), (12.206, 231.3)),
}  # fmt: skip
"""Prompt tokens → full and fp8: seconds of the eight prompts (one token generated), tokens a second of decoding."""
A100_POOL_TOKENS = (389_872, 779_760)

ADA_TP4 = "github.com/vllm-project/vllm issue 42058: vLLM 0.20.0, Qwen3-32B, 10,240 + 1,024 tokens, one request after the other"
ADA_TP4_RUNS = {"full": (3295.1, 22.6, 72_288), "fp8": (3311.8, 21.6, 115_328)}
"""TTFT and TPOT in ms, tokens in the cache."""

L4_DOCS = "github.com/vllm-project/vllm pull request 49050, docs/features/quantization/quantized_kvcache.md: vLLM 0.25.1, one stream"
L4_RATES = {2048: (29.1, 29.4), 8192: (26.4, 27.9), 16384: (23.6, 26.2), 32000: (19.4, 23.4)}
"""Qwen3-4B; prompt tokens → tokens a second of decoding, full and fp8."""
L4_POOL_GIB = 11.47

SGLANG_13B = "github.com/sgl-project/sglang pull request 1204: Llama-2-13B, 1,000 ShareGPT prompts at 128 a second"
SGLANG_13B_REQUESTS_PER_S = {"full": 7.04, "fp8": 8.30}

SPARSE_VLLM = "github.com/CURRENTF/Sparse-vLLM, docs/experiments.md, 2026-05-16: 4 prompts of 128,000 tokens, CUDA graphs"
SPARSE_VLLM_ITL_MS = {"full": (18.25, 18.28), "snapkv": (10.79, 10.91), "pyramid_kv": (11.78,)}
"""Qwen2.5-7B-1M on an H100, time of a decode step: each run."""

LMDEPLOY = "github.com/LLMkvsys/rethink-kv-compression (MLSys 2025), 1_thr_predictor/0_exp: LMDeploy's PyTorch engine, 65 tokens generated"
LMDEPLOY_RATES = {
    ("llama-2-7b", 8, 1024): {"full": 200.80, "kivi": 201.20, "streaming_llm": 223.54, "h2o": 213.99},
    ("llama-2-7b", 8, 4000): {"full": 130.21, "kivi": 132.45, "streaming_llm": 223.32, "h2o": 216.81},
    ("llama-2-7b", 16, 3072): {"full": 211.92, "kivi": 211.39, "streaming_llm": 399.25, "h2o": 385.56},
    ("mistral-7b-v0.3", 4, 4000): {"full": 86.90, "kivi": 89.40, "streaming_llm": 114.73, "h2o": 116.31},
}  # fmt: skip
"""(model, sequences, prompt tokens) → tokens a second of decoding on an RTX A6000."""
LMDEPLOY_KEPT_TOKENS = 512
"""What the repository's own predictor takes StreamingLLM and H2O to keep."""

KVPRESS = "github.com/NVIDIA/kvpress, notebooks/speed_and_memory.ipynb, progress bars of its four sweeps: Llama-3.1-8B, flash_attention_2"
KVPRESS_SWEEPS_S = {
    8_000: ((12.83, 15.66), (12.84, 15.54)), 16_000: ((13.31, 16.05), (13.97, 16.75)), 32_000: ((15.12, 17.83), (15.96, 19.50)),
    64_000: ((20.72, 24.41), (22.28, 27.31)), 128_000: ((40.81, 46.00), (43.50, 52.83)),
}  # fmt: skip
"""Prompt tokens → DynamicCache and 4-bit quanto cache: mean seconds of a run that loads the model and computes a prompt, and of one that
goes on to 100 tokens. A difference is 99 decode steps, in the mean over the shares kept."""
KVPRESS_KEPT_FRACS = (1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
KVPRESS_STEPS = 99

L40S_HF = "github.com/Minato-Hayakawa/KV-Cache-Quantization-Benchmark, results/ai-l40s: transformers, bf16, medians of 3 runs"
L40S_HF_RUNS = {"llama-3.1-8b": (8192, 1.4108, 30.84), "qwen2.5-7b": (8191, 1.2667, 27.40), "mistral-7b-v0.3": (8192, 1.3722, 29.71)}
"""Model → prompt tokens, seconds of the prompt, time of each of 32 decode steps in ms."""
