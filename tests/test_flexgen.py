"""FlexGen's block schedule and offloading, against the loops of flex_opt.py walked through, formulas of bytes, and bounds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from kvsim.api import build_ledger, build_plan, deploy, simulate
from kvsim.engines.flexgen import FlexGen
from kvsim.errors import DoesNotFitError, InputError
from kvsim.model import load_model
from kvsim.offload import Loads, OffloadCosts
from kvsim.ops import Copy
from kvsim.result import PolicyResult
from kvsim.scenario import Scenario, parse_scenario
from kvsim.units import GB, GIB, PS_PER_S

OPT = load_model("opt-30b")
IN_HOST = {"cache_gpu_frac": 0.0, "cache_cpu_frac": 1.0, "weight_gpu_frac": 0.0, "weight_cpu_frac": 1.0, "activations_on": "cpu"}
INT4 = [{"kind": "kv_quant", "dtype": "int4"}]
H2O = [{"kind": "h2o", "variant": "flexgen", "kept_frac": 0.4}]


def make(
    policy: list[dict[str, Any]] | None = None, num_requests: int | None = None, gpu: str = "a100-sxm-80gb", model: str = "opt-30b",
    prompt: int = 128, output: int = 16, **engine: Any,
) -> Scenario:  # fmt: skip
    block = engine.get("gpu_batch_size", 4) * engine.get("num_gpu_batches", 1)
    return parse_scenario({
        "gpu": gpu, "model": model, "weight_dtype": "fp16", "policies": {"p": policy or []},
        "engine": {"kind": "flexgen", "prompt_tokens": prompt, **engine},
        "workload": {
            "arrivals": {"kind": "all_at_once"}, "num_requests": num_requests or block,
            "lengths": {"kind": "fixed", "prompt_tokens": prompt, "output_tokens": output},
        },
    })  # fmt: skip


def run(*args: Any, **kwargs: Any) -> PolicyResult:
    return simulate(make(*args, **kwargs)).policies["p"]


def costs_of(*args: Any, **kwargs: Any) -> OffloadCosts:
    scenario = make(*args, **kwargs)
    d = deploy(scenario)
    plan = build_plan(d, scenario.policies["p"], "p")
    return OffloadCosts(d.model, 1, d.weight_dtype, d.engine, plan, d.profile, build_ledger(d, plan).pool_slots)


# -- the schedule --------------------------------------------------------------------------------------------------------


def walk(attention_s: float, mlp_s: float, w_attention: float, w_mlp: float, load: float, store: float, n: int, overlap: bool) -> float:
    """One token's layers as the generation loops run them, each call on the link it uses, a sync after every GPU batch.

    Layers alternate attention and MLP. With several GPU batches: load_weight(j+1) with k = 0, load_cache(j, k+1), compute(j, k),
    store_cache(j, k-1). With one: load_weight(j+1), load_cache(j+1), compute(j), store_cache(j-1).
    """
    layers = 40
    total = 0.0
    for j in range(layers, layers + 2):  # a layer of each kind, in the middle
        for k in range(n):
            to_gpu = from_gpu = 0.0
            if k == 0:
                to_gpu += w_mlp if j % 2 == 0 else w_attention
            j_load, k_load = (j + 1, 0) if n == 1 or k + 1 == n else (j, k + 1)
            j_store, k_store = (j - 1, 0) if n == 1 or k == 0 else (j, k - 1)
            assert 0 <= k_load < n and 0 <= k_store < n
            to_gpu += load if j_load % 2 == 0 else 0.0
            from_gpu += store if j_store % 2 == 0 else 0.0
            compute = attention_s if j % 2 == 0 else mlp_s
            total += max(compute, to_gpu, from_gpu) if overlap else compute + to_gpu + from_gpu
    return total


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_layer_takes_what_the_loops_take(n: int, overlap: bool) -> None:
    costs = costs_of(num_gpu_batches=n, overlap=overlap, **IN_HOST)
    link = costs.profile.answer
    attention, mlp = costs.engine.layer_weights(costs.model)
    w_attention, w_mlp = (link(Copy("host", round(w.cpu_bytes))).seconds for w in (attention, mlp))
    for compute in (1e-4, 0.01, 0.05, 1.0):
        for load, store in ((0.0, 0.0), (0.02, 0.001), (0.5, 0.03)):
            found = n * (compute + 0.7 * compute) + costs._layer_exposed(compute, 0.7 * compute, Loads(load), Loads(0.0, store), n)
            assert found == pytest.approx(walk(compute, 0.7 * compute, w_attention, w_mlp, load, store, n, overlap), rel=1e-9)


def test_steps_add_up_to_the_run() -> None:
    """Answer after answer by the table of the batch, against the simulated end."""
    result, costs = run(gpu_batch_size=3, num_gpu_batches=2, **IN_HOST), costs_of(gpu_batch_size=3, num_gpu_batches=2, **IN_HOST)
    table, plan = costs.tables[6], costs.plan
    expected = 0
    for step in range(1, 16):
        segment = plan.segment(128, 128, step)
        expected += max(table.floor_ps, table.fixed.total_ps + table.attention[0](6 * segment.read[0])) + table.host_ps
    requests = result.log.request_columns()
    assert set((requests["finish_ps"] - requests["first_token_ps"]).tolist()) == {expected}
    rows = result.log.step_columns()
    assert sum(result.log.op_ps.values()) == result.log.end_ps
    assert int(((rows["num_decodes"] + rows["num_first_tokens"]) * rows["num_steps"]).sum()) == 6 * 16


def test_several_blocks_follow_one_another() -> None:
    one, three = run(gpu_batch_size=4), run(gpu_batch_size=4, num_requests=12)
    assert three.log.end_ps == 3 * one.log.end_ps
    last = run(gpu_batch_size=4, num_requests=5)  # a block of one that is left over
    assert one.log.end_ps < last.log.end_ps < 2 * one.log.end_ps


# -- bounds --------------------------------------------------------------------------------------------------------------


def test_transfers_bound_the_run_and_overlap_helps() -> None:
    kwargs: dict[str, Any] = {"gpu_batch_size": 8, "num_gpu_batches": 4, "output": 20, **IN_HOST}
    beside, apart = run(**kwargs), run(overlap=False, **kwargs)
    everything = run(**{**kwargs, **dict.fromkeys(("weight_gpu_frac", "cache_gpu_frac"), 1.0), "weight_cpu_frac": 0, "cache_cpu_frac": 0})
    assert everything.log.end_ps < beside.log.end_ps < apart.log.end_ps
    streamed = sum(w.cpu_bytes for w in FlexGen(weight_gpu_frac=0, weight_cpu_frac=1).layer_weights(OPT)) * OPT.num_layers
    cache = 32 * 128 * OPT.kv_bytes_per_token()
    link = 31.5 * GB
    assert beside.log.end_ps / PS_PER_S > 20 * streamed / link + 19 * cache / link


def test_on_the_gpu_overlap_changes_nothing() -> None:
    assert run(overlap=True).log.end_ps == run(overlap=False).log.end_ps


def test_more_gpu_batches_share_the_loads() -> None:
    """Weights cross the link once a block, so tokens a second grow with num_gpu_batches until compute covers them."""
    rates = [run(gpu_batch_size=16, num_gpu_batches=n, **IN_HOST).summary.output_tokens_per_s for n in (1, 2, 4, 8)]
    assert all(a < b for a, b in pairwise(rates)) and rates[1] > 1.6 * rates[0]
    assert rates[3] / rates[2] < rates[1] / rates[0]


def test_the_disk_binds_where_it_is_used() -> None:
    """Half of the weights on disk: a step takes at least as long as reading them."""
    kwargs: dict[str, Any] = {"gpu_batch_size": 4, **IN_HOST, "weight_cpu_frac": 0.5, "output": 6, "disk_read_gb_per_s": 1.0}
    result = run(**kwargs)
    engine = FlexGen(weight_gpu_frac=0, weight_cpu_frac=0.5)
    on_disk = OPT.num_layers * sum(w.disk_bytes for w in engine.layer_weights(OPT))
    assert result.summary.tpot.mean_s > on_disk / 1e9
    assert run(**{**kwargs, "disk_read_gb_per_s": 1000.0}).summary.tpot.mean_s < 0.2 * result.summary.tpot.mean_s


def test_compressed_weights_cross_the_link_faster_and_cost_compute() -> None:
    kwargs: dict[str, Any] = {"gpu_batch_size": 4, **IN_HOST, "cache_gpu_frac": 1.0, "cache_cpu_frac": 0.0, "activations_on": "gpu"}
    plain, packed = run(**kwargs), run(compress_weight=True, **kwargs)
    assert packed.summary.tpot.mean_s < 0.5 * plain.summary.tpot.mean_s
    assert packed.summary.op_s["engine:widen_weights"] > 0 and "engine:widen_weights" not in plain.summary.op_s
    here = {"gpu_batch_size": 4, "model": "opt-6.7b"}
    assert run(compress_weight=True, **here).summary.tpot.mean_s > run(**here).summary.tpot.mean_s


def test_cpu_attention_follows_host_memory() -> None:
    kwargs: dict[str, Any] = {"gpu_batch_size": 32, "num_gpu_batches": 2, "prompt": 512, "cpu_cache_compute": True, **IN_HOST}
    slow, fast = (run(host_memory_gb_per_s=rate, **kwargs).summary for rate in (20.0, 40.0))
    assert slow.op_s["host_attention"] == pytest.approx(2 * fast.op_s["host_attention"], rel=1e-3)
    assert "decode_attention" not in slow.op_s


def test_a_quantised_cache_is_widened_before_use() -> None:
    result = run(policy=INT4, gpu_batch_size=16, prompt=512)
    assert result.summary.op_s["engine:widen_cache"] > 0
    assert result.kv_bytes_per_sequence < 0.3 * run(gpu_batch_size=16, prompt=512).kv_bytes_per_sequence


# -- memory --------------------------------------------------------------------------------------------------------------


def test_placement_is_by_the_middle_of_each_matrix() -> None:
    """--percent 20 80: of queries, keys, values, output one lies past 80 %, of the MLP's two halves none."""
    engine = FlexGen(weight_gpu_frac=0.2, weight_cpu_frac=0.8)
    attention, mlp = engine.layer_weights(OPT)
    h2 = OPT.hidden_size**2
    assert (attention.gpu_bytes, attention.cpu_bytes) == (2 * h2, 6 * h2) and (mlp.gpu_bytes, mlp.cpu_bytes) == (0, 16 * h2)
    attention, mlp = FlexGen(weight_gpu_frac=0.0, weight_cpu_frac=0.5).layer_weights(OPT)
    assert attention.disk_bytes == attention.cpu_bytes == 4 * h2 and mlp.disk_bytes == mlp.cpu_bytes == 8 * h2
    packed = FlexGen(compress_weight=True).layer_weights(OPT)[1]
    assert packed.gpu_bytes == 8 * h2 * 4.5 / 8


def test_everything_on_the_gpu_weighs_the_checkpoint_and_a_second_embedding() -> None:
    table = 2 * OPT.vocab_size * OPT.hidden_size
    assert FlexGen().gpu_weight_bytes(OPT, 1, "fp16") == pytest.approx(OPT.weight_bytes("fp16") + table)
    away = FlexGen(weight_gpu_frac=0.0, weight_cpu_frac=1.0).gpu_weight_bytes(OPT, 1, "fp16")
    assert 0 < away < 0.002 * OPT.weight_bytes("fp16")  # norms and biases


def test_the_cache_may_lie_anywhere() -> None:
    """16 GiB on the GPU would not hold it; host memory does, less the weights that it holds too."""
    prompt, output = 512, 32
    result = run(gpu="t4-16gb", gpu_batch_size=48, num_gpu_batches=2, prompt=prompt, output=output, **IN_HOST)
    expected = 96 * (prompt + output - 1) * OPT.kv_bytes_per_token()
    assert result.log.peak_held_units * result.unit_bytes == expected > 60 * GIB
    pool = next(line.num_bytes for line in result.ledger if line.name == "KV pool")
    assert pool == pytest.approx(208 * GIB - OPT.weight_bytes("fp16") - 2 * OPT.vocab_size * OPT.hidden_size, rel=1e-3)


def test_h2o_never_holds_the_whole_prompt() -> None:
    """Layer by layer: 2 int(0.2 n) tokens of each sequence from the start."""
    result = run(policy=H2O, model="opt-6.7b", gpu_batch_size=8, prompt=500, output=40)
    kept = 2 * 100
    assert result.log.peak_held_units * result.unit_bytes == 8 * kept * (load_model("opt-6.7b").kv_bytes_per_token() + 32 * 32 * 4)


def test_out_of_memory_says_what_would_help() -> None:
    with pytest.raises(DoesNotFitError, match=r"a block of 64 requests runs out of memory.*lower gpu_batch_size"):
        run(model="opt-6.7b", gpu_batch_size=64, prompt=1024, output=1024, max_model_len=2048, gpu="a100-sxm-40gb")
    with pytest.raises(DoesNotFitError):  # the score matrices alone
        run(gpu="t4-16gb", gpu_batch_size=200, prompt=512, **IN_HOST)


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"weight_gpu_frac": 0.7, "weight_cpu_frac": 0.5}, "at most 1"),
        ({"cache_gpu_frac": 1.0, "cache_cpu_frac": 0.1}, "at most 1"),
        ({"activations_on": "tape"}, "activations_on"),
    ],
)
def test_wrong_fields(engine: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make(**engine)


def test_what_does_not_go_together() -> None:
    scenario = make().model_copy(update={"tensor_parallel": 2})
    with pytest.raises(InputError, match="tensor_parallel=2 must be 1 under flexgen"):
        simulate(scenario)
    data = make(prompt=100).model_dump(mode="json")
    data["engine"]["prompt_tokens"] = 64
    with pytest.raises(InputError, match=r"engine.prompt_tokens=64 must be at least the longest prompt.*try 100"):
        simulate(parse_scenario(data))
    with pytest.raises(InputError, match="cpu_cache_compute=true must be false"):
        run(policy=INT4, cpu_cache_compute=True, **IN_HOST)
    with pytest.raises(InputError, match="kv_cache_dtype='fp8' must be a 16-bit type"):
        run(kv_cache_dtype="fp8")
    with pytest.raises(InputError, match="weight_dtype='int4' must be fp16 or bf16"):
        simulate(make().model_copy(update={"weight_dtype": "int4"}))
    with pytest.raises(InputError, match="max_model_len"):
        run(model="opt-6.7b", prompt=4096, max_model_len=8192)
    assert run(model="opt-6.7b", prompt=4096, max_model_len=8192, long_sequences=True, gpu_batch_size=1).summary.num_requests == 1
