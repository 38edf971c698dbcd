"""A scenario's traffic at any rate, burstiness and length: the same requests, so that what is compared shares its luck."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from kvsim.arrivals import AllAtOnce, ClosedLoopArrivals, Constant, Gamma, Poisson
from kvsim.errors import InputError
from kvsim.requests import OpenLoop, Request, RequestSource
from kvsim.traces import Trace
from kvsim.units import PS_PER_S
from kvsim.workload import WorkloadConfig, build_source

MEAN_OVER_REQUESTS = 50_000
"""Draws behind the mean lengths of random traffic: to 0.4 % where the standard deviation is the mean."""
MAX_SEED = 2**63 - 1


class Change(NamedTuple):
    """What a sensitivity run changes in the traffic. burstiness: shape of gamma gaps, None as it is."""

    prompt_x: float = 1.0
    output_x: float = 1.0
    burstiness: float | None = None


AS_IT_IS = Change()


class Traffic:
    """The workload of a plan. Raises InputError for one that has no rate.

    Attributes:
        is_random: arrivals and lengths are drawn, so that more requests and other seeds say more.
        rate_per_s: of the scenario itself.
        mean_prompt_tokens, mean_output_tokens: of a request.
    """

    def __init__(self, config: WorkloadConfig, base_dir: Path) -> None:
        self.config, self.base_dir = config, base_dir
        self.is_random = config.trace is None
        if isinstance(config.arrivals, ClosedLoopArrivals | AllAtOnce):
            raise InputError(
                "workload.arrivals.kind", config.arrivals.kind, "has no request rate that a plan could vary",
                "use poisson, gamma, constant or a trace",
            )  # fmt: skip
        if self.is_random:
            sample = config.model_copy(update={"num_requests": MEAN_OVER_REQUESTS})
            requests = list(islice(sample.requests(base_dir), MEAN_OVER_REQUESTS))
            self.rate_per_s = float(getattr(config.arrivals, "rate_per_s", 0.0))
        else:
            requests = list(config.requests(base_dir))
            self.rate_per_s = _trace_rate(requests, config)
        self.num_requests = len(requests) if not self.is_random else config.num_requests or 0
        self.mean_prompt_tokens = sum(r.prompt_tokens for r in requests) / len(requests)
        self.mean_output_tokens = sum(r.output_tokens for r in requests) / len(requests)
        self.has_prefixes = any(request.prefix_hashes for request in requests)

    def seed(self, number: int) -> int:
        """The number-th seed after the scenario's own."""
        return (self.config.seed + number) % (MAX_SEED + 1)

    def at(self, rate_per_s: float, seed: int, num_requests: int, change: Change = AS_IT_IS) -> WorkloadConfig:
        """The workload at another rate: gaps between arrivals shrink in proportion, lengths stay. A trace keeps its length."""
        config = self.config
        if config.trace is not None:
            scale = config.trace.rate_scale * rate_per_s / self.rate_per_s
            limit = num_requests if num_requests < self.num_requests else config.trace.limit
            trace = config.trace.model_copy(update={"rate_scale": scale, "limit": limit})
            return config.model_copy(update={"trace": trace, "warmup_requests": 0})
        arrivals = config.arrivals
        assert isinstance(arrivals, Poisson | Gamma | Constant)
        if change.burstiness is not None:
            changed: Poisson | Gamma | Constant = Gamma(rate_per_s=rate_per_s, burstiness=change.burstiness)
        else:
            changed = arrivals.model_copy(update={"rate_per_s": rate_per_s})
        update = {"arrivals": changed, "seed": seed, "num_requests": num_requests, "warmup_requests": 0}
        return config.model_copy(update=update)

    def source(self, workload: WorkloadConfig, change: Change) -> RequestSource:
        """The requests of `at`, their lengths scaled as the change says."""
        if change.prompt_x == change.output_x == 1.0:
            return build_source(workload, self.base_dir)
        if workload.trace is None:
            return OpenLoop(_scaled(workload.requests(self.base_dir), change))
        trace = Trace(workload.trace, self.base_dir)
        return OpenLoop(_scaled(trace.requests(), change), trace.hash_block_tokens, trace.notes)

    def notes(self) -> list[str]:
        """How the rate is varied."""
        config = self.config
        if config.trace is not None:
            return [
                f"another rate is the same {self.num_requests:,} requests of the trace with its time axis compressed or stretched: "
                "bursts keep their shape and become denser",
                "the trace is taken as the traffic, whole, so verdicts have no sampling error and other seeds change nothing",
            ]
        if isinstance(config.arrivals, Gamma):
            return ["another rate is the same gamma arrivals with every gap shorter or longer: burstiness stays"]
        if isinstance(config.arrivals, Constant):
            return ["arrivals are evenly spaced: real traffic is not, and bears a lower rate"]
        return ["another rate is the same Poisson arrivals with every gap shorter or longer"]


def _trace_rate(requests: list[Request], config: WorkloadConfig) -> float:
    """Mean requests per second of a trace."""
    assert config.trace is not None
    if len(requests) <= config.warmup_requests:
        raise InputError("workload.warmup_requests", config.warmup_requests, f"must be below the trace's {len(requests)} requests")
    span_ps = requests[-1].arrival_ps - requests[0].arrival_ps
    if not span_ps:
        rule = "must have requests that arrive at more than one time, for a plan to vary their rate"
        raise InputError("workload.trace.path", config.trace.path, rule)
    return (len(requests) - 1) / (span_ps / PS_PER_S)


def _scaled(requests: Iterator[Request], change: Change) -> Iterator[Request]:
    """Lengths times the change's factors, whole and at least 1; prompts with hashes keep theirs."""
    for request in requests:
        prompt_x = 1.0 if request.prefix_hashes else change.prompt_x
        yield Request(
            request.index, request.arrival_ps, max(1, round(request.prompt_tokens * prompt_x)),
            max(1, round(request.output_tokens * change.output_x)),
            min(request.cached_prompt_tokens, max(1, round(request.prompt_tokens * prompt_x))), request.prefix_hashes,
        )  # fmt: skip
