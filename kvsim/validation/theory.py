"""Closed forms that hold whatever the hardware: queueing laws on the real engines, conservation of time, roofline bounds.

With one sequence at a time and constant service an engine is an M/D/1 queue; with lengths that differ an M/G/1 queue; with clients
that wait for answers a closed queue. Service times are the simulator's own, measured on an idle engine, so that each law
stands alone. The limit of a random row is three standard errors over independent seeds; of an exact one, rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, factorial, floor
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from kvsim.api import simulate
from kvsim.hardware import load_gpu
from kvsim.model import load_model
from kvsim.result import PolicyResult
from kvsim.scenario import parse_scenario
from kvsim.units import PS_PER_S
from kvsim.validation.cases import Bar, Row

NAME = "theory"
GPU, MODEL = "l4-24gb", "qwen3-8b"
FIXED = {"kind": "fixed", "prompt_tokens": 100, "output_tokens": 5}
UNIFORM = {"kind": "uniform", "prompt_min_tokens": 50, "prompt_max_tokens": 900, "output_min_tokens": 1, "output_max_tokens": 60}
ENGINES: dict[str, dict[str, Any]] = {
    "vllm_v1": {
        "kind": "vllm_v1", "max_num_seqs": 1, "max_num_batched_tokens": 1024, "enable_prefix_caching": False, "front_end_s": 0,
    },
    "vllm_v0": {"kind": "vllm_v0", "max_num_seqs": 1, "max_model_len": 2048, "front_end_s": 0},
    "huggingface": {"kind": "huggingface", "batch_size": 1},
}  # fmt: skip
"""A front end is a delay that no law here asks about."""
NUM_SEEDS, NUM_REQUESTS, WARMUP = 20, 2000, 300
OVERLOAD = 1.7
EXACT = 1e-9
"""Of laws that hold request by request: floating point."""
PERIOD_LIMIT = 0.02
"""Of a rate over 200 requests, which are no whole number of rounds of all clients."""


class Law(NamedTuple):
    """A row, how far it is off, and how far it may be."""

    row: Row
    off: float
    limit: float


def _serve(engine: str, workload: dict[str, Any], seed: int = 0) -> PolicyResult:
    scenario = {
        "gpu": GPU, "model": MODEL, "profile": "datasheet", "engine": ENGINES[engine], "policies": {"p": []},
        "workload": {"lengths": FIXED, "seed": seed, **workload},
    }  # fmt: skip
    return simulate(parse_scenario(scenario)).policies["p"]


def service_s(engine: str) -> float:
    """What an idle engine takes for one request of fixed lengths."""
    return _serve(engine, {"arrivals": {"kind": "all_at_once"}, "num_requests": 1}).summary.e2e.mean_s


def md1_mean_wait(rho: float) -> float:
    """Pollaczek-Khinchine with constant service, in service times."""
    return rho / (2 * (1 - rho))


def md1_wait_cdf(wait: float, rho: float) -> float:
    """P(W <= wait), wait in service times: Erlang 1909 (Crommelin's finite sum for one server)."""
    terms = ((rho * (k - wait)) ** k / factorial(k) * exp(rho * (wait - k)) for k in range(floor(wait) + 1))
    return (1 - rho) * sum(terms)


def _random(group: str, case: str, metric: str, truth: float, values: list[float], source: str) -> Law:
    row = Row(NAME, group, case, metric, truth, fmean(values), source)
    return Law(row, abs(row.error), 3 * stdev(values) / len(values) ** 0.5 / truth)


def _exact(group: str, case: str, metric: str, truth: float, value: float, source: str) -> Law:
    row = Row(NAME, group, case, metric, truth, value, source)
    return Law(row, abs(row.error), EXACT)


def _md1(engine: str, rho: float, num_seeds: int) -> list[Law]:
    service, source = service_s(engine), "Pollaczek-Khinchine; Erlang 1909"
    poisson = {"arrivals": {"kind": "poisson", "rate_per_s": rho / service}, "num_requests": NUM_REQUESTS, "warmup_requests": WARMUP}
    runs = [_serve(engine, poisson, seed).summary for seed in range(num_seeds)]
    group, wait = f"M/D/1, {engine}", md1_mean_wait(rho)
    inside = [run.mean_in_system_requests for run in runs]
    at_p90 = [md1_wait_cdf(run.queue.p90_s / service, rho) for run in runs]
    return [
        _random(group, f"load {rho:g}: mean wait", "services", wait, [run.queue.mean_s / service for run in runs], source),
        _random(group, f"load {rho:g}: rank of the 90th percentile", "share", 0.9, at_p90, source),
        _random(group, f"load {rho:g}: busy share", "share", rho, [run.utilisation_frac for run in runs], "utilisation law"),
        _random(group, f"load {rho:g}: mean number inside", "requests", rho + rho * wait, inside, source),
    ]  # fmt: skip


def _mg1(engine: str, num_seeds: int) -> list[Law]:
    """Lengths that differ. Moments of service are those of the very requests served, so that only arrivals are random."""
    rho, waits, expected = 0.6, [], []
    mean_s = _moments(_serve(engine, {"arrivals": {"kind": "all_at_once"}, "lengths": UNIFORM, "num_requests": 2000}))[0]
    for seed in range(num_seeds):
        arrivals = {"kind": "poisson", "rate_per_s": rho / mean_s}
        run = _serve(engine, {"arrivals": arrivals, "lengths": UNIFORM, "num_requests": NUM_REQUESTS, "warmup_requests": WARMUP}, seed)
        first, second = _moments(run)
        rate = rho / mean_s
        waits.append(run.summary.queue.mean_s)
        expected.append(rate * second / (2 * (1 - rate * first)))
    return [_random(f"M/G/1, {engine}", "load 0.6: mean wait", "s", fmean(expected), waits, "Pollaczek-Khinchine")]


def _moments(run: PolicyResult) -> tuple[float, float]:
    """Mean and mean square of the service times, in seconds."""
    rows = run.log.request_columns()
    service = (rows["finish_ps"] - rows["scheduled_ps"]) / PS_PER_S
    return float(service.mean()), float((service**2).mean())


def _deterministic(engine: str) -> list[Law]:
    """D/D/1 beyond load 1, Little's law and conservation of time on a random run, and a closed loop with think time."""
    service = service_s(engine)
    run = _serve(engine, {"arrivals": {"kind": "constant", "rate_per_s": OVERLOAD / service}, "num_requests": 60})
    rows = run.log.request_columns()
    waits = (rows["scheduled_ps"] - rows["arrival_ps"])[np.argsort(rows["index"])] / PS_PER_S
    wait = 59 * (1 - 1 / OVERLOAD)
    last = float(waits[-1]) / service
    found = [_exact(f"D/D/1, {engine}", f"load {OVERLOAD:g}: wait of the last", "services", wait, last, "W = n (S - A)")]
    poisson = {"arrivals": {"kind": "poisson", "rate_per_s": 0.8 / service}, "num_requests": 500}
    busy = _serve(engine, poisson)
    summary = busy.summary
    found.append(_exact(
        f"Little's law, {engine}", "number inside = rate x time inside", "requests", summary.arrival_rate_times_e2e_requests,
        summary.mean_in_system_requests, "Little 1961",
    ))  # fmt: skip
    total = summary.utilisation_frac * summary.duration_s
    found.append(_exact(f"conservation, {engine}", "time by Op adds up to busy time", "s", total, sum(summary.op_s.values()), "identity"))
    for clients, think in ((1, 2.0), (4, 8.0), (6, 1.0)):
        loop = {"kind": "closed_loop", "clients": clients, "think_time_s": think * service}
        finish = _serve(engine, {"arrivals": loop, "num_requests": 400}).log.request_columns()["finish_ps"]
        steady = np.sort(finish)[200:] / PS_PER_S
        rate = float((len(steady) - 1) / (steady[-1] - steady[0])) * service
        found.append(_exact(
            f"closed queue, {engine}", f"{clients} clients, think time {think:g} services", "requests a service",
            min(clients / (think + 1), 1.0), rate, "asymptotic bounds; Lazowska 1984, chapter 5",
        )._replace(limit=PERIOD_LIMIT))  # fmt: skip
    return found


def _roofline() -> list[Law]:
    """A decode step cannot be quicker than its weights and cache at the datasheet's bandwidth, nor a prefill than its FLOPs."""
    gpu, model = load_gpu(GPU), load_model(MODEL)
    found = []
    for batch, prompt in ((1, 512), (8, 1024), (16, 256)):
        engine = {**ENGINES["vllm_v1"], "max_num_seqs": batch, "max_num_batched_tokens": 8192}
        lengths = {"kind": "fixed", "prompt_tokens": prompt, "output_tokens": 64}
        scenario = {
            "gpu": GPU, "model": MODEL, "profile": "datasheet", "engine": engine, "policies": {"p": []},
            "workload": {"arrivals": {"kind": "all_at_once"}, "lengths": lengths, "num_requests": batch},
        }  # fmt: skip
        summary = simulate(parse_scenario(scenario)).policies["p"].summary
        # The embedding table is looked up, not read.
        weights = model.weight_bytes() - 2 * model.vocab_size * model.hidden_size
        least = (weights + batch * prompt * model.kv_bytes_per_token()) / gpu.hbm_bandwidth_bytes_per_s
        found.append(_at_least(f"TPOT, batch {batch}, {prompt} tokens", least, summary.tpot.mean_s))
        flops = 2.0 * batch * prompt * sum(g.n * g.k for g in model.gemms()) * model.num_layers
        found.append(_at_least(f"prefill, batch {batch}, {prompt} tokens", flops / gpu.peak_flops("bf16"), summary.ttft.max_s))
    return found


def _at_least(case: str, bound_s: float, simulated_s: float) -> Law:
    """The bound stands as truth; being slower is no error."""
    row = Row(NAME, "roofline bounds", case, "s", bound_s, simulated_s, "datasheet")
    return Law(row, max(0.0, bound_s / simulated_s - 1), EXACT)


def laws(quick: bool = False) -> list[Law]:
    """quick: fewer seeds, and of the random laws one engine."""
    seeds = 5 if quick else NUM_SEEDS
    parts: list[Callable[[], list[Law]]] = [lambda: _md1("vllm_v1", 0.5, seeds), lambda: _mg1("vllm_v1", seeds)]
    if not quick:
        parts += [lambda: _md1("vllm_v1", 0.8, seeds), lambda: _md1("vllm_v0", 0.7, seeds), lambda: _md1("huggingface", 0.7, seeds)]
    parts += [lambda engine=engine: _deterministic(engine) for engine in ENGINES]  # type: ignore[misc]
    return [law for part in [*parts, _roofline] for law in part()]


def bars(found: list[Law]) -> list[Bar]:
    """A bar for each law, over its engines: its worst row, in units of what that row may be off."""
    groups: dict[str, list[float]] = {}
    for law in found:
        groups.setdefault(law.row.group.partition(",")[0], []).append(law.off / law.limit)
    text = "largest error over what it may be (three standard errors, or rounding)"
    return [Bar(NAME, f"{name}: {text}", max(sizes), 1.0) for name, sizes in groups.items()]
