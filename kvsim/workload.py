"""The traffic of a scenario: its YAML block and the source of requests made from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from kvsim.arrivals import Arrivals, ClosedLoopArrivals
from kvsim.errors import InputError
from kvsim.frozen import Frozen
from kvsim.lengths import Fixed, Lengths
from kvsim.requests import ClosedLoop, OpenLoop, Request, RequestSource
from kvsim.traces import Trace, TraceConfig
from kvsim.units import ps
from kvsim.workload_fields import Count, NonNegativeCount, Pairs


class WorkloadConfig(Frozen):
    """Synthetic traffic (``arrivals``, ``lengths``, ``num_requests``) or recorded traffic (``trace``).

    The first ``warmup_requests`` are simulated but left out of metrics. Arrivals and lengths draw from separate streams
    of ``seed``: another rate leaves the lengths as they were, and more requests leave the first ones as they were.
    """

    arrivals: Arrivals | None = Field(None, description="when requests arrive")
    lengths: Lengths | None = Field(None, description="how long prompts and answers are")
    num_requests: Count | None = Field(None, description="requests to simulate, warm-up included")
    trace: TraceConfig | None = Field(None, description="recorded traffic, in place of the three above")
    warmup_requests: NonNegativeCount = Field(0, description="first requests, simulated but left out of metrics")
    seed: NonNegativeCount = Field(0, le=2**63 - 1, description="of the random numbers; equal seeds give equal requests")

    @model_validator(mode="after")
    def _one_kind_of_traffic(self) -> WorkloadConfig:
        if self.trace is not None:
            given = [name for name in ("arrivals", "lengths", "num_requests") if getattr(self, name) is not None]
            if given:
                fix = "try trace.limit instead" if given == ["num_requests"] else "try leaving one of them out"
                raise ValueError(f"must have either a trace or {' + '.join(given)}, not both; {fix}")
        elif self.arrivals is None or self.lengths is None:
            example = "arrivals: {kind: poisson, rate_per_s: 8}"
            if self.arrivals is not None:
                example = "lengths: {kind: fixed, prompt_tokens: 1024, output_tokens: 128}"
            raise ValueError(f"must have arrivals + lengths + num_requests, or a trace; try {example}")
        elif isinstance(self.arrivals, ClosedLoopArrivals):
            self._check_closed_loop(self.arrivals)
        elif self.num_requests is None:
            raise ValueError("must have num_requests beside arrivals; try num_requests: 2000")
        return self

    def _check_closed_loop(self, loop: ClosedLoopArrivals) -> None:
        if (self.num_requests is None) == (loop.requests_per_client is None):
            raise ValueError("must have one of num_requests and arrivals.requests_per_client; try num_requests: 2000")
        if self.num_requests is not None and self.num_requests < loop.clients:
            raise ValueError(
                f"must have num_requests={self.num_requests} >= arrivals.clients={loop.clients}; try fewer clients"
            )
        if loop.length_range_frac and not isinstance(self.lengths, Fixed):
            raise ValueError("must have lengths of kind fixed with arrivals.length_range_frac; try leaving it out")

    @model_validator(mode="after")
    def _something_after_warmup(self) -> WorkloadConfig:
        most = expected_num_requests(self)
        if most is not None and self.warmup_requests >= most:
            rule = f"must have warmup_requests={self.warmup_requests} below the number of requests, {most}"
            raise ValueError(f"{rule}; try {most // 10}")
        return self

    def requests(self, base_dir: Path = Path()) -> Iterator[Request]:
        """All requests of an open loop, lazily. Raises InputError for a closed loop, which waits for completions."""
        if self.trace is not None:
            return Trace(self.trace, base_dir).requests()
        assert self.arrivals is not None and self.lengths is not None
        if isinstance(self.arrivals, ClosedLoopArrivals):
            rule = "must be an open loop for its requests to be known in advance"
            raise InputError("workload.arrivals.kind", self.arrivals.kind, rule, "use build_source")
        arrivals_rng, lengths_rng = self._generators()
        times_ps, pairs = self.arrivals.times_ps(arrivals_rng), self.lengths.pairs(lengths_rng, base_dir)
        return _requests(self.num_requests or 0, times_ps, pairs)

    def _generators(self) -> list[np.random.Generator]:
        """For arrivals and for lengths."""
        return [np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(self.seed).spawn(2)]

    def closed_loop(self, loop: ClosedLoopArrivals, base_dir: Path) -> ClosedLoop:
        """The source of a closed loop; ``build_source`` calls it."""
        lengths, total = self.lengths, expected_num_requests(self)
        assert lengths is not None and total is not None
        if isinstance(lengths, Fixed) and loop.length_range_frac:
            lengths = lengths.spread(loop.length_range_frac)
        pairs = lengths.pairs(self._generators()[1], base_dir)
        return ClosedLoop(loop.starts_ps(), pairs, ps(loop.think_time_s), total, loop.requests_per_client)

    def describe(self) -> str:
        """One line for reports."""
        if self.trace is not None:
            text = self.trace.describe()
        else:
            assert self.arrivals is not None and self.lengths is not None
            num = f"{expected_num_requests(self)} requests"
            text = f"{self.arrivals.describe()}, {self.lengths.describe()}, {num}, seed {self.seed}"
        return text + (f", the first {self.warmup_requests} as warm-up" if self.warmup_requests else "")


def build_source(config: WorkloadConfig, base_dir: Path) -> RequestSource:
    """A fresh source: the same config gives the same requests each time. Relative paths start from ``base_dir``.

    Raises InputError if a file is missing or not what it should be, and from ``take`` when it comes to a corrupt row.
    """
    if config.trace is not None:
        trace = Trace(config.trace, base_dir)
        return OpenLoop(trace.requests(), trace.hash_block_tokens, trace.notes)
    if isinstance(config.arrivals, ClosedLoopArrivals):
        return config.closed_loop(config.arrivals, base_dir)
    return OpenLoop(config.requests(base_dir))


def expected_num_requests(config: WorkloadConfig) -> int | None:
    """How many requests there will be; of a trace at most ``limit``, and None without one."""
    if config.trace is not None:
        return config.trace.limit
    if isinstance(config.arrivals, ClosedLoopArrivals) and config.arrivals.requests_per_client is not None:
        return config.arrivals.clients * config.arrivals.requests_per_client
    return config.num_requests


def _requests(num_requests: int, times_ps: Iterator[int], pairs: Pairs) -> Iterator[Request]:
    for index, arrival_ps, (prompt_tokens, output_tokens) in zip(range(num_requests), times_ps, pairs, strict=False):
        yield Request(index, arrival_ps, prompt_tokens, output_tokens)
