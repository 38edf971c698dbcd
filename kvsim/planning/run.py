"""`kvsim plan` from a scenario to a `PlanResult`: search every candidate, rank, and look closer at the best."""

from __future__ import annotations

from math import ceil, inf

from kvsim.api import versions
from kvsim.planning.candidates import Candidate, candidates
from kvsim.planning.evidence import criteria
from kvsim.planning.option import Job, search_option
from kvsim.planning.result import Option, PlanResult
from kvsim.planning.robustness import World, meets, robust_rate
from kvsim.planning.sensitivity import BASE, Question, answer, cases, tornado
from kvsim.planning.spec import PlanScenario
from kvsim.planning.summary import general_notes, sentences
from kvsim.planning.traffic import Traffic
from kvsim.planning.trial import span_needed_s
from kvsim.planning.workers import Told, Workers

LEAST_REQUESTS, MOST_REQUESTS = 1000, 4000
"""Of a re-simulation under drawn errors or a changed input."""
SOMEWHAT_LOWER = 0.9


def plan(scenario: PlanScenario, draws: int = 20, seeds: int = 5, jobs: int = 1, told: Told | None = None) -> PlanResult:
    """Answers a plan. draws, seeds: of the re-simulations that robust rates rest on; draws 0 leaves them out.

    The same for any number of jobs. Raises InputError for what is wrong whatever the candidate.
    """
    assert draws >= 0 and seeds > 0 and jobs > 0
    spec = scenario.plan
    traffic = Traffic(scenario.workload, scenario.base_dir)
    by_name = {candidate.name: candidate for candidate in candidates(scenario, traffic.mean_prompt_tokens)}
    conditions, slo = criteria(scenario.slo, spec.min_goodput_frac), tuple(scenario.slo.items())
    with Workers(jobs, told) as workers:
        jobs_of = [(Job(candidate, traffic, conditions, slo, spec),) for candidate in by_name.values()]
        options = sorted(workers.map("candidates", search_option, jobs_of), key=rank)
        best = [option for option in options if option.reason is None]
        closer = {option.name: option for option in options}
        if draws:
            for option in best[: spec.robust_options]:
                closer[option.name] = _robust(workers, option, by_name[option.name], jobs_of[0][0], draws, seeds)
        for option in best[: spec.sensitivity_options]:
            closer[option.name] = _sensitive(workers, closer[option.name], by_name[option.name], jobs_of[0][0])
    options = list(closer.values())
    return PlanResult(
        title=scenario.name or f"{scenario.model} at {spec.target_rate_per_s:g} requests/s",
        summary=sentences(options, spec, dict(scenario.slo), draws), scenario=scenario.model_dump(mode="json"),
        target_rate_per_s=spec.target_rate_per_s, slo=dict(scenario.slo), min_goodput_frac=spec.min_goodput_frac,
        min_quality_frac=spec.min_quality_frac, currency=spec.currency, options=tuple(options), num_draws=draws,
        seeds=tuple(traffic.seed(number) for number in range(seeds)), versions=versions(),
        notes=(*traffic.notes(), *general_notes(spec)),
    )  # fmt: skip


def rank(option: Option) -> tuple[bool, float, float, float, str]:
    """Those that can be deployed first, by cost, then GPUs, then the rate of a replica."""
    if option.reason is not None:
        return True, 0.0, 0.0, 0.0, ""  # in the plan's order
    cost = inf if option.cost_per_hour is None else option.cost_per_hour
    return False, cost, option.num_gpus or 0, -(option.rate_per_s or 0.0), option.name


def _num_requests(option: Option, traffic: Traffic) -> int:
    """Requests of one re-simulation: enough to see a load a little below the rate found, where robust rates lie."""
    assert option.rate_per_s is not None and option.capacity_per_s is not None
    if not traffic.is_random:
        return traffic.num_requests
    probe = next(probe for probe in option.probes if probe.rate_per_s == option.rate_per_s)
    rate = SOMEWHAT_LOWER * option.rate_per_s
    needed = rate * span_needed_s(rate, option.capacity_per_s, (probe.mean_in_system or 0.0) / probe.rate_per_s)
    return min(max(LEAST_REQUESTS, ceil(needed)), MOST_REQUESTS)


def _robust(workers: Workers, option: Option, candidate: Candidate, job: Job, draws: int, seeds: int) -> Option:
    number = _num_requests(option, job.traffic)
    worlds = [
        World(candidate, job.traffic, job.criteria, job.slo, draw, draw % seeds, number) for draw in range(draws)
    ]
    assert option.rate_per_s is not None
    what = f"drawn errors, {option.name}"
    outcome = robust_rate(worlds, option.rate_per_s, lambda asked: workers.map(what, meets, asked))
    rate = outcome.robust_rate_per_s
    notes = option.notes
    if rate is None:
        notes = (*notes, "no rate held in 95 % of the re-simulations under drawn calibration errors: do not build on this option")
    return option.model_copy(update={
        "robust_rate_per_s": rate, "share_met_frac": outcome.share_met_frac, "notes": notes,
        "robust_replicas": None if rate is None else max(1, ceil(job.spec.target_rate_per_s / rate - 1e-9)),
    })  # fmt: skip


def _sensitive(workers: Workers, option: Option, candidate: Candidate, job: Job) -> Option:
    assert option.rate_per_s is not None
    pairs = cases(candidate, job.traffic, option.basis)
    number = _num_requests(option, job.traffic)
    asked = [
        (Question(candidate, job.traffic, job.criteria, job.slo, option.rate_per_s, number, case),) for case in (BASE, *pairs)
    ]
    base, *rates = workers.map(f"sensitivity, {option.name}", answer, asked)
    return option.model_copy(update={"sensitivity": tornado(option.rate_per_s, base, pairs, rates)})
