"""The models that kvsim must beat: what an engineer reckons on a napkin.

roofline: a step reads weights and cache once at the datasheet's bandwidth, a prompt is computed at the datasheet's peak; no engine,
no capacity, no launch, no policy cost. byte ratio: a policy gains over the measured full cache what it saves in bytes.
"""

from __future__ import annotations

from kvsim.dtypes import kv_bytes_per_element
from kvsim.hardware import Gpu, load_gpu
from kvsim.model import Model, load_model

ROOFLINE, BYTES = "roofline", "byte ratio"


def roofline(
    gpu_name: str, model_name: str, tp: int, weight_dtype: str, batch: int, prompt_tokens: float, output_tokens: float,
    kv_tokens: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """{"tpot_ms", "ttft_ms", "prefill_s", "decode_s", "total_tok_s", "output_tok_s"} of `batch` equal requests in flight.

    kv_tokens: mean cached tokens of a sequence over its decode, where a policy keeps fewer than all.
    """
    return roofline_of(
        load_gpu(gpu_name), load_model(model_name), tp, weight_dtype, batch, prompt_tokens, output_tokens, kv_tokens
    )  # fmt: skip


def roofline_of(
    gpu: Gpu, model: Model, tp: int, weight_dtype: str, batch: int, prompt_tokens: float, output_tokens: float,
    kv_tokens: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """`roofline` of a GPU and a model that are loaded."""
    context = prompt_tokens + output_tokens / 2 if kv_tokens is None else kv_tokens
    kv_bytes = batch * context * model.kv_bytes_per_token() / 2 * kv_bytes_per_element("bf16") / tp
    step_s = (model.weight_bytes(weight_dtype, tp) + kv_bytes) / gpu.hbm_bandwidth_bytes_per_s
    prompt_s = 2.0 * model.num_params * prompt_tokens / (tp * gpu.peak_flops(weight_dtype if weight_dtype == "fp8" else "bf16"))
    request_s = prompt_s * batch + step_s * output_tokens
    return {
        "tpot_ms": step_s * 1e3, "ttft_ms": prompt_s * 1e3, "prefill_s": prompt_s * batch, "decode_s": step_s * (output_tokens - 1),
        "total_tok_s": batch * (prompt_tokens + output_tokens) / request_s, "output_tok_s": batch * output_tokens / request_s,
    }  # fmt: skip


def byte_ratio(metric: str, measured_full: float, full_tokens: float, kept_tokens: float) -> dict[str, float]:
    """A rate grows, a time shrinks, by the ratio of cached tokens; the measured full cache is given."""
    saved = full_tokens / kept_tokens
    return {metric: measured_full * saved if metric.endswith("tok_s") else measured_full / saved}
