"""What every scheduler shares: a queue, the running sequences in order of admission, and the moves between them."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvsim.batch import Sequence, decode_batch
from kvsim.cost_types import Chunk
from kvsim.errors import DoesNotFitError
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool
from kvsim.requests import Request


class Step(NamedTuple):
    """What the next step computes. Without chunks it stands for a run of up to `max_steps` pure decode steps.

    decodes: whether the decoding batch advances. open: whether a request that arrives meanwhile might be admitted, so that the
    run must end when it is noticed. swapped_units: blocks moved over the host link before the step.
    """

    chunks: list[tuple[Sequence, Chunk]]
    decodes: bool
    max_steps: int
    open: bool
    swapped_units: int = 0


class Scheduler:
    """Queue and running sequences over a block pool. A subclass says which of them the next step computes (`pick`).

    ahead: each step is decided on while the one before runs.
    """

    ahead = False

    def __init__(self, pool: BlockPool, plan: CachePlan, max_num_seqs: int) -> None:
        self.pool, self.plan, self.max_num_seqs = pool, plan, max_num_seqs
        self.batch = decode_batch(plan)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # in order of admission, prefills included
        self.swapped: deque[tuple[Sequence, int]] = deque()  # out in host memory, with the units they held
        self.num_preemptions = 0
        self.prepaid_units = 0  # of what the next step takes, already taken from the pool
        self.last_decode_ps = 0  # when the decoding batch last got its tokens
        self.noticed: list[Request] = []  # too late for the step that begins now

    def pick(self) -> Step | None:
        """The next step, with its blocks reserved; None where there is nothing to do."""
        raise NotImplementedError

    def arrive(self, request: Request) -> None:
        self.waiting.append(Sequence(request))

    # -- deciding on a step while the one before runs -----------------------------------------------------------------

    def notice(self, request: Request) -> None:
        """`arrive` for who came after the last step had begun: the next one has been decided on."""
        self.noticed.append(request)

    def pick_ahead(self) -> Step | None:
        """`pick`, decided on before this moment: who is noticed now joins the queue for the step after, unless all is idle."""
        noticed = self.noticed
        if not noticed:
            return self.pick()
        step = self.pick() if self.running or self.waiting or self.swapped else None
        for request in noticed:
            self.arrive(request)
        noticed.clear()
        if step is None:
            return self.pick()
        return step if step.chunks else step._replace(max_steps=1)

    # -- moves ----------------------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        """From the queue's head to running, with so many prompt tokens not to be computed."""
        assert self.waiting[0] is sequence
        self.waiting.popleft()
        self.running[sequence] = None
        sequence.computed_tokens = cached_tokens
        if sequence.scheduled_ps < 0:
            sequence.cached_tokens = cached_tokens

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Blocks for a prefill's first `num_tokens` tokens."""
        units = self.plan.prefill_units(num_tokens)
        self.pool.take(units - sequence.held_units)
        sequence.held_units = units

    def start_decode(self, sequence: Sequence) -> None:
        """The prefill has ended and its policy has compressed the prompt: the sequence decodes from the next step on."""
        freed = sequence.held_units - self.batch.join(sequence)
        assert freed >= 0, "compression must not grow the cache"
        if freed:
            self.pool.give(freed)
        sequence.held_units = 0

    def turn(self, sequence: Sequence) -> None:
        """A policy acts on a decoding sequence: the next straight piece of its cache begins."""
        change = self.batch.turn(sequence)
        assert change <= 0, "a policy must not take blocks by jumps"
        self.pool.give(-change)

    def finish(self, sequence: Sequence) -> None:
        """The sequence has its last token."""
        batch = self.batch
        held = batch.leave(sequence) if sequence in batch.members else sequence.held_units
        self.pool.release(sequence, held)
        del self.running[sequence]

    def _leave(self, sequence: Sequence) -> int:
        """Out of the decoding batch, if it is there; returns the units it held."""
        if sequence not in self.batch.members:
            return sequence.held_units
        sequence.last_token_ps = max(sequence.last_token_ps, self.last_decode_ps)
        return self.batch.leave(sequence)

    def preempt_last(self) -> Sequence:
        """The sequence admitted last loses its cache and goes back to the queue's head, to be recomputed."""
        sequence = next(reversed(self.running))
        del self.running[sequence]
        decoding = sequence in self.batch.members
        held = self._leave(sequence)
        # In decode everything but the newest token has been computed.
        computed = sequence.prompt_tokens + sequence.generated - 1 if decoding else sequence.computed_tokens
        self.pool.preempt(sequence, held, computed)
        sequence.held_units = 0
        sequence.computed_tokens = 0
        sequence.prefill_tokens = sequence.prompt_tokens + sequence.generated
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)
        plan, capacity = self.plan, self.pool.capacity_units
        left = sequence.output_tokens - sequence.generated
        if plan.prefill_units(sequence.prefill_tokens + left) > capacity and (
            plan.peak_units(sequence.prompt_tokens, left, sequence.prefill_tokens) > capacity
        ):
            raise DoesNotFitError(
                f"request {sequence.request.index} was preempted after {sequence.generated} tokens and cannot be computed again: "
                f"its {sequence.prefill_tokens} tokens, not yet compressed, exceed the KV pool; "
                "lower engine.max_num_seqs so that nothing is preempted, or give the pool more memory"
            )
        return sequence

    # -- horizons -------------------------------------------------------------------------------------------------

    def decode_horizon(self, spare_units: int = 0) -> int:
        """Steps until a sequence finishes or turns, or the pool runs dry but for `spare_units`; at least 1.

        The caller has made sure that the pool can feed the next step.
        """
        batch = self.batch
        event, number, sequence = batch.events[0]
        if sequence.event != number:  # it was preempted
            event = batch.next_event()
        steps = event - batch.step
        free = self.pool.free_units - spare_units
        # Most pools hold far more than a run takes: a block for every growing lane in every block's worth of steps.
        if (steps // batch.block_size + 1) * batch.need_total > free:
            steps = batch.steps_within(free, steps)
        return steps if steps > 1 else 1
