"""Fleets against the step-by-step reference, replica by replica and to the picosecond, on random scenarios.

KVSIM_EXAMPLES=2000 runs so many random fleets for each router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import simpy
from hypothesis import given, reject
from hypothesis import strategies as st
from reference import RefReplica, RefRouter, differences, reference_pool, simulate_fleet_reference
from test_against_reference import (
    CLOCKWORK,
    COMPOSITIONS,
    ENGINES_SMALL,
    Case,
    boundaries,
    case_of,
    cases,
    engines,
    policies_of,
    profiles,
    slow_or_not,
)

from kvsim.engines.vllm_v1 import VllmV1
from kvsim.errors import DoesNotFitError
from kvsim.fleet import Fleet, Member
from kvsim.policies.think import ThinK
from kvsim.pool import BlockPool, PrefixPool
from kvsim.recording import RunLog
from kvsim.requests import OpenLoop, Split
from kvsim.routers import ROUTERS, LeastKvUse, LeastOutstandingTokens, RoundRobin, Router
from kvsim.simulation import Replica


@dataclass
class FleetCase:
    """Replicas over the traffic of the first one. Equal cases share prices, as replicas of one group do."""

    replicas: Sequence[Case]
    weights: Sequence[float]
    router: Router

    def fast(self, alone: bool = False) -> list[RunLog]:
        """alone: each serves its own part of the traffic by itself, where the router looks at nothing."""
        self.seen: list[list[tuple[int, float]]] = []  # at each choice: (outstanding tokens, KV use) of every replica
        source, env = self.replicas[0].seen(), simpy.Environment(initial_time=0)
        weights, kind = self.weights, Replica if alone else Member
        lanes = Split(source, self.router.chooser(weights), len(weights)).lanes if alone else None
        shared: dict[int, tuple[Any, Any]] = {}
        made: list[Any] = []
        for number, case in enumerate(self.replicas):
            costs, contended = shared.setdefault(id(case), (case.costs(), case.contended()))
            assert case.pool_units is not None
            pool = BlockPool(case.pool_units)
            if case._shares(source):
                pool = PrefixPool(case.pool_units, case.engine.block_tokens, source.hash_block_tokens)
            scheduler = case.engine.scheduler(pool, case.plan, case.model)
            own = lanes[number] if lanes is not None else source
            made.append(kind(env, own, scheduler, costs.twin(), None if contended is None else contended.twin()))
        if alone:
            for replica in made:
                env.process(replica.serve())
        else:
            for number, member in enumerate(made):
                member.number = number
            choose = self.router.chooser(weights, made)

            def watched(now_ps: int) -> int:
                self.seen.append([(m.outstanding_tokens_at(now_ps), m.kv_use_at(now_ps)) for m in made])
                assert all(m.outstanding_tokens <= tokens and m.kv_use <= use for m, (tokens, use) in zip(made, self.seen[-1], strict=True))
                return choose(now_ps)

            env.process(Fleet(env, source, made, watched).serve())
        env.run()
        return [replica.log for replica in made]

    def check(self) -> None:
        source, replicas = self.replicas[0].seen(reference=True), []
        for case in self.replicas:
            assert case.pool_units is not None
            pool = reference_pool(case.engine, case.plan, case.pool_units, source)
            replicas.append(RefReplica(case.engine, case.plan, pool, source, case.costs(), case.contended()))
        blind = not self.router.looks and isinstance(source, OpenLoop)
        logs = [self.fast()]
        routing = RefRouter(self.router, self.weights, replicas)
        truth = simulate_fleet_reference(replicas, source, routing)
        assert self.seen == routing.seen, f"what the router sees\n{self!r}"
        if blind:
            logs.append(self.fast(alone=True))
        for each in logs:
            for number, (log, result) in enumerate(zip(each, truth, strict=True)):
                found = differences(log, result)
                assert not found, "\n".join([f"replica {number}", *found, repr(self)])

    def __repr__(self) -> str:
        return f"{self.router!r}, weights {self.weights}\n" + "\n\n".join(repr(case) for case in self.replicas)


@st.composite
def fleets(draw: st.DrawFn, router: type[Router]) -> FleetCase:
    first = draw(cases(draw(st.sampled_from(COMPOSITIONS))))
    replicas = [first]
    for _ in range(draw(st.integers(0, 3), "more replicas")):
        like = draw(st.sampled_from(["equal", "equal", "slower", "other"]))
        if like == "equal":
            replicas.append(draw(st.sampled_from(replicas)))
        elif like == "slower" or first.source().hash_block_tokens:
            replicas.append(replace(first, profile=draw(profiles())))
        else:
            kinds = draw(st.sampled_from(COMPOSITIONS))
            other = replace(
                first, engine=draw(engines()), policies=draw(policies_of(kinds)), profile=draw(profiles()), pool_units=None
            )
            assert other.pool_units is not None
            other.pool_units += draw(st.sampled_from([0, 1, 5, 1000])) * other.plan.prefill_units_per_block
            replicas.append(other)
    weights = [draw(st.sampled_from([1.0, 1.0, 2.0, 0.3])) for _ in replicas]
    seed = {"seed": draw(st.integers(0, 9))} if "seed" in router.model_fields else {}
    return FleetCase(replicas, weights, router(**seed))


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.model_fields["kind"].default)
def test_random_fleets(router: type[Router]) -> None:
    @slow_or_not(40)
    @given(fleets(router))
    def agree(fleet: FleetCase) -> None:
        try:
            fleet.check()
        except DoesNotFitError:  # preempted at a moment from which it cannot be computed again
            reject()

    agree()


@pytest.mark.parametrize("kinds", COMPOSITIONS[::3], ids="+".join)
def test_a_fleet_of_one_is_one_replica(kinds: tuple[str, ...]) -> None:
    """Row by row of its log, whatever the router."""

    @slow_or_not(6)
    @given(cases(kinds), st.sampled_from(ROUTERS))
    def equal(case: Case, router: type[Router]) -> None:
        try:
            single = case.fast()
        except DoesNotFitError:
            reject()
        for log in FleetCase([case], [1.0], router()).fast(), *(
            [FleetCase([case], [1.0], router()).fast(alone=True)]
            if not router.looks and isinstance(case.seen(), OpenLoop) else []
        ):  # fmt: skip
            assert log == [single]

    equal()


@pytest.mark.parametrize("engine", ENGINES_SMALL, ids=lambda engine: engine.kind)
@pytest.mark.parametrize("router", [RoundRobin(), LeastOutstandingTokens(), LeastKvUse()], ids=lambda router: router.kind)
def test_arrivals_at_and_around_every_boundary_of_two_replicas(engine: Any, router: Router) -> None:
    first, second = (0, 6, 9), (0, 3, 11)
    for boundary in boundaries(case_of(engine, [], first)):
        for arrival_ps in (boundary - 1, boundary, boundary + 1):
            if arrival_ps >= 0:
                rows = (first, second, (arrival_ps, 5, 3), (arrival_ps, 2, 1), (arrival_ps, 7, 2))
                case = case_of(engine, [], *rows)
                FleetCase([case, case], [1.0, 1.0], router).check()


def test_kv_use_inside_a_run_whose_blocks_come_and_go() -> None:
    """ThinK's two lanes take blocks at moments of their own; requests come at every step of a long run."""
    engine = VllmV1(max_num_seqs=4, block_size_tokens=4)
    rows = [(0, 8, 40), (0, 9, 40)]
    think = [ThinK(pruned_frac=0.5, recent_tokens=8)]
    times = boundaries(case_of(engine, think, *rows, profile=CLOCKWORK))
    rows += [(time + 50, 5, 2) for time in times[2:30:2]]
    case = case_of(engine, think, *rows, profile=CLOCKWORK, extra_units=400)
    FleetCase([case, case, case], [1.0] * 3, LeastKvUse()).check()
