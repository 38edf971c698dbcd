"""Queueing theory on the real engines: with one sequence at a time and constant service they are M/D/1 and D/D/1 queues.

The service time is what an idle engine takes for one request, so each law is tested against the simulator's own S, and every
tolerance is three standard errors over independent seeds.
"""

from __future__ import annotations

from math import exp, factorial, floor
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from audit import check_littles_law, check_time, durations_ps, make, run

from kvsim.result import PolicyResult
from kvsim.units import PS_PER_S

LENGTHS = {"kind": "fixed", "prompt_tokens": 100, "output_tokens": 5}
ENGINES: dict[str, dict[str, Any]] = {
    "vllm_v1": {"kind": "vllm_v1", "max_num_seqs": 1, "max_num_batched_tokens": 64},
    "vllm_v0": {"kind": "vllm_v0", "max_num_seqs": 1},
    "huggingface": {"kind": "huggingface", "batch_size": 1},
}
POLICIES: dict[str, list[dict[str, Any]]] = {
    "full": [],
    "scissorhands+think": [{"kind": "scissorhands", "budget_tokens": 48}, {"kind": "think"}],
    "keyformer": [{"kind": "keyformer", "schedule": "code"}],
}
engines = pytest.mark.parametrize("engine", ENGINES)


def serve(
    engine: str, arrivals: dict[str, Any], num_requests: int, seed: int = 0, policy: str = "full", warmup: int = 0
) -> PolicyResult:
    workload = {
        "arrivals": arrivals, "lengths": LENGTHS, "num_requests": num_requests, "seed": seed, "warmup_requests": warmup,
    }  # fmt: skip
    return run(make(engine=ENGINES[engine], workload=workload, policy=POLICIES[policy]))


def service_ps(engine: str, policy: str = "full") -> int:
    """What an idle engine takes from a request's arrival to its last token."""
    requests = serve(engine, {"kind": "all_at_once"}, 1, policy=policy).log.request_columns()
    return int(requests["finish_ps"][0] - requests["arrival_ps"][0])


def waits_ps(result: PolicyResult) -> np.ndarray:
    """In order of arrival."""
    requests = result.log.request_columns()
    return (requests["scheduled_ps"] - requests["arrival_ps"])[np.argsort(requests["index"])]


def md1_mean_wait(rho: float) -> float:
    """Pollaczek–Khinchine with constant service, in service times."""
    return rho / (2 * (1 - rho))


def md1_wait_cdf(wait: float, rho: float) -> float:
    """P(W <= wait), wait in service times: Erlang 1909 (Crommelin's finite sum for one server)."""
    terms = ((rho * (k - wait)) ** k / factorial(k) * exp(rho * (wait - k)) for k in range(floor(wait) + 1))
    return (1 - rho) * sum(terms)


def within_three_stderr(values: list[float], expected: float) -> None:
    stderr = stdev(values) / len(values) ** 0.5
    assert abs(fmean(values) - expected) < 3 * stderr, f"{fmean(values):.5g} ± {stderr:.2g}, theory {expected:.5g}"


# -- deterministic arrivals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@engines
def test_all_at_once_each_waits_for_those_before(engine: str, policy: str) -> None:
    service = service_ps(engine, policy)
    result = serve(engine, {"kind": "all_at_once"}, 40, policy=policy)
    assert waits_ps(result).tolist() == [k * service for k in range(40)]
    assert result.log.end_ps == 40 * service


@pytest.mark.parametrize("load", [0.5, 0.999, 1.0, 1.001, 1.7])
@engines
def test_dd1(engine: str, load: float) -> None:
    """W_n = max(0, n (S − A)): nobody waits up to load 1, beyond it the queue grows by S − A a request."""
    service = service_ps(engine)
    result = serve(engine, {"kind": "constant", "rate_per_s": load * PS_PER_S / service}, 60)
    arrivals = np.sort(result.log.request_columns()["arrival_ps"])
    gap = int(arrivals[1])
    assert set(np.diff(arrivals).tolist()) == {gap} and gap == pytest.approx(service / load, abs=1)
    assert waits_ps(result).tolist() == [max(0, n * (service - gap)) for n in range(60)]


# -- Poisson arrivals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("arrivals", ["poisson", "gamma"])
@engines
def test_lindley_and_utilisation_are_exact(engine: str, arrivals: str, policy: str) -> None:
    """W' = max(0, W + S − A) request by request, and busy time = requests x S, to the picosecond."""
    service = service_ps(engine, policy)
    kind: dict[str, Any] = {"kind": arrivals, "rate_per_s": 0.8 * PS_PER_S / service}
    if arrivals == "gamma":
        kind["burstiness"] = 0.3
    result = serve(engine, kind, 500, policy=policy)
    log, arrived = result.log, np.sort(result.log.request_columns()["arrival_ps"]).tolist()
    expected = [0]
    for gap in np.diff(arrived).tolist():
        expected.append(max(0, expected[-1] + service - gap))
    assert waits_ps(result).tolist() == expected and max(expected) > service
    requests = log.request_columns()
    assert set((requests["finish_ps"] - requests["scheduled_ps"]).tolist()) == {service}
    # The utilisation law: busy fraction of the window = arrivals per second x service.
    assert int(durations_ps(log).sum()) == 500 * service
    summary = result.summary
    assert summary.utilisation_frac == pytest.approx(summary.requests_per_s * service / PS_PER_S, rel=1e-12)
    check_littles_law(log)
    check_littles_law(log, "arrival_ps", "scheduled_ps")
    check_littles_law(log, "scheduled_ps", "finish_ps")
    check_time(log)


NUM_SEEDS, NUM_REQUESTS, WARMUP = 20, 3000, 300


@pytest.fixture(scope="module", params=[("vllm_v1", 0.5), ("vllm_v1", 0.8), ("vllm_v0", 0.7), ("huggingface", 0.7)], ids=str)
def md1(request: pytest.FixtureRequest) -> tuple[float, int, list[PolicyResult]]:
    """(load, service, independent runs). At load 0.8 the first 300 requests are some 10 relaxation times."""
    engine, rho = request.param
    service = service_ps(engine)
    arrivals = {"kind": "poisson", "rate_per_s": rho * PS_PER_S / service}
    runs = [serve(engine, arrivals, NUM_REQUESTS, seed, warmup=WARMUP) for seed in range(NUM_SEEDS)]
    return rho, service, runs


def test_md1_mean_wait(md1: tuple[float, int, list[PolicyResult]]) -> None:
    rho, service, runs = md1
    waits = [result.summary.queue.mean_s * PS_PER_S / service for result in runs]
    within_three_stderr(waits, md1_mean_wait(rho))
    ttft = [result.summary.e2e.mean_s * PS_PER_S / service for result in runs]
    within_three_stderr(ttft, md1_mean_wait(rho) + 1)


def test_md1_mean_number_waiting_and_busy_fraction(md1: tuple[float, int, list[PolicyResult]]) -> None:
    """Little: Lq = λ Wq, from the step rows' clock rather than from requests; and utilisation = ρ."""
    rho, _, runs = md1
    within_three_stderr([r.summary.utilisation_frac for r in runs], rho)
    within_three_stderr([r.summary.mean_in_system_requests for r in runs], rho + rho * md1_mean_wait(rho))


@pytest.mark.parametrize("percent", [90, 99])
def test_md1_wait_percentiles(md1: tuple[float, int, list[PolicyResult]], percent: int) -> None:
    """The exact distribution puts each seed's empirical percentile at its rank, on average."""
    rho, service, runs = md1
    found = [getattr(result.summary.queue, f"p{percent}_s") * PS_PER_S / service for result in runs]
    within_three_stderr([md1_wait_cdf(wait, rho) for wait in found], percent / 100)


def test_md1_whole_distribution(md1: tuple[float, int, list[PolicyResult]]) -> None:
    """Share of requests that wait at most t, for t from nothing to several services."""
    rho, service, runs = md1
    for t in (0.0, 0.3, 1.0, 2.0, 3.5, 6.0):
        shares = [float((waits_ps(result)[WARMUP:] <= t * service).mean()) for result in runs]
        within_three_stderr(shares, md1_wait_cdf(t, rho))


def test_the_exact_distribution_has_the_exact_mean() -> None:
    """The formula that the simulation is held against, against Pollaczek–Khinchine: E[W] is the integral of P(W > t)."""
    for rho in (0.3, 0.5, 0.8):
        step = 1 / 256
        tail = [1 - md1_wait_cdf((i + 0.5) * step, rho) for i in range(30 * 256)]
        assert sum(tail) * step == pytest.approx(md1_mean_wait(rho), rel=2e-3)


def test_batch_means_interval_covers_the_mean(md1: tuple[float, int, list[PolicyResult]]) -> None:
    """The report's own 95 % interval: a binomial of 20 seeds at 95 % has 15 or fewer with probability 0.3 %."""
    rho, service, runs = md1
    covered = known = 0
    for result in runs:
        queue = result.summary.queue
        if queue.mean_ci95_s is not None:
            known += 1
            covered += abs(queue.mean_s * PS_PER_S / service - md1_mean_wait(rho)) <= queue.mean_ci95_s * PS_PER_S / service
    assert known and covered >= 0.75 * known
