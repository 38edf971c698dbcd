"""Command-line options that vLLM's two engines share (docs.vllm.ai, "Engine Arguments")."""

from __future__ import annotations

from kvsim.engines.base import Engine

STOCK_KV_DTYPES = ("auto", "bf16", "fp16", "fp8")
"""16-bit caches have the activations' type, which is `auto`."""


def shared_flags(
    engine: Engine, tp: int, max_model_len: int, max_num_seqs: int, block_tokens: int, num_gpu_blocks: int | None
) -> tuple[str, ...]:
    dtype = "fp8" if engine.kv_cache_dtype == "fp8" else "auto"
    return (
        f"--tensor-parallel-size {tp}", f"--max-model-len {max_model_len}", f"--max-num-seqs {max_num_seqs}",
        f"--block-size {block_tokens}", f"--kv-cache-dtype {dtype}", f"--gpu-memory-utilization {engine.gpu_memory_utilization:g}",
        *(() if num_gpu_blocks is None else (f"--num-gpu-blocks-override {num_gpu_blocks}",)),
        *(("--enforce-eager",) if engine.enforce_eager else ()),
    )  # fmt: skip
