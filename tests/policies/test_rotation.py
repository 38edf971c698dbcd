"""StreamingLLM's positions in the cache: which engines pay for them, and what a step costs more there."""

from __future__ import annotations

from typing import Any

import pytest

from kvsim.api import build_plan, deploy
from kvsim.cost import StepCosts
from kvsim.ops import PolicyKernel
from kvsim.pricing import PS_PER_S
from kvsim.scenario import parse_scenario

ROTATES = {"huggingface": 5, "trtllm": 1}
"""Passes over the cached keys by engine: StreamingLLM's code of five eager launches, TensorRT-LLM's kernel of one."""
STREAMING = {"kind": "streaming_llm", "sink_tokens": 4, "window_tokens": 508}


def costs(engine: str, policy: dict[str, Any], model: str = "llama-2-7b", bits: dict[str, Any] | None = None) -> StepCosts:
    policies = [policy, *([bits] if bits else [])]
    scenario = parse_scenario({
        "gpu": "a100-sxm-80gb", "model": model, "engine": {"kind": engine}, "policies": {"p": policies},
        "workload": {"arrivals": {"kind": "poisson", "rate_per_s": 1.0}, "num_requests": 200,
                     "lengths": {"kind": "fixed", "prompt_tokens": 600, "output_tokens": 20}},
    })  # fmt: skip
    d = deploy(scenario)
    plan = build_plan(d, scenario.policies["p"], "p")
    return StepCosts(d.model, d.tp, d.weight_dtype, d.engine, plan, d.profile, 10**6)


def rotations(priced: StepCosts, slots: int) -> list[PolicyKernel]:
    return [op for op in priced.plan.step_ops(8, slots) if isinstance(op, PolicyKernel) and op.kernel in ("rerotate", "rotate_chain")]


@pytest.mark.parametrize("engine", ["vllm_v1", "vllm_v0", "sglang", "trtllm", "huggingface", "torch_decoder"])
@pytest.mark.parametrize("model", ["llama-2-7b", "mpt-7b"])
def test_engines_that_do_not_rotate_on_reading_pay_for_rotary_keys(engine: str, model: str) -> None:
    priced = costs(engine, STREAMING, model)
    passes = ROTATES.get(engine, 0) if model == "llama-2-7b" else 0  # ALiBi turns nothing
    slots = 8 * 512 * priced.plan.shape.num_pairs
    found = rotations(priced, slots)
    assert [op.bytes_moved for op in found] == [slots * passes * 2 * 128 * 2.0] * bool(passes)
    assert [op.num_launches for op in found] == [32 * passes] * bool(passes)


@pytest.mark.parametrize("bits", [None, {"kind": "kivi"}], ids=["alone", "with kivi"])
def test_a_step_costs_exactly_the_op_more(bits: dict[str, Any] | None) -> None:
    """Beside a window of as many tokens, whose attention reads the same; the profile is asked for the Op itself."""
    streaming, window = (costs("trtllm", policy, bits=bits) for policy in (STREAMING, {"kind": "window", "window_tokens": 512}))
    from kvsim.batch import Sequence, decode_batch
    from kvsim.requests import Request

    steps = []
    for priced in (streaming, window):
        state = decode_batch(priced.plan)
        for index in range(8):
            sequence = Sequence(Request(index, 0, 600, 100))
            sequence.generated = 2
            state.join(sequence, 1)
        steps.append(priced.decode_step(state))
    (op,) = rotations(streaming, 8 * 512 * streaming.plan.shape.num_pairs)
    more = streaming.profile.answer(op).seconds * PS_PER_S
    assert steps[0] - steps[1] == pytest.approx(more, rel=2e-3)  # curves are straight between powers of two
    assert streaming.op_times()["policy:rerotate"] == steps[0] - steps[1]
