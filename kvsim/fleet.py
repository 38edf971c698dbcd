"""Several replicas behind a router: one SimPy process that moves from one instant at which something happens to the next.

In every such instant, first the steps that end there end on all replicas, then the requests that arrive there are routed one by
one, then the replicas at a step's boundary pick their next step. So a tie between two replicas is no race, and a router sees
every token that has come by now.

A replica jumps over a whole run of decode steps, but what is routed to it meanwhile is not known when the run begins. The run is
therefore only looked at then, and entered into log and accounts when it ends: after its last step, or after the first step that ends
at or after an arrival that might be admitted. Until then its state at any instant follows from its closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from heapq import heappop, heappush

import simpy

from kvsim.batch import Sequence as ServedSequence
from kvsim.cost import StepCosts
from kvsim.cost_types import Run
from kvsim.curves import steps_to_reach
from kvsim.engines.scheduler import Scheduler, Step
from kvsim.requests import Request, RequestSource
from kvsim.routers import Choose
from kvsim.runs import decode_run
from kvsim.simulation import NEVER_PS, Progress, Replica, last_step_ps


class Member(Replica):
    """A replica of a fleet: it is told when to begin and to end a step, and can be asked for its state at any instant.

    number: its place in the fleet, in whose order steps end that end in the same instant. ends_ps: when what it does ends; -1
    between two steps. outstanding_tokens: see `kvsim.routers`, as they were before the step or run under way.
    """

    def __init__(
        self, env: simpy.Environment, source: RequestSource, scheduler: Scheduler, costs: StepCosts,
        contended: StepCosts | None = None, check: Callable[[Request], None] | None = None,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        super().__init__(env, source, scheduler, costs, contended, check, progress)
        self.number, self.ends_ps = 0, -1
        self._num_beams = getattr(costs.engine, "num_beams", 1)
        # Runs are looked at under prices whose account nobody reads.
        self._preview = costs.twin()
        self._contended_preview = None if contended is None else contended.twin()
        self._inbox: list[tuple[Request, int]] = []  # routed here since the last boundary, and when
        self._begun_ps = -1 if scheduler.ahead else NEVER_PS  # the last step's beginning: who came later has to wait one more
        self.decides_ahead = False  # runs are seen to end where requests come
        self.outstanding_tokens = 0
        self._step: Step | None = None
        self._run: Run | None = None  # of decode steps, as far as it would go
        self._entered = False  # into log and accounts already: nothing can cut it
        self._cut_ps: int | None = None  # the arrival that ends it early
        self._held_units = 0  # before the run

    def __lt__(self, other: Member) -> bool:
        return self.number < other.number

    @property
    def idle(self) -> bool:
        return self.ends_ps < 0

    # -- what the router asks -------------------------------------------------------------------------------------

    def outstanding_tokens_at(self, now_ps: int) -> int:
        run = self._run
        if run is None:
            return self.outstanding_tokens
        ahead_ps = now_ps - self.now
        steps, elapsed = self._reached(run, ahead_ps)
        if elapsed > ahead_ps:
            steps -= 1  # the last of them is still under way
        return self.outstanding_tokens + steps * (self.scheduler.batch.size // self._num_beams)

    @property
    def kv_use(self) -> float:
        pool = self.scheduler.pool
        held = pool.capacity_units - pool.free_units if self._run is None else self._held_units
        return held / pool.capacity_units

    def kv_use_at(self, now_ps: int) -> float:
        pool, run = self.scheduler.pool, self._run
        if run is None:
            return self.kv_use
        steps, _ = self._reached(run, now_ps - self.now)
        return (self._held_units + self.scheduler.batch.units_needed(steps)) / pool.capacity_units

    def _reached(self, run: Run, ahead_ps: int) -> tuple[int, int]:
        """(number, end) of the run's steps that have begun by `ahead_ps` after its start; a step begins after its boundary."""
        if self.scheduler.batch.num_periodic and ahead_ps < run[1]:  # whose pieces interleave
            steps, elapsed, _ = decode_run(self._previewing(), self.scheduler.batch, ahead_ps, run[0])
            return steps, elapsed
        done = 0
        for start, first, growth, steps in run[2]:
            ends = start + steps * first + growth * (steps * (steps - 1) // 2)
            if ends >= ahead_ps:
                steps = steps_to_reach(ahead_ps - start, first, growth, steps)
                return done + steps, start + steps * first + growth * (steps * (steps - 1) // 2)
            done += steps
        return run[0], run[1]

    # -- what the fleet tells -------------------------------------------------------------------------------------

    def receive(self, request: Request, now_ps: int) -> bool:
        """A request is routed here; returns whether the run under way now ends earlier."""
        if self.check is not None:
            self.check(request)
        self._inbox.append((request, now_ps))
        self.outstanding_tokens += request.prompt_tokens
        if self._run is None or self._entered or self._cut_ps is not None:
            return False
        self._cut_ps = now_ps
        _, elapsed = self._reached(self._run, now_ps - self.now)
        before, self.ends_ps = self.ends_ps, self.now + elapsed
        return self.ends_ps < before

    def begin(self, now_ps: int) -> int:
        """At a boundary: what has been routed here joins the queue, and the next step begins, if there is one; returns `ends_ps`."""
        scheduler = self.scheduler
        self.now = now_ps
        for request, came_ps in self._inbox:
            if came_ps <= self._begun_ps:
                scheduler.arrive(request)
            else:
                scheduler.notice(request)
        self._inbox.clear()
        step = self._step = scheduler.pick_ahead() if scheduler.ahead else scheduler.pick()
        if step is None:
            return -1
        if step.chunks:
            self.ends_ps = now_ps + self._prefill(step)
            return self.ends_ps
        pool = scheduler.pool
        self._held_units = pool.capacity_units - pool.free_units - scheduler.prepaid_units
        self._cut_ps, self._entered = None, not step.open or step.max_steps == 1
        run = self._run = self._decode(step, None) if self._entered else self._look_ahead(step)
        self.ends_ps = now_ps + run[1]
        return self.ends_ps

    def end(self) -> None:
        """At `ends_ps`: the step or run is over."""
        step, run, started_ps = self._step, self._run, self.now
        assert step is not None
        ends_ps, self.ends_ps = self.ends_ps, -1
        if run is None:
            self.now = ends_ps
            tokens = sum(
                not sequence.is_beam and sequence.computed_tokens + chunk[0] == sequence.prefill_tokens
                for sequence, chunk in step.chunks
            )
            self.outstanding_tokens += tokens
            self._end_prefill(step, started_ps)
            if self.scheduler.ahead:
                self._begun_ps = started_ps
            return
        self._run = None
        if not self._entered:
            run = self._decode(step, self._cut_ps)
        self.now += run[1]
        assert self.now == ends_ps, "a run ended elsewhere than it was seen to"
        if self.scheduler.ahead:
            self._begun_ps = self.now - last_step_ps(run[2])
        self._advance(run[0])

    def close(self) -> None:
        """Every request has been answered."""
        self._close()

    def _advance(self, steps: int) -> None:
        self.outstanding_tokens += steps * (self.scheduler.batch.size // self._num_beams)
        super()._advance(steps)

    def _finish(self, sequence: ServedSequence) -> None:
        super()._finish(sequence)
        if not sequence.is_beam:
            self.outstanding_tokens -= sequence.request.prompt_tokens + sequence.generated

    # -- runs that are looked at ----------------------------------------------------------------------------------

    def _previewing(self) -> StepCosts:
        contended = self._contended_preview
        return self._preview if contended is None or self.now >= self.side_busy_until_ps else contended

    def _look_ahead(self, step: Step) -> Run:
        """The run as `_decode` would enter it, if no request came."""
        costs = self._previewing()
        limit = self.side_busy_until_ps - self.now if costs is self._contended_preview else None
        assert not step.swapped_units, "blocks are swapped before a single step"
        return decode_run(costs, self.scheduler.batch, limit, step.max_steps)


class Fleet:
    """Members and their router, serving one source of requests."""

    def __init__(self, env: simpy.Environment, source: RequestSource, members: Sequence[Member], choose: Choose) -> None:
        self.env, self.source, self.members, self.choose = env, source, members, choose

    def serve(self) -> Generator[simpy.Event, None, None]:
        """The process: runs until every request has been answered.

        Only arrivals come from outside, so it sleeps from one to the next, and moves through the instants between them at once.
        """
        source, members, choose, timeout = self.source, self.members, self.choose, self.env.timeout
        ends: list[tuple[int, Member]] = []  # (when, who); a run that was cut has left its old end behind
        now = slept_until = 0
        at_boundary: list[Member] = []
        while True:
            while ends and ends[0][0] == now:
                member = heappop(ends)[1]
                if member.ends_ps == now:
                    member.end()
                    at_boundary.append(member)
            arrival = source.next_arrival_ps
            while arrival is not None and arrival <= now:
                member = members[choose(now)]
                if member.receive(source.take(), now):
                    heappush(ends, (member.ends_ps, member))
                elif member.idle and member not in at_boundary:
                    at_boundary.append(member)
                arrival = source.next_arrival_ps
            for member in at_boundary:
                ends_ps = member.begin(now)
                if ends_ps >= 0:
                    heappush(ends, (ends_ps, member))
            at_boundary.clear()
            if ends and (arrival is None or ends[0][0] < arrival):
                now = ends[0][0]
            elif arrival is not None:
                now = arrival
                yield timeout(now - slept_until)
                slept_until = now
            else:
                break
        yield timeout(now - slept_until)
        for member in members:
            member.close()
