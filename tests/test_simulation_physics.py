"""What must change, which way, and what must not: simulations against each other and against their own step costs."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from kvsim.api import build_plan, deploy, run_policy, simulate
from kvsim.catalogue import DATA
from kvsim.cost import StepCosts
from kvsim.cost_types import Chunk
from kvsim.errors import InputError
from kvsim.memory import Ledger
from kvsim.policies.compose import CachePlan
from kvsim.recording import RunLog
from kvsim.result import PolicyResult
from kvsim.scenario import Scenario, parse_scenario

SNAPKV = {"kind": "snapkv", "budget_tokens": 1024}


def all_at_once(prompt_tokens: int, output_tokens: int, num_requests: int = 1) -> dict[str, Any]:
    lengths = {"kind": "fixed", "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    return {"arrivals": {"kind": "all_at_once"}, "lengths": lengths, "num_requests": num_requests}


def poisson(rate_per_s: float, num_requests: int, prompt_tokens: float = 600, output_tokens: float = 100, seed: int = 0) -> Any:
    lengths = {
        "kind": "lognormal", "prompt_mean_tokens": prompt_tokens, "output_mean_tokens": output_tokens,
        "prompt_max_tokens": 4000, "output_max_tokens": 1000,
    }  # fmt: skip
    arrivals = {"kind": "poisson", "rate_per_s": rate_per_s}
    return {"arrivals": arrivals, "lengths": lengths, "num_requests": num_requests, "seed": seed}


def trace(folder: Path, rows: list[dict[str, Any]], hash_block_tokens: int | None = None) -> dict[str, Any]:
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hashes = {"hash_block_tokens": hash_block_tokens} if hash_block_tokens else {}
    return {"trace": {"path": "trace.jsonl", "format": "jsonl", **hashes}}


def make(workload: Any, *policies: dict[str, Any], engine: str = "vllm_v1", folder: Path = Path(), **fields: Any) -> Scenario:
    """Llama-3.1-8B on an A100-80GB; engine settings and scenario fields by name."""
    scenario = {"gpu": "a100-sxm-80gb", "model": "llama-3.1-8b", "workload": workload, "policies": {"policy": list(policies)}}
    for key in ("gpu", "model", "weight_dtype", "tensor_parallel"):
        if key in fields:
            scenario[key] = fields.pop(key)
    return parse_scenario({**scenario, "engine": {"kind": engine, "front_end_s": 0, **fields}}, folder)


def run(*args: Any, **kwargs: Any) -> PolicyResult:
    scenario = make(*args, **kwargs)
    deployment = deploy(scenario)
    plan = build_plan(deployment, scenario.policies["policy"], "policies.policy")
    return run_policy(scenario, deployment, "policy", plan)


def in_order(log: RunLog, column: str) -> np.ndarray:
    requests = log.request_columns()
    return requests[column][np.argsort(requests["index"])]


def ttft_ps(log: RunLog) -> np.ndarray:
    return in_order(log, "first_token_ps") - in_order(log, "arrival_ps")


def e2e_ps(log: RunLog) -> np.ndarray:
    return in_order(log, "finish_ps") - in_order(log, "arrival_ps")


def costs_of(scenario: Scenario, hbm_share: float = 1.0) -> StepCosts:
    """Step costs as the simulation of the scenario would ask for them."""
    d = deploy(scenario)
    plan = build_plan(d, scenario.policies["policy"], "policies.policy")
    ledger = Ledger(
        d.gpu, d.model, d.tp, d.weight_dtype, d.engine, plan, d.max_tokens, getattr(d.engine, "num_gpu_blocks", None)
    )
    return StepCosts(d.model, d.tp, d.weight_dtype, d.engine, plan, d.profile, ledger.pool_slots, hbm_share)


# -- a run is the sum of its steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_tokens", [1, 511, 512, 513, 1700, 4096])
@pytest.mark.parametrize("policies", [(), (SNAPKV,), ({"kind": "h2o", "kept_frac": 0.2},)], ids=["full", "snapkv", "h2o"])
def test_idle_ttft_is_the_sum_of_its_chunks(prompt_tokens: int, policies: tuple[dict[str, Any], ...]) -> None:
    settings: Any = {"max_num_batched_tokens": 512}
    scenario = make(all_at_once(prompt_tokens, 2), *policies, **settings)
    costs, expected = costs_of(scenario), 0
    for start in range(0, prompt_tokens, 512):
        chunk = Chunk(min(512, prompt_tokens - start), start)
        last = start + 512 >= prompt_tokens
        expected += costs.prefill_step(None, [chunk], int(last), [(prompt_tokens, prompt_tokens)] if last else [])
    assert ttft_ps(run(all_at_once(prompt_tokens, 2), *policies, **settings).log).tolist() == [expected]


class Lockstep:
    """`size` equal sequences in decode step `step`, for the cost model: what each reads, as many times."""

    def __init__(self, plan: CachePlan, prompt_tokens: int, size: int, step: int) -> None:
        assert plan.num_scalars == 1
        segment = plan.segment(prompt_tokens, prompt_tokens, step)
        tooth = plan.tooth[0] * segment.phase if segment.period and plan.tooth else 0
        self.size, self._read = size, segment.read[0] + tooth
        self._peak = segment.longest[0] if segment.period else self._read
        self.longest_bound = [self._peak]
        acts = list(segment.actions or [0] * len(plan.acting))
        if segment.period and segment.phase == 0:
            acts = [once + each for once, each in zip(acts, segment.tooth_actions, strict=True)]
        self._actions = [size * slots for slots in acts] if any(acts) else None

    def reads(self) -> list[int]:
        return [self.size * self._read]

    def longest(self, layer_group: int) -> int:
        return self._peak

    def action_slots(self) -> list[int] | None:
        return self._actions


@pytest.mark.parametrize("engine", ["vllm_v0", "huggingface"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    "policy",
    [{"kind": "full"}, SNAPKV, {"kind": "streaming_llm", "window_tokens": 1200}, {"kind": "scissorhands", "budget_tokens": 200},
     {"kind": "keyformer", "schedule": "code"}, {"kind": "kv_quant", "dtype": "int4"}],
    ids=lambda p: p["kind"],
)  # fmt: skip
def test_pure_decoding_is_the_sum_of_its_steps(engine: str, size: int, policy: dict[str, Any]) -> None:
    prompt, output = 1100, 400
    batch = {"batch_size": size} if engine == "huggingface" else {}
    workload = all_at_once(prompt, output, size)
    costs = costs_of(make(workload, policy, engine=engine, **batch))
    log = run(workload, policy, engine=engine, **batch).log
    expected = sum(costs.decode_step(Lockstep(costs.plan, prompt, size, step)) for step in range(1, output))
    assert set((in_order(log, "finish_ps") - in_order(log, "first_token_ps")).tolist()) == {expected}


# -- faster hardware, more of it, less to do ------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm_v1", "vllm_v0", "huggingface"])
@pytest.mark.parametrize("policy", [{"kind": "full"}, SNAPKV, {"kind": "kivi"}], ids=lambda p: p["kind"])
def test_more_bandwidth_never_slows(engine: str, policy: dict[str, Any], tmp_path: Path) -> None:
    text = (DATA / "gpus" / "a100-sxm-80gb.yaml").read_text()
    faster = re.sub(r"(?<=hbm_bandwidth_gb_per_s: {value: )\d+", lambda match: str(2 * int(match[0])), text)
    assert faster != text
    (tmp_path / "fast.yaml").write_text(faster)
    for workload in (all_at_once(2000, 200), all_at_once(300, 100, 40), poisson(4, 100)):
        slow = run(workload, policy, engine=engine, folder=tmp_path).log
        fast = run(workload, policy, engine=engine, folder=tmp_path, gpu="./fast.yaml").log
        assert fast.end_ps <= slow.end_ps
        assert ttft_ps(fast).mean() <= ttft_ps(slow).mean()
        # Eager launches of a static batch of one take longer than the device, whatever its bandwidth.
        assert e2e_ps(fast).mean() < e2e_ps(slow).mean() or engine == "huggingface"
        if engine == "huggingface":
            assert e2e_ps(fast).mean() <= e2e_ps(slow).mean()


@pytest.mark.parametrize("engine", ["vllm_v1", "vllm_v0"])
def test_more_requests_a_second_never_lower_the_mean_ttft(engine: str) -> None:
    """The same requests in the same order, pressed together; the mean over five seeds, each over 150 requests."""
    means = [fmean(float(ttft_ps(run(poisson(rate, 150, seed=seed), engine=engine).log).mean()) for seed in range(5))
             for rate in (0.5, 2, 8, 20, 40, 100)]  # fmt: skip
    assert means == sorted(means) and means[-1] > 3 * means[0]


def test_tensor_parallelism_shortens_steps() -> None:
    results = [
        run(all_at_once(2000, 50, 8), gpu="h100-sxm", model="llama-3.1-70b", weight_dtype="fp8", tensor_parallel=tp)
        for tp in (2, 4, 8)
    ]
    for one, two in pairwise(results):
        ratio = one.summary.tpot.mean_s / two.summary.tpot.mean_s
        assert 1 < ratio < 2.0  # never twice: launches, latencies and the gather stay
        assert 1 < one.summary.ttft.mean_s / two.summary.ttft.mean_s < 2.0
        assert two.pool_units * two.unit_bytes > one.pool_units * one.unit_bytes  # the weights are split
        assert two.unit_bytes * 2 == one.unit_bytes


def test_a_larger_batch_limit_raises_throughput_under_load() -> None:
    results = [run(all_at_once(300, 100, 128), max_num_seqs=limit) for limit in (1, 4, 16, 64, 128)]
    rates = [result.summary.output_tokens_per_s for result in results]
    assert rates == sorted(rates) and rates[1] > 3 * rates[0] and rates[-1] > 15 * rates[0]
    assert [r.summary.max_decode_batch_sequences for r in results] == [1, 4, 16, 64, 128]
    tpots = [r.summary.tpot.mean_s for r in results]
    assert tpots == sorted(tpots)  # the price of the batch


def test_an_fp8_cache_halves_bytes_and_doubles_blocks() -> None:
    wide, narrow = (run(all_at_once(2000, 50, 4), kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    policy = run(all_at_once(2000, 50, 4), {"kind": "kv_quant", "dtype": "fp8"})
    assert wide.unit_bytes == 2 * narrow.unit_bytes == 2 * policy.unit_bytes
    assert narrow.pool_units == policy.pool_units and narrow.pool_units - 2 * wide.pool_units in (0, 1)
    assert wide.kv_bytes_per_sequence == pytest.approx(2 * narrow.kv_bytes_per_sequence, rel=1e-3)
    gain = wide.log.op_ps["decode_attention"] / narrow.log.op_ps["decode_attention"]
    assert 1 < gain < 2  # half the bytes are not half the time


def test_a_smaller_cache_admits_more_and_serves_sooner_when_memory_is_short() -> None:
    """Capacity first: in 600 blocks the policy's gain is its batch."""
    workload = all_at_once(2000, 200, 40)
    full, kept = (run(workload, *policies, num_gpu_blocks=600) for policies in ((), ({**SNAPKV, "budget_tokens": 500},)))
    assert kept.summary.max_decode_batch_sequences > 1.8 * full.summary.max_decode_batch_sequences
    assert kept.summary.output_tokens_per_s > 1.3 * full.summary.output_tokens_per_s
    assert kept.summary.ttft.mean_s < full.summary.ttft.mean_s


# -- policies that keep everything -----------------------------------------------------------------------------------------


@cache
def full_log(engine: str) -> RunLog:
    return run(poisson(8, 80), engine=engine, num_gpu_blocks=2500).log


@pytest.mark.parametrize("engine", ["vllm_v1", "vllm_v0"])
@pytest.mark.parametrize(
    "policy",
    [{"kind": "full"}, {"kind": "snapkv", "budget_tokens": 5000}, {"kind": "streaming_llm", "window_tokens": 5000},
     {"kind": "window", "window_tokens": 5000}, {"kind": "scissorhands", "budget_tokens": 8000, "recompute": True},
     {"kind": "ada_kv", "budget_tokens": 5000, "head_shares": (1,)}, {"kind": "think", "pruned_frac": 0.0}],
    ids=lambda p: p["kind"],
)  # fmt: skip
def test_a_budget_beyond_every_request_is_the_full_cache(engine: str, policy: dict[str, Any]) -> None:
    """To the picosecond: no Op is added, the footprint is the same."""
    log, same = run(poisson(8, 80), policy, engine=engine, num_gpu_blocks=2500, per_head_kv=True).log, full_log(engine)
    assert log.op_ps == same.op_ps
    assert log.requests == same.requests
    assert log.peak_held_units * same.units_allocated == same.peak_held_units * log.units_allocated


@pytest.mark.parametrize("engine", ["vllm_v1", "vllm_v0"])
@pytest.mark.parametrize(
    "policy",
    [{"kind": "kv_compress", "compression_ratio": 1}, {"kind": "h2o", "budget_tokens": 5000},
     {"kind": "scissorhands", "budget_tokens": 8000}, {"kind": "kv_quant", "dtype": "int8", "group_size": 128}],
    ids=lambda p: p["kind"],
)  # fmt: skip
def test_keeping_everything_with_bookkeeping_is_slower_than_full(engine: str, policy: dict[str, Any]) -> None:
    """Why KV-Compress at 1x is slower than plain vLLM: it evicts nothing and still scores."""
    result = run(all_at_once(1000, 300, 8), policy, engine=engine, per_head_kv=True, num_gpu_blocks=5000)
    full = run(all_at_once(1000, 300, 8), engine=engine, num_gpu_blocks=5000)
    assert any(label.startswith("policy:") for label in result.log.op_ps)
    assert result.pool_units * result.unit_bytes <= full.pool_units * full.unit_bytes
    if policy["kind"] == "kv_quant":  # fewer bytes to read pay for it
        assert result.log.op_ps["decode_attention"] < full.log.op_ps["decode_attention"]
    else:
        assert result.log.end_ps > full.log.end_ps
        read_s, full_read_s = (log.op_ps["decode_attention"] for log in (result.log, full.log))
        assert read_s == pytest.approx(full_read_s, rel=1e-4)  # the same slots, in other whole units


def test_keyformer_reads_less_the_less_it_keeps() -> None:
    def read_ps(*policies: dict[str, Any]) -> int:
        return run(all_at_once(4000, 200, 8), *policies, num_gpu_blocks=5000).log.op_ps["decode_attention"]

    reads = [read_ps({"kind": "keyformer", "kept_frac": frac}) for frac in (0.1, 0.3, 0.5, 0.9, 1.0)]
    assert reads == sorted(reads) and len(set(reads)) == 5
    assert reads[-1] < read_ps()  # all of the prompt, none of the output more


# -- preemption, side stream, prefix cache, chunks --------------------------------------------------------------------------


def test_swap_and_recompute_both_conserve() -> None:
    workload = all_at_once(500, 400, 24)
    ample = run(workload, engine="vllm_v0", num_gpu_blocks=5000).log
    logs = [run(workload, engine="vllm_v0", num_gpu_blocks=900, preemption=how).log for how in ("recompute", "swap")]
    recompute, swap = logs
    assert recompute.num_preemptions > 0 and swap.num_preemptions > 0 and ample.num_preemptions == 0
    for log in logs:
        assert sorted(log.request_columns()["index"].tolist()) == list(range(24))
        assert log.end_ps > ample.end_ps
    computed = [int((log.step_columns()["prefill_tokens"] * log.step_columns()["num_steps"]).sum()) for log in (ample, *logs)]
    assert computed[0] == computed[2] == 24 * 500 < computed[1]
    assert "copy" in swap.op_ps and "copy" not in recompute.op_ps


def test_a_side_stream_takes_compression_out_of_the_step_and_slows_decoding() -> None:
    """One idle request: its first token comes sooner by the whole compression, which then runs beside its decoding."""
    workload, policy = all_at_once(16_000, 100), {"kind": "snapkv", "budget_tokens": 4096}
    budget: Any = {"max_num_batched_tokens": 16_384}
    inline = run(workload, policy, **budget).log
    side = run(workload, policy, policy_stream="side", **budget).log
    costs = costs_of(make(workload, policy, **budget))
    chunks = [Chunk(16_000, 0)]
    compression = costs.prefill_step(None, chunks, 1, [(16_000, 16_000)]) - costs.prefill_step(None, chunks, 1, [])
    assert compression > 0 and int((ttft_ps(inline) - ttft_ps(side))[0]) == compression
    decoding = [int((in_order(log, "finish_ps") - in_order(log, "first_token_ps"))[0]) for log in (inline, side)]
    assert decoding[1] > decoding[0], "a prompt cannot be compressed before it has been computed"


def test_prompts_that_end_together_are_compressed_side_by_side() -> None:
    """The longest pays for what is launched for all of them; each pays for its own; and the account adds up."""
    policy = {"kind": "kv_compress", "compression_ratio": 4, "implementation": "paper", "table_tokens": 4096}
    settings: Any = {"per_head_kv": True}
    scenario = make(all_at_once(1000, 50, 6), policy, engine="vllm_v0", **settings)
    together, alone = costs_of(scenario), costs_of(scenario)
    ended = [(1000, 1000), (2000, 2000), (1000, 1000)]
    each = [alone.compress([one]) for one in ended]
    joint = [alone.joint_compression[one].total_ps for one in ended]
    assert together.compress(ended) == sum(each) - sum(joint) + max(joint) and joint[1] == max(joint) > 0
    result = run_policy(scenario, deploy(scenario), "policy", build_plan(deploy(scenario), scenario.policies["policy"], "p"))
    assert sum(result.summary.op_s.values()) == pytest.approx(result.summary.duration_s, rel=1e-9)
    assert result.summary.op_s["host"] > 50 * 180e-6, "12 launches of 10 us and 3 waits of 20 us a sequence and step"


def test_a_side_stream_shares_bandwidth() -> None:
    """The more of HBM the stream takes, the longer the steps beside it; whoever decodes then pays."""
    workload = poisson(12, 150, prompt_tokens=2000)
    tpots = [
        run(workload, SNAPKV, policy_stream="side", side_stream_hbm_frac=frac).summary.tpot.mean_s for frac in (0.1, 0.5, 0.9)
    ]
    plain = run(workload, SNAPKV, policy_stream="inline")
    assert len(set(tpots)) == 3
    assert plain.log.op_ps["policy:compact"] > 0


@pytest.mark.parametrize("gap_s", [0.0, 0.05, 1.0])
def test_prefix_caching_only_ever_helps(gap_s: float, tmp_path: Path) -> None:
    rows = [
        {"arrival_s": i * gap_s, "prompt_tokens": 1600, "output_tokens": 20, "prefix_hashes": [1, 2, 3, 4]} for i in range(12)
    ]
    workload = trace(tmp_path, rows, hash_block_tokens=400)
    without, with_cache = (
        run(workload, folder=tmp_path, enable_prefix_caching=caching, max_num_batched_tokens=2048).log
        for caching in (False, True)
    )
    assert (ttft_ps(with_cache) <= ttft_ps(without)).all()
    assert ttft_ps(with_cache).mean() < ttft_ps(without).mean()
    hits = in_order(with_cache, "cached_tokens")
    assert hits[0] == 0 and set(hits[3:].tolist()) == {1584}  # whole blocks of 16, never the last token of the prompt
    assert not in_order(without, "cached_tokens").any()


def test_a_cached_prompt_costs_what_is_left_of_it(tmp_path: Path) -> None:
    row = {"arrival_s": 0, "prompt_tokens": 1600, "output_tokens": 2}
    cached = [{**row, "cached_prompt_tokens": 1500}]
    log = run(trace(tmp_path, cached), folder=tmp_path).log
    costs = costs_of(make(all_at_once(1600, 2)))
    assert ttft_ps(log).tolist() == [costs.prefill_step(None, [Chunk(100, 1500)], 1, [(1600, 1600)])]


def test_the_chunk_budget_trades_the_first_token_for_the_gaps_of_others(tmp_path: Path) -> None:
    """A 16,000-token prompt beside 8 that decode: smaller chunks make its first token later and their longest gap shorter."""
    rows = [{"arrival_s": 0.0, "prompt_tokens": 100, "output_tokens": 400} for _ in range(8)]
    rows.append({"arrival_s": 0.5, "prompt_tokens": 16_000, "output_tokens": 2})
    workload = trace(tmp_path, rows)
    results = [run(workload, folder=tmp_path, max_num_batched_tokens=budget) for budget in (512, 2048, 8192, 16_384)]
    first = [int(ttft_ps(result.log)[-1]) for result in results]
    gaps = [result.summary.itl.max_s for result in results]
    assert first == sorted(first, reverse=True) and gaps == sorted(gaps)
    assert gaps[-1] > 5 * gaps[0]
    stalled = run(workload, folder=tmp_path, engine="vllm_v0")  # whole prompts: everyone waits
    assert stalled.summary.itl.max_s > gaps[-2]


def test_an_fp8_cache_is_the_same_as_a_policy_and_as_a_setting() -> None:
    policy = run(poisson(8, 80), {"kind": "kv_quant", "dtype": "fp8"}, num_gpu_blocks=1250).log
    setting = run(poisson(8, 80), num_gpu_blocks=2500, kv_cache_dtype="fp8").log
    assert policy.units_allocated == pytest.approx(setting.units_allocated, rel=0.01)
    assert e2e_ps(policy).mean() == pytest.approx(e2e_ps(setting).mean(), rel=0.01)


def test_eager_launches_are_never_faster() -> None:
    for engine in ("vllm_v1", "vllm_v0"):
        graphs, eager = (run(all_at_once(200, 100, 4), engine=engine, enforce_eager=flag).log for flag in (False, True))
        assert eager.end_ps >= graphs.end_ps


def test_the_same_scenario_gives_the_same_log() -> None:
    one, two = (run(poisson(10, 100), {"kind": "kivi"}, num_gpu_blocks=800).log for _ in range(2))
    assert one.requests == two.requests and one.steps == two.steps and one.op_ps == two.op_ps


def test_prompts_that_may_not_be_split_must_fit_one_iteration() -> None:
    def scenario(**engine: Any) -> Scenario:
        return parse_scenario({
            "gpu": "a100-sxm", "model": "llama-3.1-8b", "engine": {"kind": "trtllm", "max_num_tokens": 256, **engine},
            "workload": {
                "arrivals": {"kind": "all_at_once"}, "num_requests": 3,
                "lengths": {"kind": "fixed", "prompt_tokens": 300, "output_tokens": 5},
            },
            "policies": {"full": []},
        }, Path())  # fmt: skip

    with pytest.raises(InputError, match=r"must be at most the engine.s 256 tokens a step.*chunked_context: true"):
        simulate(scenario())
    assert simulate(scenario(chunked_context=True)).policies["full"].summary.num_requests == 3


def test_trtllm_promises_what_it_can_keep() -> None:
    """13 blocks of 32 tokens: a request of 100 + 60 tokens may hold 5, so two run at once and nobody is preempted."""
    data = {
        "gpu": "a100-sxm", "model": "llama-3.1-8b", "engine": {"kind": "trtllm", "num_gpu_blocks": 13},
        "workload": {
            "arrivals": {"kind": "all_at_once"}, "num_requests": 6,
            "lengths": {"kind": "fixed", "prompt_tokens": 100, "output_tokens": 60},
        },
        "policies": {"full": []},
    }  # fmt: skip
    kept = simulate(parse_scenario(data, Path())).policies["full"].summary
    assert (kept.max_running_requests, kept.num_preemptions) == (2, 0)
    greedy = simulate(parse_scenario({**data, "engine": {**data["engine"], "capacity_policy": "max_utilization"}}, Path()))
    assert greedy.policies["full"].summary.num_preemptions > 0
