"""How the rate moves when one uncertain input is at either end of its band and all others stay: a tornado.

Both ends are found at face value with the same requests, and so is the rate in between; what is told is the rate found times their
ratio, in which the luck of those requests cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, log, sqrt
from typing import Literal, NamedTuple

from kvsim.arrivals import Gamma, Poisson
from kvsim.errors import DoesNotFitError, KvsimError
from kvsim.planning.candidates import Candidate, resources
from kvsim.planning.evidence import Criterion, Evidence
from kvsim.planning.result import BasisEntry, Sensitivity
from kvsim.planning.traffic import AS_IT_IS, Change, Traffic
from kvsim.planning.trial import Trial
from kvsim.profile import log_bias_at

LENGTH_X = 1.2
"""Lengths are tried a fifth longer and shorter: a convention, since only the user knows how sure they are."""
BURST_X = 2.0
"""Arrivals are tried with half and twice the squared coefficient of variation of their gaps."""
MEMORY_STEP = 0.03
"""Of gpu_memory_utilization: what other processes and graphs commonly take or leave."""
LEAST_SHARE_FRAC = 0.02
"""Of time: Ops below it cannot matter."""
TOLERANCE_FRAC = 0.015
STEP = 1.15
"""Between rates tried while looking for the first on the other side."""
MOST_STEPS = 20


class Case(NamedTuple):
    """One end of one input. side: of the band; bias_kind: Op kind whose calibration is at its 16 % or 84 % quantile."""

    name: str
    side: Literal["base", "low", "high"]
    shown: str
    bias_kind: str | None = None
    change: Change = AS_IT_IS
    memory_utilization: float | None = None


class Question(NamedTuple):
    """A case of a candidate; rate_per_s: where to start."""

    candidate: Candidate
    traffic: Traffic
    criteria: tuple[Criterion, ...]
    slo: tuple[tuple[str, float], ...]
    rate_per_s: float
    num_requests: int
    case: Case


BASE = Case("", "base", "")


def cases(candidate: Candidate, traffic: Traffic, basis: Sequence[BasisEntry]) -> list[Case]:
    """Low and high end of each input, in pairs."""
    found: list[Case] = []
    shares: dict[str, float] = {}
    for entry in basis:
        kind = "policy" if ":" in entry.op else entry.op
        shares[kind] = shares.get(kind, 0.0) + entry.share_frac
    for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
        if share >= LEAST_SHARE_FRAC:
            rows = [entry for entry in basis if ("policy" if ":" in entry.op else entry.op) == kind]
            low, high = (sum(getattr(row, name) * row.share_frac for row in rows) / share for name in ("bias_low", "bias_high"))
            found += [Case(f"time of {kind}", "low", f"x {low:.2f}", kind), Case(f"time of {kind}", "high", f"x {high:.2f}", kind)]
    for name, field in (("output length", "output_x"), ("prompt length", "prompt_x")):
        if name == "prompt length" and traffic.has_prefixes:
            continue
        for side, factor in (("low", 1 / LENGTH_X), ("high", LENGTH_X)):
            found.append(Case(name, side, f"x {factor:.2f}", change=Change(**{field: factor})))  # type: ignore[arg-type]
    arrivals = traffic.config.arrivals
    if isinstance(arrivals, Poisson | Gamma):
        shape = arrivals.burstiness if isinstance(arrivals, Gamma) else 1.0
        for side, value in (("low", shape * BURST_X), ("high", shape / BURST_X)):
            shown = f"gap CV {value**-0.5:.2f}"
            found.append(Case("burstiness of arrivals", side, shown, change=Change(burstiness=value)))  # type: ignore[arg-type]
    share = candidate.scenario.engine.gpu_memory_utilization
    if getattr(candidate.scenario.engine, "num_gpu_blocks", None) is None and share + MEMORY_STEP <= 1:
        for side, value in (("low", share - MEMORY_STEP), ("high", share + MEMORY_STEP)):
            found.append(Case("gpu_memory_utilization", side, f"{value:.2f}", memory_utilization=value))  # type: ignore[arg-type]
    return found


def answer(question: Question) -> float | None:
    """The rate at which the SLO stops to be met, at face value; 0 where the case does not fit, None where it cannot be run."""
    case, candidate = question.case, question.candidate
    if case.memory_utilization is not None:
        engine = candidate.scenario.engine.model_copy(update={"gpu_memory_utilization": case.memory_utilization})
        scenario = candidate.scenario.model_copy(update={"engine": engine})
        candidate = Candidate(**{**candidate.__dict__, "scenario": scenario})
    try:
        factors: dict[tuple[str, str] | str, float] | None = None
        if case.bias_kind is not None:
            probit = -1.0 if case.side == "low" else 1.0
            biases = resources(candidate).deployment.profile.log_biases
            factors = {key: exp(log_bias_at(bias, probit)) for key, bias in biases.items() if key[0] == case.bias_kind}
        needs_gaps = any(criterion.metric == "itl" for criterion in question.criteria)
        trial = Trial(candidate, question.traffic, factors=factors, change=case.change, needs_gaps=needs_gaps)
        return _root(trial, question)
    except DoesNotFitError:
        return 0.0
    except KvsimError:
        return None


def _root(trial: Trial, question: Question) -> float:
    """By steps to the other side and bisection; no rate beyond the throughput with a queue always there."""
    seed = question.traffic.seed(0)
    waits = any(criterion.metric in ("ttft", "queue", "e2e") for criterion in question.criteria)
    capacity = inf if waits else trial.capacity(seed).rate_per_s  # a limit on waiting is missed before the queue grows without end

    def met(rate: float) -> bool:
        if rate >= capacity:
            return False
        sample = trial.run(rate, seed, question.num_requests)
        return Evidence(rate, question.criteria, dict(question.slo), question.traffic.is_random, samples=[sample]).meets()

    rate = min(question.rate_per_s, 0.99 * capacity)
    first = met(rate)
    factor = STEP if first else 1 / STEP
    for _ in range(MOST_STEPS):
        before, rate = rate, rate * factor
        if met(rate) != first:
            break
        factor *= factor if abs(log(factor)) < 0.5 else 1.0
    else:
        return rate
    low, high = (before, min(rate, capacity)) if first else (rate, before)
    while log(high / low) > log(1 + TOLERANCE_FRAC):
        middle = sqrt(low * high)
        low, high = (middle, high) if met(middle) else (low, middle)
    return sqrt(low * high)


def tornado(rate_per_s: float, base: float | None, pairs: Sequence[Case], rates: Sequence[float | None]) -> tuple[Sensitivity, ...]:
    """Rows from the widest to the narrowest; inputs that could not be run are left out."""
    rows = []
    for place in range(0, len(pairs), 2):
        low, high = rates[place], rates[place + 1]
        if base and low is not None and high is not None:
            rows.append(Sensitivity(
                name=pairs[place].name, low_input=pairs[place].shown, high_input=pairs[place + 1].shown,
                rate_at_low_per_s=rate_per_s * low / base, rate_at_high_per_s=rate_per_s * high / base,
            ))  # fmt: skip
    return tuple(sorted(rows, key=lambda row: -abs(row.rate_at_high_per_s - row.rate_at_low_per_s)))
