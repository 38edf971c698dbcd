"""The decoder's engine: what its declared launches make of a step's price."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvsim.batch import Sequence, decode_batch
from kvsim.cost import StepCosts
from kvsim.cost_types import Chunk
from kvsim.engines.base import Engine
from kvsim.engines.torch_decoder import NOT_CAPTURED, OWN_STEPS, TorchDecoder
from kvsim.engines.vllm_v1 import VllmV1
from kvsim.forward import linear_ops
from kvsim.hardware import load_gpu
from kvsim.model import load_model
from kvsim.ops import HostWork, PolicyKernel
from kvsim.policies import POLICIES
from kvsim.policies.ada_kv import AdaKV
from kvsim.policies.base import CacheShape, Policy
from kvsim.policies.compose import CachePlan, Composition
from kvsim.policies.h2o import H2O
from kvsim.policies.keyformer import Keyformer
from kvsim.policies.kivi import KIVI
from kvsim.policies.kv_compress import KVCompress
from kvsim.policies.kv_quant import BITS, KVQuant
from kvsim.policies.streaming_llm import StreamingLLM
from kvsim.policies.think import ThinK
from kvsim.pricing import one_by_one
from kvsim.profiles import load_profile
from kvsim.requests import Request

MODEL = replace(load_model("llama-3.1-8b"), num_layers=2)
TRITON, TORCH = TorchDecoder(attention="triton"), TorchDecoder()


def plan_of(policies: list[Policy]) -> CachePlan:
    shape = CacheShape(MODEL.num_layers, MODEL.num_q_heads, MODEL.num_kv_heads, MODEL.head_dim, 2.0, 16)
    return CachePlan(Composition(policies), shape, "bf16")


class Asked(list[Any]):
    """A profile that answers as a datasheet does and keeps what it was asked."""

    def __init__(self) -> None:
        self.profile = load_profile("datasheet", load_gpu("h100-sxm-80gb"), "torch_decoder", Path())

    def answer(self, op: Any, share: float = 1.0) -> Any:
        self.append(op)
        return self.profile.answer(op, share)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.profile, name)


def asked(engine: Engine, policies: list[Policy], batch: int = 3, chunk: Chunk | None = None) -> list[Any]:
    """Ops of one step of a decoding batch, or of a prompt chunk alone."""
    plan, profile = plan_of(policies), Asked()
    costs = StepCosts(MODEL, 1, "bf16", engine, plan, profile, 1 << 20)  # type: ignore[arg-type]
    if chunk is not None:
        costs.prefill_step(None, [chunk], 1, [])
        return profile
    state = decode_batch(plan)
    for index in range(batch):
        sequence = Sequence(Request(index, 0, 512, 20))
        sequence.generated = 2
        state.join(sequence, 1)
    costs.decode_step(state)
    return profile


def test_batched_scores_are_one_launch_and_moved_slots_one_a_sequence() -> None:
    ops = [PolicyKernel(name, 1.0, num_launches=2) for name in ("decode_attention_scored", "select", "kv_quantize")]

    def launches(engine: TorchDecoder, policies: list[Policy]) -> list[int]:
        return [op.num_launches for op in one_by_one(ops, engine.one_by_one(plan_of(policies)), 5)]  # type: ignore[attr-defined]

    assert launches(TRITON, []) == [2, 10, 2]
    assert launches(TORCH, []) == [10, 10, 2]
    assert launches(TRITON, [KIVI()]) == [2, 10, 10], "rings are written one sequence after the other"
    assert launches(TRITON, [KVQuant()]) == [2, 10, 2]
    assert not VllmV1().one_by_one(plan_of([]))
    scored = [op for op in asked(TRITON, [H2O(budget_tokens=128)]) if getattr(op, "kernel", "") == "decode_attention_scored"]
    assert scored and {op.num_launches for op in scored} == {MODEL.num_layers}


@pytest.mark.parametrize("batch", [3, 8])
def test_decode_steps_are_padded_where_they_replay_a_graph(batch: int) -> None:
    padded = {op for _, op in linear_ops(MODEL, 1, "bf16", 4 if batch == 3 else 8, False)}
    eager = {op for _, op in linear_ops(MODEL, 1, "bf16", batch, True)}

    def launched(ops: list[Any]) -> int:
        return sum(op.batch for op in ops if isinstance(op, HostWork) and op.part == "eager_launch")

    replayed = asked(TRITON, [], batch)
    assert padded <= set(replayed) and launched(replayed) == 0
    for engine, policies in ((TORCH, []), (TorchDecoder(attention="triton", enforce_eager=True), []), (TRITON, [Keyformer()])):
        ops = asked(engine, policies, batch)
        assert eager <= set(ops) and launched(ops) == engine.num_launches(MODEL, 1, "bf16")


def test_prompt_chunks_are_launched_one_by_one() -> None:
    """However small; other engines replay graphs for those too."""
    chunk = Chunk(6, 0)
    eager = {op for _, op in linear_ops(MODEL, 1, "bf16", 6, True)}
    padded = {op for _, op in linear_ops(MODEL, 1, "bf16", 8, False)}
    assert eager <= set(asked(TRITON, [], chunk=chunk)) and padded <= set(asked(VllmV1(), [], chunk=chunk))


def test_what_is_not_captured_names_policies() -> None:
    kinds = {policy.model_fields["kind"].default for policy in POLICIES}
    assert NOT_CAPTURED.keys() <= kinds
    assert TRITON.why_eager(plan_of([Keyformer()])) == f"keyformer: {NOT_CAPTURED['keyformer']}"
    assert TRITON.why_eager(plan_of([H2O(budget_tokens=128), KVQuant()])) == ""
    assert TRITON.for_plan(plan_of([H2O(budget_tokens=128)])) is TRITON
    assert TRITON.for_plan(plan_of([KIVI()])).captured_tokens == 0 < TRITON.captured_tokens


def test_what_torch_does_under_some_policies_alone_is_named() -> None:
    """So that it has tables of its own: heads attended up to the longest, a query turned for sinks, codes widened by chunks, own steps."""
    uneven, sinks, codes = [AdaKV(budget_tokens=128)], [StreamingLLM(window_tokens=124)], [KVQuant(dtype="int8")]
    assert [TORCH.attention_layout(Composition(each)) for each in (uneven, sinks, codes, [])] == ["padded", "turned", "paged", "paged"]
    assert {TRITON.attention_layout(Composition(each)) for each in (uneven, codes, [])} == {"paged"}
    assert [TORCH.chunk_format(plan_of(each)) for each in (codes, [KIVI(bits=2)], [ThinK()], [])] == ["int8", "kivi2", "", ""]
    assert VllmV1().chunk_format(plan_of(codes)) == "" and VllmV1().attention_layout(Composition(uneven)) == "paged"
    compress = KVCompress(compression_ratio=4)
    own = {each.variant for policies in ([compress], [KVQuant(dtype="fp8")], [compress, KVQuant(dtype="fp8")], codes, [])
           for each in asked(TORCH, policies) if isinstance(each, HostWork) and each.part == "step"}  # fmt: skip
    assert own == {"kv_compress", "fp8", "fp8+kv_compress", ""}
    assert OWN_STEPS.keys() <= {policy.model_fields["kind"].default for policy in POLICIES} | set(BITS)
