"""What transformers launches beyond a compiled engine: bytes and launches by formula, and which attention runs."""

from __future__ import annotations

from typing import Any

import pytest

from kvsim.api import build_plan, deploy
from kvsim.cost import StepCosts
from kvsim.engines import huggingface_ops as ops
from kvsim.engines.base import ACTIVATIONS
from kvsim.engines.huggingface import HuggingFace
from kvsim.hardware import load_gpu
from kvsim.model import load_model
from kvsim.ops import DecodeAttention, PolicyKernel
from kvsim.policies.base import CacheShape
from kvsim.profiles import load_profile
from kvsim.scenario import parse_scenario

LLAMA, PROMPT, BATCH = "llama-3.1-8b", 1000, 4
KV_HEADS, Q_HEADS, HEAD_DIM, LAYERS = 8, 32, 128, 32
SLOTS = float(BATCH * PROMPT * KV_HEADS * LAYERS)


def costs(policy: list[dict[str, Any]], model: str = LLAMA, **engine: Any) -> StepCosts:
    scenario = parse_scenario({
        "gpu": "a100-sxm-80gb", "model": model, "engine": {"kind": "huggingface", **engine}, "policies": {"p": policy},
        "workload": {"arrivals": {"kind": "poisson", "rate_per_s": 1.0}, "num_requests": 10,
                     "lengths": {"kind": "fixed", "prompt_tokens": PROMPT, "output_tokens": 20}},
    })  # fmt: skip
    d = deploy(scenario)
    return StepCosts(d.model, d.tp, d.weight_dtype, d.engine, build_plan(d, scenario.policies["p"], "p"), d.profile, 10**6)


def launched(priced: StepCosts, stored_bytes: float) -> dict[str, float]:
    """Bytes moved by kernel in a decode step."""
    moved: dict[str, float] = {}
    for op in priced.engine.cache_ops(priced.plan, BATCH, stored_bytes, SLOTS, LAYERS):
        assert isinstance(op, PolicyKernel)
        moved[op.kernel] = moved.get(op.kernel, 0.0) + op.bytes_moved
    return moved


def test_a_plain_cache_is_copied_once_to_append_a_token() -> None:
    stored = SLOTS * 2 * HEAD_DIM * 2
    assert launched(costs([]), stored) == {"cat_token": 2 * stored}


def test_a_quantised_cache_is_widened_and_then_copied_in_16_bits() -> None:
    elements = SLOTS * 2 * HEAD_DIM
    stored = elements * 0.5
    moved = launched(costs([{"kind": "kv_quant", "dtype": "int4"}]), stored)
    assert moved == {"cat_token": 2 * 2 * elements, "widen_cache": pytest.approx((1 + 1 + 2 + 2 + 2 + 2) * elements)}


@pytest.mark.parametrize("policy", [[{"kind": "kivi", "bits": 4}], [{"kind": "snapkv", "budget_tokens": 512}], []])
def test_nothing_else_is_widened(policy: list[dict[str, Any]]) -> None:
    assert not costs(policy).plan.widens_in_torch and "widen_cache" not in launched(costs(policy), 1e9)


def test_eager_scores_pass_through_a_chain_and_shared_heads_are_repeated() -> None:
    stored = SLOTS * 2 * HEAD_DIM * 2
    group = Q_HEADS // KV_HEADS
    assert launched(costs([], attn_implementation="eager"), stored) == {
        "cat_innermost": stored, "cat_token": stored, "softmax_chain": 2 * 5 * SLOTS * group * 4, "repeat_kv": 2 * group * stored,
    }  # fmt: skip
    alike = costs([], "llama-2-7b", attn_implementation="eager")
    assert "repeat_kv" not in launched(alike, stored)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_older_releases_repeat_shared_heads_before_fused_attention_too(attention: str) -> None:
    stored, group, pairs = SLOTS * 2 * HEAD_DIM * 2, Q_HEADS // KV_HEADS, KV_HEADS * LAYERS
    old = costs([], attn_implementation=attention, repeat_kv=True)
    assert launched(old, stored) == {"cat_token": 2 * stored, "repeat_kv": 2 * group * stored}
    (prompt,) = old.engine.prompt_ops(old.plan.shape, 300, PROMPT)
    assert isinstance(prompt, PolicyKernel) and prompt.kernel == "repeat_kv"
    assert prompt.bytes_moved == 2 * group * (300 + PROMPT) * pairs * 2 * HEAD_DIM * 2
    assert not costs([], attn_implementation=attention).engine.prompt_ops(old.plan.shape, 300, PROMPT)
    alike = costs([], "llama-2-7b", attn_implementation=attention, repeat_kv=True)
    assert "repeat_kv" not in launched(alike, stored) and not alike.engine.prompt_ops(alike.plan.shape, 300, PROMPT)


def test_the_chain_counts_tokens_and_not_stored_bytes() -> None:
    eager = [costs(policy, attn_implementation="eager") for policy in ([], [{"kind": "kivi", "bits": 2}])]
    full, kivi = (launched(priced, stored)["softmax_chain"] for priced, stored in zip(eager, (8e9, 1e9), strict=True))
    assert full == kivi


def test_scores_of_a_prompt_are_written_out_by_eager_attention_alone() -> None:
    shape = costs([]).plan.shape
    assert not HuggingFace(attn_implementation="sdpa").prompt_ops(shape, PROMPT, 0)
    scores, repeated = HuggingFace(attn_implementation="eager").prompt_ops(shape, PROMPT, 24)
    assert isinstance(scores, PolicyKernel) and isinstance(repeated, PolicyKernel)
    assert scores.bytes_moved == ops.SCORE_BYTES * PROMPT * (PROMPT + 24) * Q_HEADS * LAYERS
    assert repeated.bytes_moved == 2 * (Q_HEADS // KV_HEADS) * (PROMPT + 24) * KV_HEADS * LAYERS * 2 * HEAD_DIM * 2


def test_policies_that_read_probabilities_of_decoding_run_eagerly() -> None:
    eager = {name: costs([{"kind": name, "budget_tokens": 512}]).engine.attn_implementation for name in ("h2o", "snapkv")}
    assert eager == {"h2o": "eager", "snapkv": "sdpa"}


def test_peak_memory_holds_eager_scores_alone() -> None:
    model = load_model(LLAMA)
    peak = {
        name: next(line.num_bytes for line in HuggingFace(attn_implementation=name, max_prefill_tokens=8192).memory_lines(model, 1, "bf16")
                   if line.name == ACTIVATIONS)
        for name in ("sdpa", "flash_attention_2", "eager")
    }  # fmt: skip
    hidden = 2 * 8192 * 4 * 4096
    assert peak["sdpa"] == peak["flash_attention_2"] == hidden + 2 * 8192 * 3 * 14336
    assert peak["eager"] == hidden + 2 * Q_HEADS * 8192**2 * 2


def test_launches_of_a_step() -> None:
    model = load_model(LLAMA)
    counts = {name: HuggingFace(attn_implementation=name).num_launches(model, 1, "bf16") for name in ("sdpa", "eager")}
    assert counts == {"sdpa": 32 * 42 + 30, "eager": 32 * 44 + 30}


def test_norms_and_activations_of_llama_and_of_a_model_with_neither() -> None:
    tokens = 8192
    row = tokens * 4096 * 2
    found = {op.name: (count, op.bytes_moved) for count, op in ops.unfused_ops(load_model(LLAMA), 1, "bf16", tokens)}
    assert found["norm_chain"] == (32 * 2, (18 + 3 - 4) * row)
    assert found["rotary_chain"] == (32, (10 * (32 + 8) - 2 * (32 + 2 * 8)) * tokens * 128 * 2)
    assert found["activation_chain"] == (32, 2 * tokens * 14336 * 2)
    found = {op.name: (count, op.bytes_moved) for count, op in ops.unfused_ops(load_model("mpt-7b"), 1, "bf16", tokens)}
    assert found == {"norm_chain": (32 * 2, (2 + 3 - 4) * row)}


@pytest.mark.parametrize(("tokens", "measured_us"), [(65_536, 1335.6), (131_072, 2664.0)])
def test_eager_attention_of_grouped_queries_takes_what_pytorch_measured(tokens: int, measured_us: float) -> None:
    """Flash-Decoding's blog (pytorch.org), "PyTorch Eager": 16 query heads over 2 KV heads of 128 in fp16, batch 1, A100, one layer."""
    shape = CacheShape(1, 16, 2, 128, 2, 16, 0)
    profile = load_profile("auto", load_gpu("a100-sxm-80gb"), "torch")
    attention = DecodeAttention(1, 16, 2, 128, 2 * tokens, tokens, shape.slot_bytes, "fp16", "contiguous")
    seconds = sum(profile.answer(op).seconds for op in (attention, *ops.repeat_kv_ops(shape, 2.0 * tokens, 1)))
    assert seconds * 1e6 == pytest.approx(measured_us, rel=0.1)
