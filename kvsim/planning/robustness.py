"""The rate that holds although the calibration errs and the traffic's luck differs.

Each draw is a world: one factor for every (Op kind, size class), as `kvsim.uncertainty` draws them, and one seed of the traffic.
In a world the SLO is met below some rate and missed above it; the rate that holds in 95 % of worlds is a quantile of those. Only
worlds that may lie on both sides of a rate are simulated at it, so few are simulated more than twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log, sqrt
from typing import NamedTuple

import numpy as np

from kvsim.errors import KvsimError
from kvsim.planning.candidates import Candidate, resources
from kvsim.planning.evidence import Criterion, Evidence
from kvsim.planning.traffic import AS_IT_IS, Change, Traffic
from kvsim.planning.trial import Trial
from kvsim.profile import draw_biases

HELD_FRAC = 0.95
"""Share of draws in which the robust rate meets the SLO."""
ROBUST_TOLERANCE_FRAC = 0.02
STEP_DOWN = 0.85
"""How far below a rate that too many draws miss the next one is tried, before there is one that holds."""
LEAST_FRAC = 0.05
"""Of the rate found: below it a deployment is called not robust at all."""
_STREAM = 0x706C61
"""Keeps these draws apart from those of the traffic and of `kvsim.uncertainty` with the same seed."""


class World(NamedTuple):
    """One draw of a candidate. draw: None for the calibration as it is."""

    candidate: Candidate
    traffic: Traffic
    criteria: tuple[Criterion, ...]
    slo: tuple[tuple[str, float], ...]
    draw: int | None
    seed_number: int
    num_requests: int
    change: Change = AS_IT_IS


@dataclass
class Outcome:
    """robust_rate_per_s: None where no rate worth the name holds. share_met_frac: of draws that meet the SLO at the rate found."""

    robust_rate_per_s: float | None
    share_met_frac: float


def meets(world: World, rate_per_s: float) -> bool:
    """Whether a world meets the SLO at a rate, at face value of one run. A draw whose engine thrashes to a stop does not."""
    try:
        trial = _trial(_Key(world))
        sample = trial.run(rate_per_s, world.traffic.seed(world.seed_number), world.num_requests)
    except KvsimError:
        return False
    return Evidence(rate_per_s, world.criteria, dict(world.slo), world.traffic.is_random, samples=[sample]).meets()


class _Key:
    """A world as a key: what it is made of is named, not compared."""

    def __init__(self, world: World) -> None:
        self.world, self.name = world, (world.candidate.name, world.draw, world.change, world.criteria)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


@lru_cache(maxsize=64)
def _trial(key: _Key) -> Trial:
    """Prices are worked out once for all rates of a world."""
    world = key.world
    factors = None
    if world.draw is not None:
        biases = resources(world.candidate).deployment.profile.log_biases
        factors = draw_biases(biases, np.random.default_rng([_STREAM, world.traffic.config.seed, world.draw]))
    needs_gaps = any(criterion.metric == "itl" for criterion in world.criteria)
    return Trial(world.candidate, world.traffic, factors=factors, change=world.change, needs_gaps=needs_gaps)


MapMeets = Callable[[Sequence[tuple[World, float]]], Sequence[bool]]


def robust_rate(worlds: Sequence[World], rate_per_s: float, run: MapMeets) -> Outcome:
    """The highest rate, at most the rate found, that meets the SLO in HELD_FRAC of the worlds, to ROBUST_TOLERANCE_FRAC.

    run: answers `meets` for many (world, rate) at once.
    """
    number = len(worlds)
    allowed = int((1 - HELD_FRAC) * number + 1e-9)  # worlds that may miss it
    low, high = [0.0] * number, [float("inf")] * number

    def probe(rate: float) -> None:
        unknown = [i for i in range(number) if low[i] < rate < high[i]]
        for i, met in zip(unknown, run([(worlds[i], rate) for i in unknown]), strict=True):
            if met:
                low[i] = max(low[i], rate)
            else:
                high[i] = min(high[i], rate)

    probe(rate_per_s)
    share = sum(value >= rate_per_s for value in low) / number
    while True:
        holds, fails = sorted(low)[allowed], min(sorted(high)[allowed], rate_per_s)
        if holds >= rate_per_s:
            return Outcome(rate_per_s, share)
        if fails < LEAST_FRAC * rate_per_s:
            return Outcome(None, share)
        if holds and log(fails / holds) <= log(1 + ROBUST_TOLERANCE_FRAC):
            return Outcome(holds, share)
        probe(sqrt(holds * fails) if holds else STEP_DOWN * fails)
