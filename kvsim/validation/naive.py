"""The models that kvsim must beat: what an engineer reckons on a napkin.

roofline: a step reads weights and cache once at the datasheet's bandwidth, a prompt is computed at the datasheet's peak; no engine,
no capacity, no launch, no policy cost. bytes: a policy gains what it saves in bytes.
"""

from __future__ import annotations

from kvsim.dtypes import kv_bytes_per_element
from kvsim.hardware import load_gpu
from kvsim.model import load_model


def roofline(
    gpu_name: str, model_name: str, tp: int, weight_dtype: str, batch: int, prompt_tokens: int, output_tokens: int
) -> dict[str, float]:
    """{"tpot_ms", "ttft_ms", "total_tok_s"} of `batch` equal requests in flight."""
    gpu, model = load_gpu(gpu_name), load_model(model_name)
    context = prompt_tokens + output_tokens / 2
    kv_bytes = batch * context * model.kv_bytes_per_token() / 2 * kv_bytes_per_element("bf16") / tp
    step_s = (model.weight_bytes(weight_dtype, tp) + kv_bytes) / gpu.hbm_bandwidth_bytes_per_s
    prompt_s = 2.0 * model.num_params * prompt_tokens / (tp * gpu.peak_flops(weight_dtype if weight_dtype == "fp8" else "bf16"))
    request_s = prompt_s * batch + step_s * output_tokens
    return {
        "tpot_ms": step_s * 1e3, "ttft_ms": prompt_s * 1e3,
        "total_tok_s": batch * (prompt_tokens + output_tokens) / request_s,
    }  # fmt: skip
