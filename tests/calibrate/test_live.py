"""Serving for real: the simulator's loop over the decoder's steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the decoder needs torch")
pytest.importorskip("triton", reason="packing is shared with the Triton kernels")

import simpy  # noqa: E402
import yaml  # noqa: E402

from kvsim.api import RequestCheck, build_ledger, build_plan, deploy, run_policy  # noqa: E402
from kvsim.batch import DecodeBatch  # noqa: E402
from kvsim.calibrate.decoder.clock import OpClock  # noqa: E402
from kvsim.calibrate.decoder.decoder import Decoder  # noqa: E402
from kvsim.calibrate.decoder.sample import sample_decode, sample_prefill  # noqa: E402
from kvsim.calibrate.decoder.spec import spec_of  # noqa: E402
from kvsim.calibrate.decoder.studies import cpu_study  # noqa: E402
from kvsim.calibrate.decoder.study import Case, Study, measure, measured_rows, open_rows, step_times  # noqa: E402
from kvsim.calibrate.decoder.transformer import Transformer  # noqa: E402
from kvsim.calibrate.decoder.weights import random_weights  # noqa: E402
from kvsim.calibrate.live import LiveReplica  # noqa: E402
from kvsim.calibrate.serve_command import on_device, serve  # noqa: E402
from kvsim.cli import main  # noqa: E402
from kvsim.cost import StepCosts  # noqa: E402
from kvsim.cost_types import Run  # noqa: E402
from kvsim.errors import InputError  # noqa: E402
from kvsim.model import Model  # noqa: E402
from kvsim.ops import DecodeAttention, Gemm, HostWork, PolicyKernel  # noqa: E402
from kvsim.policies.h2o import H2O  # noqa: E402
from kvsim.pool import BlockPool  # noqa: E402
from kvsim.runs import decode_run  # noqa: E402
from kvsim.scenario import Scenario, parse_scenario  # noqa: E402
from kvsim.workload import build_source  # noqa: E402

SHAPE = {
    "num_layers": 2, "hidden_size": 32, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 48, "vocab_size": 53,
    "max_context_tokens": 1024,
}  # fmt: skip
POLICIES: dict[str, list[dict[str, Any]]] = {
    "full": [],
    "h2o": [{"kind": "h2o", "kept_frac": 0.4}],
    "snapkv": [{"kind": "snapkv", "budget_tokens": 48, "window_tokens": 8}],
    "scissorhands": [{"kind": "scissorhands", "budget_tokens": 48}],
    "int8": [{"kind": "kv_quant", "dtype": "int8"}],
}


def scenario(folder: Path, num_blocks: int, policies: dict[str, Any] = POLICIES, **engine: Any) -> Scenario:
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"name": "tiny", **SHAPE}))
    lengths = {
        "kind": "lognormal", "prompt_mean_tokens": 90, "output_mean_tokens": 20, "prompt_max_tokens": 200, "output_max_tokens": 60,
    }  # fmt: skip
    return parse_scenario({
        "gpu": "a100-sxm-80gb", "model": "tiny.yaml", "profile": "datasheet", "weight_dtype": "fp32", "policies": policies,
        "engine": {"kind": "torch_decoder", "max_num_seqs": 6, "max_num_batched_tokens": 64, "num_gpu_blocks": num_blocks, **engine},
        "workload": {"arrivals": {"kind": "poisson", "rate_per_s": 600}, "lengths": lengths, "num_requests": 25, "seed": 3},
    }, folder)  # fmt: skip


class Paced(LiveReplica):
    """Computes every step for real and takes its time from the cost model: it must then be the simulation."""

    def __init__(self, costs: StepCosts, *args: Any) -> None:
        super().__init__(*args)
        self.paced = costs
        live = self._live_costs

        def prefill_step(*arguments: Any) -> int:
            live.run()
            return costs.prefill_step(*arguments)

        live.prefill_step = prefill_step  # type: ignore[method-assign]

    def decode_run(  # type: ignore[override]
        self, costs: object, batch: DecodeBatch, limit_ps: int | None, max_steps: int, decided: bool = False
    ) -> Run:
        super().decode_run(costs, batch, limit_ps, max_steps, decided)
        assert self.peak_bytes <= self.scheduler.pool.capacity_units * self.decoder.plan.unit_bytes
        return decode_run(self.paced, batch, limit_ps, 1, decided)


@pytest.mark.parametrize("num_blocks", [200, 20])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_live_run_at_the_simulators_pace_is_the_simulation(policy: str, num_blocks: int, tmp_path: Path) -> None:
    """Every request at the same picosecond, preemptions and recomputed prefills included, over real caches."""
    given = scenario(tmp_path, num_blocks)
    deployment = deploy(given)
    plan = build_plan(deployment, given.policies[policy], policy)
    ledger = build_ledger(deployment, plan)
    simulated = run_policy(given, deployment, policy, plan)
    spec = spec_of(deployment.model)
    decoder = Decoder(Transformer(spec, random_weights(spec, torch.float32, "cpu")), plan, ledger.pool_units * plan.unit_bytes)
    env = simpy.Environment(initial_time=0)
    costs = StepCosts(deployment.model, 1, "fp32", deployment.engine, plan, deployment.profile, ledger.pool_slots)
    scheduler = deployment.engine.scheduler(BlockPool(ledger.pool_units), plan, deployment.model)
    source = build_source(given.workload, given.base_dir)
    live = Paced(costs, env, source, scheduler, decoder, 0, RequestCheck(deployment, plan, ledger.pool_units))
    env.process(live.serve())
    env.run()
    assert live.num_finished == 25 and not live.caches
    real, said = live.log.request_columns(), simulated.log.request_columns()
    for name in ("index", "scheduled_ps", "first_token_ps", "finish_ps", "num_preemptions"):
        assert real[name].tolist() == said[name].tolist(), name
    assert len(decoder.full.free) == decoder.full.num_blocks, "blocks were lost"
    assert live.log.num_preemptions == simulated.summary.num_preemptions
    if policy == "full" and num_blocks == 20:
        assert live.log.num_preemptions > 0, "the pool is too large to test preemption"


def test_serving_reports_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = scenario(tmp_path, 200, {"full": [], "h2o": POLICIES["h2o"]})
    served = serve(given, torch.device("cpu"))
    assert [one.policy for one in served] == ["full", "h2o"]
    for one in served:
        assert one.measured.num_requests == one.simulated.num_requests == 25
        assert 0 < one.measured.ttft.mean_s < 60
        assert one.peak_cache_bytes > 0
        assert len(one.lines()) == 14
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({
        **given.model_dump(mode="json", exclude={"base_dir"}), "policies": {"full": []}, "engine": {
            "kind": "torch_decoder", "max_num_seqs": 6, "max_num_batched_tokens": 64, "num_gpu_blocks": 200,
        },
    }))  # fmt: skip
    assert main(["calibrate", "serve", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "rows.csv")]) == 0
    assert "simulated / measured" in capsys.readouterr().out
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 26


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"engine": {"kind": "vllm_v1"}}, "engine.kind='vllm_v1' must be torch_decoder"),
        ({"tensor_parallel": 2}, "tensor_parallel=2 must be 1"),
        ({"weight_dtype": "fp8"}, "weight_dtype='fp8' must be one of"),
    ],
)
def test_what_cannot_be_served_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = scenario(tmp_path, 200, {"full": []})
    data = {**given.model_dump(mode="json", exclude={"base_dir"}), **changed}
    with pytest.raises(InputError, match=message):
        serve(parse_scenario(data, tmp_path), torch.device("cpu"))


def test_the_engine_is_simulated_as_the_device_runs_it(tmp_path: Path) -> None:
    """The backend that is left out is the device's; one that is named stays; a CPU replays no graphs."""
    left_out, named = scenario(tmp_path, 200), scenario(tmp_path, 200, attention="torch")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for given, device, attention, eager in (
        (left_out, cpu, "torch", True), (left_out, gpu, "triton", False), (named, gpu, "torch", False),
    ):  # fmt: skip
        engine = on_device(given, device).engine
        assert (engine.attention, engine.enforce_eager) == (attention, eager)  # type: ignore[attr-defined]


# -- samples ----------------------------------------------------------------------------------------------------------


def tiny_study() -> Study:
    model = Model("tiny", *(SHAPE[name] for name in (
        "num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size", "max_context_tokens"
    )))  # fmt: skip
    policies = {"full": [], "h2o": [H2O(budget_tokens=24)]}
    return Study({"tiny": model}, policies, (1, 3), (20, 60), (16,), (0, 32), pool_bytes=2_000_000, steps=2)


def decoder_of(study: Study, policy: str) -> Decoder:
    from kvsim.calibrate.decoder.study import Bench

    return Bench(study, torch.device("cpu")).decoder("tiny", policy)


def test_rows_of_a_step_add_up_to_the_step() -> None:
    """Launches times seconds over all Ops are the whole step that was timed: nothing is left out and nothing counts twice."""
    study = tiny_study()
    decoder = decoder_of(study, "h2o")
    totals: list[float] = []
    original = OpClock.start

    def start(self: OpClock) -> None:
        original(self)
        clocks.append(self)

    clocks: list[OpClock] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpClock, "start", start)
        sample = sample_decode(decoder, 3, 60, steps=1)
    totals.append(sum(clocks[0].seconds.values()))
    layers = SHAPE["num_layers"]
    counts = {"norm": 2 * layers, "embedding": 1, "sampler": 1}
    total = 0.0
    for op, seconds in sample.rows:
        if isinstance(op, PolicyKernel | HostWork):
            total += seconds
        elif isinstance(op, Gemm):
            total += seconds * (1 if op.n == SHAPE["vocab_size"] else layers)
        else:
            total += seconds * counts.get(getattr(op, "name", ""), layers)
    assert total == pytest.approx(totals[0], rel=1e-6)
    kinds = {type(op) for op, _ in sample.rows}
    assert {Gemm, DecodeAttention, HostWork, PolicyKernel} <= kinds


def test_a_prefill_sample_has_its_attention() -> None:
    seconds, rows = sample_prefill(decoder_of(tiny_study(), "h2o"), 16, 32, repeats=2)
    assert seconds > 0
    kernels = [op.kernel for op, _ in rows if isinstance(op, PolicyKernel)]
    assert kernels == ["prefill_scores"]


def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    study, device = tiny_study(), torch.device("cpu")
    file = open_rows(tmp_path, study, device)
    told: list[tuple[int, int]] = []

    def stop_after_three(done: int, total: int) -> None:
        told.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(study, device, file, 600, stop_after_three)
    file.close()
    again = open_rows(tmp_path, study, device)
    assert len(dict(step_times(again))) == 3
    before = dict(step_times(again))
    measure(study, device, again, 600, lambda done, total: None)
    again.close()
    times = dict(step_times(open_rows(tmp_path, study, device)))
    assert {case.key for case in study.cases()} == times.keys()
    assert all(times[key] == seconds for key, seconds in before.items()), "what was measured is not measured again"
    rows = measured_rows(open_rows(tmp_path, study, device))
    assert len({row.where for row in rows}) == len(rows) > 100


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    study, device = tiny_study(), torch.device("cpu")
    file = open_rows(tmp_path, study, device)
    measure(study, device, file, 0, lambda done, total: None)
    file.add({"key": "x", "status": "step", "seconds": 1.0})
    file.close()
    with pytest.raises(InputError, match="to go on here"):
        open_rows(tmp_path, Study(study.models, study.policies, (1,), (20,), (), (), block_size_tokens=32), device)


def test_what_does_not_fit_is_a_row_that_says_so(tmp_path: Path) -> None:
    study = tiny_study()
    small = Study(study.models, {"full": []}, (3,), (600,), (), (), pool_bytes=200_000, steps=1)
    file = open_rows(tmp_path, small, torch.device("cpu"))
    measure(small, torch.device("cpu"), file, 600, lambda done, total: None)
    assert [row["status"] for row in file.rows] == ["out of memory"]
    assert "blocks are needed" in file.rows[0]["reason"]
    file.close()


def test_decode_wants_a_device_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "decode", "--out", str(tmp_path)]) == 2
    assert "kvsim calibrate device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cases_are_named_apart() -> None:
    study = tiny_study()
    keys = [case.key for case in study.cases()]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 + 2 * 2 + 2
    assert Case("m", "p", 2, 64).key != Case("m", "p", 2, 64, 0).key


def test_chunks_are_shared_out_among_policies_and_models() -> None:
    """Each policy has all sizes: what it does for a prompt's tokens is not known beyond the largest that it was timed at."""
    study = tiny_study()
    twins = {"tiny": study.models["tiny"], "twin": study.models["tiny"]}
    study = replace(study, models=twins, chunks=(8, 16, 24, 32), chunk_stride=2)
    sizes = {
        (model, policy): {case.tokens for case in study.cases() if (case.kind, case.model, case.policy) == ("prompt chunk", model, policy)}
        for model in study.models for policy in study.policies
    }  # fmt: skip
    assert list(sizes.values()) == [{8, 24}, {16, 32}, {16, 32}, {8, 24}]
    assert set(sizes) == {("tiny", "full"), ("tiny", "h2o"), ("twin", "full"), ("twin", "h2o")}


def test_the_cpu_study_times_every_policy_at_every_chunk() -> None:
    study = cpu_study()
    for policy in study.policies:
        assert {case.tokens for case in study.cases() if case.kind == "prompt chunk" and case.policy == policy} == set(study.chunks)
