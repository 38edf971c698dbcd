"""Deployment flags: real options of the modelled versions, made of the engine's own fields, with nothing silently dropped."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from kvsim.cli import main
from kvsim.deployment import deployment_lines
from kvsim.engines import ENGINES
from kvsim.engines.base import Engine
from kvsim.engines.huggingface import HuggingFace
from kvsim.engines.sglang import SgLang
from kvsim.engines.trtllm import TensorRtLlm
from kvsim.engines.vllm_v0 import VllmV0
from kvsim.engines.vllm_v1 import VllmV1
from kvsim.model import load_model
from kvsim.policies import POLICIES
from kvsim.policies.kv_quant import KVQuant
from kvsim.sampling import Sampling
from kvsim.schema import kind_of

MODEL = load_model("llama-3.1-8b")
SERVERS = [engine for engine in ENGINES if engine.command]
VLLM = {
    "tensor-parallel-size", "max-model-len", "max-num-seqs", "max-num-batched-tokens", "block-size", "kv-cache-dtype", "dtype",
    "gpu-memory-utilization", "num-gpu-blocks-override", "enforce-eager", "quantization", "no-enable-prefix-caching",
}  # fmt: skip
OPTIONS = {
    # docs.vllm.ai, "Engine Arguments", 0.24
    "vllm_v1": VLLM | {"enable-prefix-caching", "async-scheduling", "no-async-scheduling", "no-scheduler-reserve-full-isl",
                       "generation-config", "override-generation-config"},
    # docs.vllm.ai, "Engine Arguments", 0.7
    "vllm_v0": VLLM | {"enable-chunked-prefill", "preemption-mode", "swap-space"},
    # nvidia.github.io/TensorRT-LLM, "trtllm-serve", 1.0
    "trtllm": {
        "backend", "tp_size", "max_batch_size", "max_num_tokens", "max_seq_len", "extra_llm_api_options",
        "kv_cache_free_gpu_memory_fraction",
    },
    # docs.sglang.io, "Server Arguments", 0.5
    "sglang": {
        "tp-size", "context-length", "max-running-requests", "chunked-prefill-size", "page-size", "kv-cache-dtype",
        "disable-radix-cache", "max-total-tokens", "disable-overlap-schedule", "disable-cuda-graph", "cuda-graph-max-bs", "dtype",
        "quantization", "sampling-backend",
    },
}  # fmt: skip
YAML_OPTIONS = {
    "kv_cache_config", "scheduler_config", "enable_chunked_prefill", "disable_overlap_scheduler", "cuda_graph_config",
}  # fmt: skip
"""TorchLlmArgs of TensorRT-LLM 1.0 (llm-api/reference)."""


def options(lines: tuple[str, ...]) -> set[str]:
    return {line[2:].replace("=", " ").split()[0] for line in lines if line.startswith("--")}


def other_value(engine: type[Engine], name: str) -> Any:
    """A valid value of a field that is not its default."""
    field = engine.model_fields[name]
    choices = [value for value in get_args(field.annotation) if isinstance(value, str)]
    if choices:
        return next(value for value in choices if value not in (field.default, "fp16", "bf16"))
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, float):
        return field.default / 2
    if name == "front_end_s":
        return 1.0
    if name == "sampling":
        return Sampling(temperature=0.6, top_p=0.9, presence_penalty=0.5)
    return 65536 if field.default is None else field.default * 2


@pytest.mark.parametrize("engine", SERVERS, ids=kind_of)
def test_every_option_exists_in_the_released_engine(engine: type[Engine]) -> None:
    changed = [engine()] + [engine(**{name: other_value(engine, name)}) for name in engine.model_fields if name != "kind"]
    for one in changed:
        for dtype in ("fp32", "bf16", "fp16", "fp8", "int4"):
            lines = deployment_lines(one, MODEL, 2, dtype)
            assert lines[0] == f"{engine.command} llama-3.1-8b" and options(lines) <= OPTIONS[kind_of(engine)]
            assert all(line.startswith(("--", "# ")) for line in lines[1:])
            yaml_keys = {line.split(":")[1].strip() for line in lines if line.startswith("# extra.yaml:")}
            assert yaml_keys == (YAML_OPTIONS if engine is TensorRtLlm else set())


@pytest.mark.parametrize("engine", SERVERS, ids=kind_of)
def test_every_field_reaches_the_command_line(engine: type[Engine]) -> None:
    """Changing any field changes the lines; the share of HBM of a side stream is part of a fork that is named already, and the
    time of a front end is no setting."""
    plain = engine().flags(MODEL, 1)
    for name in engine.model_fields:
        if name in ("kind", "side_stream_hbm_frac", "front_end_s"):
            continue
        value = other_value(engine, name)
        if engine in (TensorRtLlm,) and name == "gpu_memory_utilization":
            continue  # counted otherwise there; a comment says so
        assert engine(**{name: value}).flags(MODEL, 1) != plain, name
    assert engine().flags(MODEL, 4) != plain


def test_values_are_the_fields() -> None:
    v1 = VllmV1(max_num_seqs=64, max_num_batched_tokens=4096, kv_cache_dtype="fp8", gpu_memory_utilization=0.85, max_model_len=8192)
    assert {
        "--tensor-parallel-size 4", "--max-num-seqs 64", "--max-num-batched-tokens 4096", "--kv-cache-dtype fp8",
        "--gpu-memory-utilization 0.85", "--max-model-len 8192", "--block-size 16", "--enable-prefix-caching",
    } <= set(v1.flags(MODEL, 4))  # fmt: skip
    assert "--max-model-len 131072" in VllmV0().flags(MODEL, 1) and "--max-num-batched-tokens 131072" in VllmV0().flags(MODEL, 1)
    assert "--kv-cache-dtype fp8_e4m3" in SgLang(kv_cache_dtype="fp8").flags(MODEL, 1)
    trt = " ".join(TensorRtLlm(tokens_per_block=64, capacity_policy="max_utilization", chunked_context=True).flags(MODEL, 8))
    assert "--tp_size 8" in trt and "tokens_per_block: 64" in trt and "MAX_UTILIZATION" in trt and "enable_chunked_prefill: true" in trt
    assert {kind_of(engine) for engine in ENGINES} - {kind_of(engine) for engine in SERVERS} == {"huggingface", "flexgen", "torch_decoder"}
    assert HuggingFace().flags(MODEL, 1) == () and deployment_lines(HuggingFace(), MODEL, 1, "bf16") == ()


@pytest.mark.parametrize("policy", POLICIES, ids=kind_of)
def test_no_policy_is_silently_dropped(policy: type) -> None:
    needs = {"scissorhands": {"budget_tokens": 100}, "kv_compress": {"compression_ratio": 2}, "h2o": {"kept_frac": 0.5}}
    kind = kind_of(policy)
    one = policy(**needs.get(kind, {}))
    for engine in SERVERS:
        lines = deployment_lines(engine(), MODEL, 1, "bf16", [one])
        named = [line for line in lines if line.startswith(f"# {kind}:")]
        if kind == "full":
            assert lines == deployment_lines(engine(), MODEL, 1, "bf16")
        elif kind == "kv_quant":
            assert not named and any("fp8" in line for line in lines)
        else:
            assert len(named) == 1
    assert any(line.startswith("# kv_quant:") for line in deployment_lines(VllmV1(), MODEL, 1, "bf16", [KVQuant(dtype="int4")]))


def test_show_prints_commands_that_can_be_copied(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    from kvsim.starter import Answers, starter_text

    for engine in SERVERS:
        path = tmp_path / f"{kind_of(engine)}.yaml"
        path.write_text(
            starter_text(Answers("a100", "llama-3.1-8b", kind_of(engine), "chat", ("full", "snapkv+kv_quant"), 1.0))
        )
        assert main(["show", str(path)]) == 0
        text = capsys.readouterr().out
        for block in text.split("To deploy ")[1:]:
            lines = block.rstrip().splitlines()[1:]
            command = [line for line in lines if not line.startswith("#")]
            assert command[0].startswith(engine.command) and all(line.startswith("  --") for line in command[1:])
            assert all(line.endswith(" \\") for line in command[:-1]) and not command[-1].endswith("\\")
        assert text.count("To deploy ") == 2 and "# snapkv: not in the released engine" in text
