"""The command line that starts an engine as a candidate has it, for engines whose options kvsim knows."""

from __future__ import annotations

from kvsim.engines import Engine, VllmV0, VllmV1

_VLLM = {
    "max_num_seqs": "--max-num-seqs", "max_num_batched_tokens": "--max-num-batched-tokens", "block_size_tokens": "--block-size",
    "gpu_memory_utilization": "--gpu-memory-utilization", "max_model_len": "--max-model-len", "kv_cache_dtype": "--kv-cache-dtype",
    "num_gpu_blocks": "--num-gpu-blocks-override",
}  # fmt: skip
"""Of `vllm serve` (vllm/engine/arg_utils.py)."""


def flags(engine: Engine, tensor_parallel: int, policy_description: str) -> tuple[str, ...]:
    """Options of `vllm serve` beside the model; empty for other engines, and under policies that no release of vLLM has."""
    if not isinstance(engine, VllmV1 | VllmV0) or policy_description != "full":
        return ()
    found = [f"--tensor-parallel-size {tensor_parallel}"]
    for field, option in _VLLM.items():
        value = getattr(engine, field, None)
        if value is not None:
            found.append(f"{option} {value}")
    if engine.enforce_eager:
        found.append("--enforce-eager")
    if getattr(engine, "enable_prefix_caching", None) is False:
        found.append("--no-enable-prefix-caching")
    return tuple(found)
