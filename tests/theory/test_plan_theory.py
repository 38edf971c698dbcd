"""The rate that a plan finds, where theory knows it: one sequence at a time with constant service is an M/D/1 queue."""

from __future__ import annotations

from math import exp, factorial, floor
from pathlib import Path
from typing import Any

import pytest
from audit import HERE, TINY, make, run
from scipy.optimize import brentq

from kvsim.planning.candidates import candidates
from kvsim.planning.evidence import criteria
from kvsim.planning.search import Found, Search
from kvsim.planning.spec import PlanScenario, parse_plan
from kvsim.planning.traffic import Traffic
from kvsim.planning.trial import Trial
from kvsim.units import PS_PER_S

LENGTHS = {"kind": "fixed", "prompt_tokens": 100, "output_tokens": 5}
ENGINE = {"kind": "vllm_v1", "front_end_s": 0, "max_num_seqs": 1, "max_num_batched_tokens": 128}


def service_s() -> float:
    """What an idle engine takes for a request."""
    workload = {"arrivals": {"kind": "all_at_once"}, "lengths": LENGTHS, "num_requests": 1}
    requests = run(make(engine=ENGINE, workload=workload)).log.request_columns()
    return int(requests["finish_ps"][0]) / PS_PER_S


def md1_wait_cdf(wait: float, rho: float) -> float:
    """P(W <= wait), wait in service times: Erlang 1909 (Crommelin's finite sum for one server)."""
    terms = ((rho * (k - wait)) ** k / factorial(k) * exp(rho * (wait - k)) for k in range(floor(wait) + 1))
    return (1 - rho) * sum(terms)


def tiny_plan(slo: dict[str, float], arrivals: dict[str, Any], **plan: Any) -> PlanScenario:
    data = {
        "gpu": "l4", "model": str(HERE / TINY), "engine": ENGINE, "policies": {"full": []}, "slo": slo,
        "workload": {"arrivals": arrivals, "lengths": LENGTHS, "num_requests": 1000},
        "plan": {"target_rate_per_s": 1000, **plan},
    }  # fmt: skip
    return parse_plan(data, Path(HERE))


def search(scenario: PlanScenario) -> Found:
    traffic = Traffic(scenario.workload, scenario.base_dir)
    (candidate,) = candidates(scenario, traffic.mean_prompt_tokens)
    spec = scenario.plan
    conditions = criteria(scenario.slo, spec.min_goodput_frac)
    return Search(Trial(candidate, traffic), conditions, dict(scenario.slo), spec.max_requests, spec.tolerance_frac).find()


POISSON = {"kind": "poisson", "rate_per_s": 1}


SLOW = [pytest.param("queue_p90_s", 0.9, 1.5, marks=pytest.mark.slow), pytest.param("queue_mean_s", None, 0.5, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("key", "share", "wait"), [("ttft_p50_s", 0.5, 0.1), *SLOW])
def test_the_rate_found_is_that_of_md1(key: str, share: float | None, wait: float) -> None:
    """The load at which a share of waits (or their mean) is just within the limit, to 2 %; the bracket holds it."""
    service = service_s()
    # Pollaczek and Khinchine say of the mean: rho / (2 (1 - rho)) = wait.
    load = 2 * wait / (1 + 2 * wait) if share is None else brentq(lambda rho: md1_wait_cdf(wait, rho) - share, 0.01, 0.99)
    workload = {"arrivals": {"kind": "all_at_once"}, "lengths": LENGTHS, "num_requests": 1}
    alone = run(make(engine=ENGINE, workload=workload)).summary.ttft.p50_s if key.startswith("ttft") else 0.0
    found = search(tiny_plan({key: alone + wait * service}, POISSON, max_requests=66_000 if key == "ttft_p50_s" else 260_000))
    assert found.rate_per_s is not None
    assert found.capacity.rate_per_s * service == pytest.approx(1.0, rel=0.005)
    assert found.rate_per_s * service == pytest.approx(load, rel=0.02)
    assert found.rate_per_s < 1.003 * load / service and found.failing_rate_per_s > 0.997 * load / service


def test_equal_gaps_are_borne_up_to_the_service_rate() -> None:
    """D/D/1: nobody waits up to load 1, and beyond it the queue grows. Very near 1 a verdict would need longer runs."""
    service = service_s()
    found = search(tiny_plan({"queue_p99_s": 0.5 * service}, {"kind": "constant", "rate_per_s": 1}))
    assert found.rate_per_s is not None
    assert 0.92 < found.rate_per_s * service < 1.0 <= found.failing_rate_per_s * service * 1.001


def test_no_latency_limit_lets_a_queue_grow_without_end() -> None:
    """TPOT does not know of queues: only the engine's throughput ends the search, and no rate at or beyond it is given."""
    service = service_s()
    found = search(tiny_plan({"tpot_p99_s": 1.0}, POISSON, max_requests=4000))
    assert found.by_capacity and found.failing_rate_per_s * service == pytest.approx(1.0, rel=0.005)
    assert found.rate_per_s is not None and found.rate_per_s < found.failing_rate_per_s


def test_a_trace_is_compressed_in_time(tmp_path: Path) -> None:
    """Pairs that arrive together, a pair each P seconds: the second waits one service, so p99 <= 1.5 services holds until
    pairs meet, at P = 2 services less what the limit allows: the third of two pairs waits 2 S - P more."""
    rows = "".join(f"{second},100,5\n{second},100,5\n" for second in range(300))
    (tmp_path / "pairs.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    service = service_s()
    scenario = tiny_plan({"queue_p50_s": 0.5 * service}, POISSON).model_dump(mode="json", exclude_unset=True)
    scenario["workload"] = {"trace": {"path": "pairs.csv", "format": "csv"}}
    found = search(parse_plan(scenario, tmp_path))
    assert found.rate_per_s is not None
    # Up to two requests in two services nobody meets an earlier pair; half of all wait nothing, so the median is met until then.
    assert found.rate_per_s * service == pytest.approx(1.0, rel=0.02)
