"""A candidate's search and what follows from it, as an `Option`."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvsim.api import resolve_path
from kvsim.deployment import deployment_lines
from kvsim.errors import KvsimError
from kvsim.model import load_model
from kvsim.planning.binding import binding
from kvsim.planning.candidates import Candidate, engine_block, why_unfit
from kvsim.planning.economics import economics
from kvsim.planning.evidence import GOODPUT, Criterion, Evidence, State
from kvsim.planning.result import BasisEntry, LedgerEntry, Option, Probe
from kvsim.planning.search import Found, Search
from kvsim.planning.spec import PlanSpec
from kvsim.planning.traffic import Traffic
from kvsim.planning.trial import Trial


class Job(NamedTuple):
    """A candidate to be searched."""

    candidate: Candidate
    traffic: Traffic
    criteria: tuple[Criterion, ...]
    slo: tuple[tuple[str, float], ...]
    spec: PlanSpec


def search_option(job: Job) -> Option:
    """The candidate's answer, or the reason why there is none."""
    reason = why_unfit(job.candidate, job.spec.min_quality_frac)
    if reason is not None:
        return _bare(job.candidate, reason=reason)
    needs_gaps = any(criterion.metric == "itl" for criterion in job.criteria)
    try:
        trial = Trial(job.candidate, job.traffic, needs_gaps=needs_gaps)
        found = Search(trial, job.criteria, dict(job.slo), job.spec.max_requests, job.spec.tolerance_frac).find()
    except KvsimError as error:  # a request that the deployment cannot serve
        return _bare(job.candidate, reason=str(error))
    probes = tuple(found.evidence[rate].probe() for rate in sorted(found.evidence))
    if found.rate_per_s is None:
        lowest = found.evidence[min(found.evidence)]
        return _bare(
            job.candidate, reason=_why_missed(lowest), probes=probes, failing_rate_per_s=found.failing_rate_per_s,
            capacity_per_s=found.capacity.rate_per_s,
        )  # fmt: skip
    return _answer(job, trial, found, probes)


def _bare(candidate: Candidate, **fields: Any) -> Option:
    return Option(
        name=candidate.name, gpu=candidate.gpu.name, tensor_parallel=candidate.tensor_parallel, policy=candidate.policy,
        policy_description=candidate.policy_description, engine=dict(engine_block(candidate)), quality=candidate.quality,
        flags=_flags(candidate),
        **fields,
    )  # fmt: skip


def _flags(candidate: Candidate) -> tuple[str, ...]:
    """The command that deploys it, with a comment for what no released engine has."""
    scenario = candidate.scenario
    (policies,) = scenario.policies.values()
    model = load_model(resolve_path(scenario.model, scenario.base_dir))
    return deployment_lines(scenario.engine, model, scenario.tensor_parallel, scenario.weight_dtype, policies)


def _answer(job: Job, trial: Trial, found: Found, probes: tuple[Probe, ...]) -> Option:
    candidate, rate = job.candidate, found.rate_per_s
    assert rate is not None
    sample = max(found.evidence[rate].samples, key=lambda sample: sample.num_requests)
    failing = found.evidence.get(found.failing_rate_per_s)
    pressed = None if failing is None else max(failing.samples, key=lambda sample: sample.num_requests)
    mean_tokens = job.traffic.mean_prompt_tokens + job.traffic.mean_output_tokens / 2
    bound = binding(trial.deployment, trial.plan, sample, pressed, rate, found.capacity, mean_tokens)
    money = economics(
        rate, job.spec.target_rate_per_s, candidate.tensor_parallel, job.traffic.mean_output_tokens,
        candidate.price_per_gpu_hour, candidate.gpu.board_power_w,
    )  # fmt: skip
    probe = next(probe for probe in probes if probe.rate_per_s == rate)
    total_s = sum(sample.op_s.values()) or 1.0
    return _bare(
        candidate, rate_per_s=rate, failing_rate_per_s=found.failing_rate_per_s, capacity_per_s=found.capacity.rate_per_s,
        binds=bound.binds, **money._asdict(), output_tokens_per_s=probe.output_tokens_per_s, probes=probes,
        ledger=tuple(LedgerEntry(name=line.name, num_bytes=line.num_bytes, note=line.note) for line in sample.ledger),
        op_share_frac={op: op_s / total_s for op, op_s in sorted(sample.op_s.items(), key=lambda item: (-item[1], item[0]))},
        resource_share_frac=bound.share_frac,
        basis=tuple(
            BasisEntry(op=b.op, share_frac=b.share_frac, source=b.source, bias_low=b.bias_low, bias_high=b.bias_high)
            for b in sample.basis
        ),
        notes=(*_search_notes(found, failing), *bound.notes, *sample.notes),
    )  # fmt: skip


def _search_notes(found: Found, failing: Evidence | None) -> list[str]:
    assert found.rate_per_s is not None
    notes = []
    if found.by_capacity:
        notes.append("the failing rate is the engine's throughput with a queue always there: beyond it the queue grows without end")
    elif failing is not None:
        notes.append(f"at {failing.rate_per_s:.4g} requests/s {_missed(failing)}")
    width = found.failing_rate_per_s / found.rate_per_s - 1
    open_rates = [rate for rate in found.evidence if found.is_between(rate)]
    if open_rates:
        most = max(found.evidence[rate].num_requests for rate in open_rates)
        notes.append(
            f"between the two rates, {width:.0%} apart, {most:,} requests could not tell met from missed: "
            "plan.max_requests buys a narrower bracket"
        )
    return notes


def _missed(evidence: Evidence) -> str:
    """The tightest condition of a rate in words."""
    if any(sample.overloaded for sample in evidence.samples) and evidence.margin() > 0:
        return "the queue grows as long as requests arrive"
    criterion = evidence.tightest()
    if criterion.key == GOODPUT:
        return f"goodput is {evidence.judged()[GOODPUT].value:.1%}, below {criterion.share:.1%}"
    value_s = evidence.latency_s()[criterion.key]
    return f"{criterion.key} is {value_s:.3g}, limit {evidence.slo[criterion.key]:g}"


def _why_missed(evidence: Evidence) -> str:
    if evidence.state() is State.OPEN:
        return (
            f"no rate was surely found to meet the SLO: even at {evidence.rate_per_s:.3g} requests/s {evidence.num_requests:,} requests "
            f"cannot tell, {_missed(evidence)}; plan.max_requests buys more"
        )
    return f"no rate was found to meet the SLO: even at {evidence.rate_per_s:.3g} requests/s {_missed(evidence)}"
