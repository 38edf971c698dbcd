"""When requests arrive. Each class is a YAML block; open loops give ``times_ps(rng)``, picoseconds without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, chain, count, repeat
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from kvsim.frozen import Frozen
from kvsim.units import PS_PER_S, ps
from kvsim.workload_fields import Count, NonNegativeTime, Number, PositiveTime, Rate

CHUNK = 4096
"""Draws per numpy call; constant, so that the first n requests do not depend on how many are asked for."""


def _times_ps(gap_chunk_s: Callable[[], np.ndarray]) -> Iterator[int]:
    """Running sum of the gaps, each rounded once to whole picoseconds (Python integers: no overflow, no drift)."""
    chunks = (map(round, (gap_chunk_s() * PS_PER_S).tolist()) for _ in repeat(None))
    return accumulate(chain.from_iterable(chunks))


class Poisson(Frozen):
    """Independent exponential gaps; the first request arrives one gap after time zero."""

    kind: Literal["poisson"] = "poisson"
    rate_per_s: Rate = Field(description="requests per second, on average")

    def times_ps(self, rng: np.random.Generator) -> Iterator[int]:
        return _times_ps(lambda: rng.standard_exponential(CHUNK) / self.rate_per_s)

    def describe(self) -> str:
        return f"poisson {self.rate_per_s:g} requests/s"


class Gamma(Frozen):
    """Gamma gaps of shape ``burstiness`` and CV 1/sqrt(burstiness), as in ``vllm bench serve --burstiness``.

    1 is Poisson, less is burstier. The first request arrives one gap after time zero.
    """

    kind: Literal["gamma"] = "gamma"
    rate_per_s: Rate = Field(description="requests per second, on average")
    burstiness: Number = Field(ge=1e-3, le=1e6, description="shape of the gaps: 1 is Poisson, less is burstier")

    def times_ps(self, rng: np.random.Generator) -> Iterator[int]:
        scale_s = 1.0 / (self.rate_per_s * self.burstiness)
        return _times_ps(lambda: rng.standard_gamma(self.burstiness, CHUNK) * scale_s)

    def describe(self) -> str:
        return f"gamma {self.rate_per_s:g} requests/s of burstiness {self.burstiness:g}"


class Constant(Frozen):
    """Equal gaps, the first request at time zero."""

    kind: Literal["constant", "uniform"] = "constant"
    rate_per_s: Rate = Field(description="requests per second")

    def times_ps(self, rng: np.random.Generator) -> Iterator[int]:
        return count(0, ps(1.0 / self.rate_per_s))

    def describe(self) -> str:
        return f"one request every {1 / self.rate_per_s:g} s"


class AllAtOnce(Frozen):
    """Everything at time zero: an offline batch."""

    kind: Literal["all_at_once"] = "all_at_once"

    def times_ps(self, rng: np.random.Generator) -> Iterator[int]:
        return repeat(0)

    def describe(self) -> str:
        return "all requests at once"


class ClosedLoopArrivals(Frozen):
    """A fixed number of clients, each with one request in flight and a pause of ``think_time_s`` after each answer.

    ``start: together`` sends the first requests at time zero (equal clients then stay in lockstep); ``staggered``
    spreads them evenly over ``stagger_s``. ``length_range_frac`` f draws each length uniformly from [1 - f, 1] of a
    fixed length. The run ends with ``requests_per_client`` each, or the workload's ``num_requests`` over all clients.
    """

    kind: Literal["closed_loop"] = "closed_loop"
    clients: Count = Field(description="clients, each with one request in flight")
    start: Literal["together", "staggered"] = Field("together", description="when clients send their first request")
    stagger_s: PositiveTime | None = Field(None, description="seconds over which staggered starts spread")
    think_time_s: NonNegativeTime = Field(0.0, description="pause of a client after each answer")
    requests_per_client: Count | None = Field(None, description="requests of each client, in place of num_requests")
    length_range_frac: Number = Field(
        0.0, ge=0, lt=1, description="f: lengths drawn uniformly from [1 - f, 1] of a fixed length"
    )

    @model_validator(mode="after")
    def _stagger_goes_with_staggered(self) -> ClosedLoopArrivals:
        if self.start == "staggered" and self.stagger_s is None:
            raise ValueError("must have stagger_s when start is staggered; try stagger_s: 10")
        if self.start == "together" and self.stagger_s is not None:
            raise ValueError("must not have stagger_s when start is together; try start: staggered")
        return self

    def starts_ps(self) -> list[int]:
        """The first arrival of each client."""
        over_ps = ps(self.stagger_s or 0.0)
        return [over_ps * client // self.clients for client in range(self.clients)]

    def describe(self) -> str:
        start = "together" if self.stagger_s is None else f"staggered over {self.stagger_s:g} s"
        think = f", {self.think_time_s:g} s of think time" if self.think_time_s else ""
        spread = f", lengths spread by {self.length_range_frac:g}" if self.length_range_frac else ""
        return f"closed loop of {self.clients} clients started {start}{think}{spread}"


OpenArrivals = Poisson | Gamma | Constant | AllAtOnce
Arrivals = Annotated[OpenArrivals | ClosedLoopArrivals, Field(discriminator="kind")]
