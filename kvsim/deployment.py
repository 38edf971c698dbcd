"""From a configuration to the command that deploys it; what no released engine can do is named, never dropped."""

from __future__ import annotations

from collections.abc import Sequence

from kvsim.engines.base import Engine
from kvsim.model import Model
from kvsim.policies.base import Policy

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


MISSING = "not in the released engine; takes a fork or a plug-in that does it"


def deployment_lines(
    engine: Engine, model: Model, tp: int, weight_dtype: str, policies: Sequence[Policy] = ()
) -> tuple[str, ...]:
    """The engine's command, its options, and a line "# ..." for each thing that they cannot express; empty without a server."""
    if not engine.command:
        return ()
    lines: list[str] = []
    for policy in policies:
        dtype, kind = policy.stock_kv_cache_dtype(), str(policy.kind)  # type: ignore[attr-defined]
        if dtype in engine.stock_kv_dtypes:
            engine = engine.model_copy(update={"kv_cache_dtype": dtype})
        elif not policy.full_cache:
            lines.append(f"# {kind}: {MISSING}")
    flags = engine.flags(model, tp)
    options = [flag for flag in flags if not flag.startswith("#")]
    comments = [flag for flag in flags if flag.startswith("#")]
    return f"{engine.command} {model.name}", *options, *_weight_lines(engine, weight_dtype), *comments, *lines


def _weight_lines(engine: Engine, weight_dtype: str) -> tuple[str, ...]:
    """vLLM and SGLang name them alike; TensorRT-LLM takes what the checkpoint has."""
    if engine.kernels == "trtllm":
        return (f"# weight_dtype {weight_dtype}: serve a checkpoint that has it",)
    if weight_dtype in _DTYPES:
        return (f"--dtype {_DTYPES[weight_dtype]}",)
    if weight_dtype == "fp8":
        return ("--quantization fp8",)
    return (f"# weight_dtype {weight_dtype}: serve a checkpoint that was quantised so (AWQ, GPTQ or compressed-tensors)",)
