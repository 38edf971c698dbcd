"""Work is conserved on 1,000 random small scenarios: every engine, policy and kind of arrivals, pools that run dry included."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from audit import (
    AuditedReplica,
    check_blocks,
    check_first_come_first_served,
    check_gaps,
    check_littles_law,
    check_static_batches,
    check_time,
    check_tokens,
    make,
    run,
)

from kvsim.api import build_plan, deploy
from kvsim.errors import DoesNotFitError, InputError
from kvsim.memory import Ledger
from kvsim.result import PolicyResult
from kvsim.scenario import Scenario
from kvsim.workload import expected_num_requests

NUM_SCENARIOS, PER_TEST = 1000, 50

TOKEN_POLICIES: tuple[dict[str, Any], ...] = (
    {"kind": "keyformer"}, {"kind": "keyformer", "kept_frac": 0.3, "schedule": "code"},
    {"kind": "kv_compress", "compression_ratio": 1}, {"kind": "kv_compress", "compression_ratio": 4, "min_kept_tokens": 32},
    {"kind": "kv_compress", "compression_ratio": 2, "min_kept_tokens": 32, "interval_steps": 5},
    {"kind": "kv_compress", "compression_ratio": 2, "min_kept_tokens": 32, "interval_steps": 40},
    {"kind": "scissorhands", "budget_tokens": 48},
    {"kind": "scissorhands", "budget_tokens": 64, "later_layer_weight": 3, "drop_frac": 0.3, "recompute": True},
    {"kind": "h2o", "kept_frac": 0.4}, {"kind": "h2o", "budget_tokens": 40},
    {"kind": "h2o", "kept_frac": 0.4, "variant": "flexgen"},
    {"kind": "snapkv", "budget_tokens": 64}, {"kind": "streaming_llm", "window_tokens": 60},
    {"kind": "window", "window_tokens": 50}, {"kind": "pyramid_kv", "budget_tokens": 64},
    {"kind": "ada_kv", "budget_tokens": 64},
    {"kind": "ada_kv", "budget_tokens": 50, "head_shares": (1, 3), "flattened_copy": True},
)  # fmt: skip
CHANNEL_POLICIES: tuple[dict[str, Any], ...] = ({"kind": "think"}, {"kind": "think", "pruned_frac": 0.7, "recent_tokens": 20})
BIT_POLICIES: tuple[dict[str, Any], ...] = (
    {"kind": "kivi", "residual_tokens": 32}, {"kind": "kivi", "bits": 4, "residual_tokens": 64, "group_size_tokens": 64},
    {"kind": "kv_quant"}, {"kind": "kv_quant", "dtype": "int8"}, {"kind": "kv_quant", "dtype": "int4"},
)  # fmt: skip


def random_policy(random: Random) -> list[dict[str, Any]]:
    if random.random() < 0.12:
        return [{"kind": "full"}] if random.random() < 0.5 else []
    policies = [random.choice(TOKEN_POLICIES)] if random.random() < 0.75 else []
    if random.random() < 0.3:
        policies.append(random.choice(CHANNEL_POLICIES))
    if random.random() < 0.3 or not policies:
        policies.append(random.choice(BIT_POLICIES))
    return policies


def random_engine(random: Random) -> dict[str, Any]:
    kind = random.choice(("vllm_v1", "vllm_v1", "vllm_v0", "vllm_v0", "huggingface"))
    engine: dict[str, Any] = {"kind": kind, "enforce_eager": random.random() < 0.3}
    if random.random() < 0.15:
        engine |= {"policy_stream": "side", "side_stream_hbm_frac": random.choice((0.2, 0.5, 0.8))}
    if kind == "huggingface":
        return engine | {
            "batch_size": random.randint(1, 6), "num_beams": random.choice((1, 1, 2, 4)), "max_prefill_tokens": 256,
        }  # fmt: skip
    engine |= {
        "per_head_kv": True, "block_size_tokens": random.choice((1, 4, 16, 16, 32)),
        "max_num_seqs": random.choice((1, 4, 32, 32, 32, 32)),
    }  # fmt: skip
    if kind == "vllm_v1":
        engine["max_num_batched_tokens"] = random.choice((32, 64, 200, 2048))
        engine["reserve_full_prompt"] = random.random() < 0.7
        engine["enable_prefix_caching"] = random.random() < 0.8
        return engine
    engine["watermark_frac"] = random.choice((0.01, 0.0, 0.1))
    if random.random() < 0.5:
        engine |= {"preemption": "swap", "swap_space_gib": random.choice((4.0, 0.0002))}
    return engine


def random_workload(random: Random, base_dir: Path, name: str) -> dict[str, Any]:
    num_requests = random.randint(1, 20)
    most_prompt, most_output = random.choice((8, 60, 200)), random.choice((1, 30, 60, 150, 150))
    kind = random.choice(("poisson", "gamma", "constant", "all_at_once", "closed_loop", "trace", "trace"))
    rate = random.choice((30.0, 1000.0, 10000.0))
    seed = random.randrange(1 << 30)
    if kind == "trace":
        rows, time, known = [], 0.0, [random.randrange(1 << 20) for _ in range(10)]
        for _ in range(num_requests):
            time += random.choice((0.0, random.expovariate(rate)))
            prompt = random.randint(1, most_prompt)
            row = {"arrival_s": round(time, 6), "prompt_tokens": prompt, "output_tokens": random.randint(1, most_output)}
            if name.endswith("hashes"):
                shared = random.randint(0, len(known))
                number = -(-prompt // 32)
                row["prefix_hashes"] = [*known[:shared], *(random.randrange(1 << 20) for _ in range(number))][:number]
            elif random.random() < 0.5:
                row["cached_prompt_tokens"] = random.randint(0, prompt)
            rows.append(row)
        path = base_dir / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        trace = {"path": path.name, "format": "jsonl", "repeat": random.choice((1, 1, 2)) if num_requests > 1 else 1}
        return {"trace": trace | ({"hash_block_tokens": 32} if name.endswith("hashes") else {})}
    fixed = random.random() < 0.3
    lengths: dict[str, Any] = (
        {"kind": "fixed", "prompt_tokens": random.randint(1, most_prompt), "output_tokens": random.randint(1, most_output)}
        if fixed
        else {
            "kind": "uniform", "prompt_min_tokens": 1, "prompt_max_tokens": most_prompt,
            "output_min_tokens": 1, "output_max_tokens": most_output,
        }
    )  # fmt: skip
    arrivals: dict[str, Any] = {"kind": kind}
    if kind in ("poisson", "gamma", "constant"):
        arrivals["rate_per_s"] = rate
    if kind == "gamma":
        arrivals["burstiness"] = random.choice((0.2, 4.0))
    if kind == "closed_loop":
        arrivals["clients"] = random.randint(1, num_requests)
        arrivals["think_time_s"] = random.choice((0.0, 0.01))
        if random.random() < 0.5:
            arrivals |= {"start": "staggered", "stagger_s": 0.1}
        if fixed and random.random() < 0.5:
            arrivals["length_range_frac"] = 0.4
    return {"arrivals": arrivals, "lengths": lengths, "num_requests": num_requests, "seed": seed}


def with_pool(random: Random, base_dir: Path, engine: dict[str, Any], fields: dict[str, Any], pool_tokens: int) -> Scenario:
    """The scenario with room for about so many uncompressed tokens."""
    if engine["kind"] != "huggingface":
        blocks = max(1, -(-pool_tokens // engine["block_size_tokens"]))
        return make(base_dir, engine=engine | {"num_gpu_blocks": blocks}, **fields)
    ample = make(base_dir, engine=engine, **fields)
    deployment = deploy(ample)
    plan = build_plan(deployment, ample.policies["policy"], "policies")
    model, tp = deployment.model, deployment.tp
    ledger = Ledger(deployment.gpu, model, tp, "bf16", deployment.engine, plan, deployment.max_tokens)
    spare = ledger.pool_bytes - pool_tokens * engine["num_beams"] * model.kv_bytes_per_token(tp=tp)
    used_frac = 1 - spare / deployment.gpu.usable_bytes
    return make(base_dir, engine=engine | {"gpu_memory_utilization": used_frac}, **fields)


def simulate_random(seed: int, base_dir: Path) -> tuple[Scenario, PolicyResult, int]:
    """A random scenario whose pool is just large enough, or a little larger, and its audited run."""
    random = Random(seed)
    name = f"{seed}-{random.choice(('plain', 'hashes'))}"
    engine, policy = random_engine(random), random_policy(random)
    if name.endswith("hashes") and "block_size_tokens" in engine:
        engine["block_size_tokens"] = random.choice((4, 16, 32))
    block = engine.get("block_size_tokens", 1)
    policy = [p | {"block_size_tokens": block} if p["kind"] == "kv_compress" else p for p in policy]
    fields = {"workload": random_workload(random, base_dir, name), "policy": policy}
    fields["tensor_parallel"] = random.choice((1, 1, 1, 2, 8))
    pool_tokens = random.choice((20, 20, 20, 100, 300, 3000))
    while True:
        try:
            scenario = with_pool(random, base_dir, engine, fields, pool_tokens)
            result = run(scenario, audited=True)
        except (InputError, DoesNotFitError) as error:  # a request longer than the pool, refused as it must be
            if "KV pool" not in str(error) and "runs out of GPU memory" not in str(error):
                raise
            pool_tokens += max(8, pool_tokens // 8)
            continue
        number = expected_num_requests(scenario.workload)
        if number is None:
            trace = scenario.workload.trace
            number = len((base_dir / trace.path).read_text().splitlines()) * trace.repeat
        return scenario, result, number


def check(seed: int, base_dir: Path) -> None:
    scenario, result, num_requests = simulate_random(seed, base_dir)
    log, engine = result.log, scenario.engine
    check_time(log)
    check_blocks(result)
    summary = result.summary
    assert summary.mean_in_system_requests == pytest.approx(summary.arrival_rate_times_e2e_requests, rel=1e-9)
    check_littles_law(log)
    check_first_come_first_served(log)
    if engine.kind == "huggingface":
        check_static_batches(log, engine.num_beams, num_requests)
        return
    check_tokens(log, AuditedReplica.account, num_requests)
    check_gaps(log)
    rows = log.step_columns()
    assert (rows["num_decodes"] + rows["num_first_tokens"]).max() <= engine.max_num_seqs
    if engine.kind == "vllm_v1":
        assert (rows["num_decodes"] + rows["prefill_tokens"]).max() <= engine.max_num_batched_tokens
    else:
        assert not (rows["num_decodes"] * rows["prefill_tokens"]).any()  # decodes stall while prompts are computed


@pytest.mark.parametrize("first", range(0, NUM_SCENARIOS, PER_TEST))
def test_work_is_conserved(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + PER_TEST):
        try:
            check(seed, tmp_path)
        except BaseException as error:
            error.add_note(f"scenario {seed}: check({seed}, base_dir) repeats it")
            raise


# -- corner cases that random search found -------------------------------------------------------------------------------


def all_at_once(prompt_tokens: int, output_tokens: int, num_requests: int = 1) -> dict[str, Any]:
    lengths = {"kind": "fixed", "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    return {"arrivals": {"kind": "all_at_once"}, "lengths": lengths, "num_requests": num_requests}


def answered_or_refused(num_requests: int, base_dir: Path, **fields: Any) -> None:
    """Every request is answered, or the scenario is refused in words: no assertion fails, and nothing is lost."""
    try:
        result = run(make(base_dir, **fields), audited=True)
    except (InputError, DoesNotFitError):
        return
    assert len(result.log.request_columns()["index"]) == num_requests
    check_blocks(result)
    check_time(result.log)


def test_a_request_beyond_the_context_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prompt \+ output tokens=9005 must be at most 8192"):
        run(make(tmp_path, engine={"kind": "vllm_v1"}, workload=all_at_once(9000, 5)))


def test_the_rounding_of_two_lanes_may_grow_a_compressed_prompt(tmp_path: Path) -> None:
    """ThinK splits 64 tokens into 32 with pruned and 32 with whole keys: two blocks of 64 tokens where there was one."""
    engine = {"kind": "vllm_v1", "block_size_tokens": 64}
    answered_or_refused(1, tmp_path, engine=engine, workload=all_at_once(64, 2), policy=[{"kind": "think"}])


def test_a_lone_sequence_is_never_preempted(tmp_path: Path) -> None:
    """33 + 15 tokens fit three whole blocks, but not as ThinK's two lanes: refused, or served without preempting itself."""
    engine = {"kind": "vllm_v1", "num_gpu_blocks": 3}
    try:
        result = run(make(tmp_path, engine=engine, workload=all_at_once(33, 15), policy=[{"kind": "think"}]))
    except (InputError, DoesNotFitError):
        return
    assert result.log.num_preemptions == 0


def test_a_window_that_fills_up_where_a_residual_does(tmp_path: Path) -> None:
    """StreamingLLM's cache stops growing in the very step in which KIVI starts a new residual; blocks of one token."""
    policy = [{"kind": "streaming_llm", "window_tokens": 60}, {"kind": "kivi", "residual_tokens": 32}]
    answered_or_refused(1, tmp_path, engine={"kind": "huggingface"}, workload=all_at_once(50, 40), policy=policy)


@pytest.mark.parametrize("tokens", [(3, 12), (16, 17), (20, 10)], ids=str)
def test_the_last_swapped_sequence_comes_back(tokens: tuple[int, int], tmp_path: Path) -> None:
    engine = {"kind": "vllm_v0", "preemption": "swap", "watermark_frac": 0, "num_gpu_blocks": -(-sum(tokens) // 16) + 1}
    answered_or_refused(3, tmp_path, engine=engine, workload=all_at_once(*tokens, 3))


@pytest.mark.parametrize("engine", ["vllm_v0", "vllm_v1"])
def test_a_preempted_sequence_that_no_longer_fits_uncompressed(engine: str, tmp_path: Path) -> None:
    """Compressed, 200 + 200 tokens stay within 16 blocks; recomputed after 112 of them were generated they do not."""
    rows = [{"arrival_s": 0, "prompt_tokens": prompt, "output_tokens": 200} for prompt in (1, 200)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answered_or_refused(
        2, tmp_path, engine={"kind": engine, "num_gpu_blocks": 16}, policy=[{"kind": "snapkv", "budget_tokens": 33}],
        workload={"trace": {"path": "two.jsonl", "format": "jsonl"}},
    )  # fmt: skip
