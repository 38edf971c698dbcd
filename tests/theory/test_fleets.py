"""Fleets against queueing theory and conservation laws."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
import pytest
import simpy
from audit import HERE, check_littles_law, check_time, make
from test_queueing import LENGTHS, md1_mean_wait, service_ps, within_three_stderr

from kvsim.api import build_ledger, build_plan, deploy, run_policy
from kvsim.recording import RunLog
from kvsim.requests import OpenLoop, RequestSource
from kvsim.result import PolicyResult
from kvsim.routers import ROUTERS
from kvsim.scenario import Scenario
from kvsim.serving import Parts
from kvsim.simulation import Replica
from kvsim.units import PS_PER_S
from kvsim.workload import build_source

ROUTER_KINDS = [str(router.model_fields["kind"].default) for router in ROUTERS]
ONE_AT_A_TIME = {"kind": "vllm_v1", "max_num_seqs": 1, "max_num_batched_tokens": 64}


def simulate(scenario: Scenario) -> PolicyResult:
    deployment = deploy(scenario)
    return run_policy(scenario, deployment, "policy", build_plan(deployment, scenario.policies["policy"], "policies.policy"))


def alone(scenario: Scenario, source: RequestSource) -> RunLog:
    """One replica of the scenario, fed by this source."""
    deployment = deploy(scenario.model_copy(update={"replicas": 1}))
    plan = build_plan(deployment, scenario.policies["policy"], "policies.policy")
    parts = Parts(deployment, plan, build_ledger(deployment, plan), source)
    env = simpy.Environment(initial_time=0)
    replica = Replica(env, source, parts.scheduler(), parts.costs, parts.contended, parts.check)
    env.process(replica.serve())
    env.run()
    return replica.log


def every(source: RequestSource, first: int, step: int) -> OpenLoop:
    taken = []
    while source.next_arrival_ps is not None:
        taken.append(source.take())
    return OpenLoop(iter(taken[first::step]))


@pytest.mark.parametrize("policy", [[], [{"kind": "keyformer", "schedule": "code"}], [{"kind": "snapkv", "budget_tokens": 64}]])
def test_round_robin_over_equal_replicas_is_every_nth_request(policy: list[dict[str, Any]]) -> None:
    """At constant spacing: request by request, step by step and Op by Op what a replica alone does, to the picosecond."""
    lengths = {
        "kind": "uniform", "prompt_min_tokens": 1, "prompt_max_tokens": 300, "output_min_tokens": 1, "output_max_tokens": 60,
    }  # fmt: skip
    workload = {"arrivals": {"kind": "constant", "rate_per_s": 900}, "lengths": lengths, "num_requests": 301}
    engine = {"kind": "vllm_v1", "num_gpu_blocks": 60, "max_num_seqs": 8, "max_num_batched_tokens": 128}
    scenario = make(engine=engine, workload=workload, policy=policy, replicas=3)
    result = simulate(scenario)
    for number, replica in enumerate(result.replicas):
        log = alone(scenario, every(build_source(scenario.workload, HERE), number, 3))
        assert replica.log == log and len(log.requests)
    assert sum(log.num_preemptions for log in result.logs) == result.summary.num_preemptions > 0 or policy


@pytest.mark.parametrize("router", ROUTER_KINDS)
def test_work_is_conserved(router: str) -> None:
    """Every request is served once, blocks come back, Little's law holds over the fleet; open and closed loops."""
    lengths = {"kind": "lognormal", "prompt_mean_tokens": 150, "output_mean_tokens": 40}
    engine = {"kind": "vllm_v1", "num_gpu_blocks": 200, "max_model_len": 3000}
    for arrivals in ({"kind": "poisson", "rate_per_s": 800}, {"kind": "closed_loop", "clients": 24}):
        workload = {"arrivals": arrivals, "lengths": lengths, "num_requests": 400, "seed": 3}
        result = simulate(make(engine=engine, workload=workload, replicas=4, router={"kind": router}))
        served = sorted(index for log in result.logs for index in log.request_columns()["index"].tolist())
        assert served == list(range(400)) == sorted(result.log.request_columns()["index"].tolist())
        for log in result.logs:
            if not len(log.requests):
                continue
            check_time(log)
            check_littles_law(log)
            assert log.units_allocated == log.units_freed > 0
            assert sum(log.op_ps.values()) == sum(duration(log))
        check_littles_law(result.log)
        summary = result.summary
        assert summary.mean_in_system_requests == pytest.approx(summary.arrival_rate_times_e2e_requests, rel=1e-9)
        assert sum(r.num_requests for r in result.replicas) == 400
        assert summary.utilisation_frac == pytest.approx(fmean(r.utilisation_frac for r in result.replicas))
        assert summary.output_tokens_per_s == pytest.approx(sum(r.output_tokens_per_s for r in result.replicas))
        gaps = int((result.log.request_columns()["output_tokens"] - 1).sum())
        assert summary.itl.num_values == gaps
        assert result.pool_units == 800 and summary.peak_held_units <= 800


def duration(log: RunLog) -> list[int]:
    rows = log.step_columns()
    steps = rows["num_steps"]
    return (steps * rows["first_step_ps"] + rows["step_growth_ps"] * (steps * (steps - 1) // 2)).tolist()


def test_random_routing_splits_poisson_arrivals_into_md1_queues() -> None:
    """A Poisson stream split at random is Poisson streams at rate/n: each replica is an M/D/1 queue."""
    service, rho = service_ps("vllm_v1"), 0.7
    waits, busy, shares = [], [], []
    for seed in range(16):
        workload = {
            "arrivals": {"kind": "poisson", "rate_per_s": 4 * rho * PS_PER_S / service}, "lengths": LENGTHS,
            "num_requests": 4000, "seed": seed, "warmup_requests": 400,
        }  # fmt: skip
        scenario = make(engine=ONE_AT_A_TIME, workload=workload, replicas=4, router={"kind": "random", "seed": seed})
        result = simulate(scenario)
        waits.append(result.summary.queue.mean_s * PS_PER_S / service)
        busy.append(result.summary.utilisation_frac)
        shares.append(result.replicas[0].share_frac)
        requests = result.log.request_columns()
        assert set((requests["finish_ps"] - requests["scheduled_ps"]).tolist()) == {service}
    within_three_stderr(waits, md1_mean_wait(rho))
    within_three_stderr(busy, rho)
    within_three_stderr(shares, 0.25)


def test_round_robin_waits_less_than_random_as_theory_says() -> None:
    """Every fourth arrival of a Poisson stream is an Erlang-4 stream, less bursty: each wait is shorter than M/D/1's."""
    service = service_ps("vllm_v1")
    waits = {}
    for kind in ("random", "round_robin", "power_of_two", "least_outstanding_tokens"):
        arrivals = {"kind": "poisson", "rate_per_s": 4 * 0.8 * PS_PER_S / service}
        workload = {"arrivals": arrivals, "lengths": LENGTHS, "num_requests": 8000}
        waits[kind] = simulate(make(engine=ONE_AT_A_TIME, workload=workload, replicas=4, router={"kind": kind})).summary.queue.mean_s
    assert waits["random"] > 1.5 * waits["round_robin"]
    assert waits["random"] > 1.5 * waits["power_of_two"] > 1.5 * waits["least_outstanding_tokens"]


def test_least_outstanding_tokens_is_no_worse_than_random_on_skewed_lengths() -> None:
    """A few requests are tens of times as long as the others; busy enough to queue, and not overloaded."""
    lengths = {
        "kind": "lognormal", "prompt_mean_tokens": 300, "prompt_cv": 4, "prompt_max_tokens": 4000, "output_mean_tokens": 100,
        "output_cv": 4, "output_max_tokens": 3000,
    }  # fmt: skip
    ratios = []
    for seed in range(3):
        workload = {"arrivals": {"kind": "poisson", "rate_per_s": 300}, "lengths": lengths, "num_requests": 1500, "seed": seed}
        mean = {
            kind: simulate(
                make(engine={"kind": "vllm_v1", "max_num_seqs": 8}, workload=workload, replicas=4, router={"kind": kind})
            ).summary.e2e.mean_s
            for kind in ("random", "least_outstanding_tokens")
        }
        ratios.append(mean["least_outstanding_tokens"] / mean["random"])
    assert max(ratios) <= 1 and fmean(ratios) < 0.9


def test_weights_divide_the_work() -> None:
    """Exactly under round robin; within three standard errors under random."""
    workload: dict[str, Any] = {
        "arrivals": {"kind": "poisson", "rate_per_s": 100}, "num_requests": 1000,
        "lengths": {"kind": "fixed", "prompt_tokens": 100, "output_tokens": 20},
    }  # fmt: skip
    fleet = [{"weight": 3}, {"gpu": "a100-sxm-40gb", "replicas": 2}]
    common: dict[str, Any] = {"engine": {"kind": "vllm_v1"}, "workload": workload, "fleet": fleet}
    result = simulate(make(**common, router={"kind": "round_robin"}))
    assert [replica.num_requests for replica in result.replicas] == [600, 200, 200]
    assert [replica.group for replica in result.replicas] == ["l4-24gb", "a100-sxm-40gb", "a100-sxm-40gb"]
    at_random = simulate(make(**common, router={"kind": "random"}))
    assert abs(at_random.replicas[0].share_frac - 0.6) < 3 * (0.6 * 0.4 / 1000) ** 0.5
    assert np.isclose(sum(replica.share_frac for replica in result.replicas), 1)
