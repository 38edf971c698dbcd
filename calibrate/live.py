"""The simulator's main loop with a real decoder in the place of the cost model: same scheduler, same pool, measured steps.

Time is the clock of the simulation, moved on by what each step really took, scheduling included; waiting for an arrival is
skipped. So a run decides as a server would, and ends as soon as its steps are done.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import simpy
import torch

from kvsim.batch import DecodeBatch, Sequence
from kvsim.calibrate.decoder.clock import now_ns
from kvsim.calibrate.decoder.decoder import Decoder
from kvsim.calibrate.decoder.sequence import CachedSequence
from kvsim.cost_types import Chunk, Run
from kvsim.engines.scheduler import Scheduler, Step
from kvsim.policies.compose import CachePlan
from kvsim.requests import Request, RequestSource
from kvsim.simulation import Replica

PS_PER_NS = 1000


class _LiveCosts:
    """Stands where `kvsim.cost.StepCosts` does: asks for a step and says what it took."""

    basis: dict[object, object] = {}  # noqa: RUF012
    profile = None

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self.run: Callable[[], int] = lambda: 0

    def prefill_step(self, state: object, chunks: SequenceOf[Chunk], num_sampled: int, compressed: object) -> int:
        return self.run()

    def op_times(self) -> dict[str, int]:
        return {}


class _Live:
    """A sequence that is being served: its prompt, what it has said so far, and its cache."""

    def __init__(self, prompt: torch.Tensor, cache: CachedSequence) -> None:
        self.prompt, self.cache = prompt, cache
        self.new: list[int] = []

    def tokens(self, first: int, end: int) -> torch.Tensor:
        """Of the prompt and, where a preempted sequence is computed again, of what it has said."""
        if end <= len(self.prompt):
            return self.prompt[first:end]
        return torch.cat((self.prompt, torch.tensor(self.new, dtype=self.prompt.dtype)))[first:end]


class LiveReplica(Replica):
    """Serves a source of requests for real. Token ids are random, drawn from `seed` and the request's index.

    between: called when a step is done; the clock stands still meanwhile. peak_bytes: the most that caches held at the end of a step,
    keys, values and scales.
    """

    def __init__(
        self, env: simpy.Environment, source: RequestSource, scheduler: Scheduler, decoder: Decoder, seed: int = 0,
        check: Callable[[Request], None] | None = None, between: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._live_costs = _LiveCosts(decoder.plan)
        super().__init__(env, source, scheduler, self._live_costs, None, check)  # type: ignore[arg-type]
        self.decoder, self.seed, self.between = decoder, seed, between
        self.caches: dict[Sequence, _Live] = {}
        self.peak_bytes = 0
        self._vocab = decoder.transformer.spec.model.vocab_size
        self._ended_ns = now_ns(self.decoder.device)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _prefill(self, step: Step) -> int:
        self._live_costs.run = lambda: self._run(step.chunks, list(self.scheduler.batch.members) if step.decodes else [])
        return super()._prefill(step)

    def decode_run(
        self, costs: object, batch: DecodeBatch, limit_ps: int | None, max_steps: int, decided: bool = False
    ) -> Run:
        """One real step."""
        elapsed = self._run([], list(batch.members))
        return 1, elapsed, [(0, elapsed, 0, 1)]

    def _run(self, chunks: SequenceOf[tuple[Sequence, Chunk]], decodes: SequenceOf[Sequence]) -> int:
        """Picoseconds since the last step ended, this one done."""
        self._drop_preempted()
        work, ending = [], []
        for sequence, (new, prior) in chunks:
            live = self.caches[sequence] if prior else self._open(sequence)
            work.append((live.cache, live.tokens(prior, prior + new)))
            if prior + new == sequence.prefill_tokens:
                ending.append(live)
        decoding = [self.caches[sequence] for sequence in decodes]
        logits = self.decoder.step(work, [(live.cache, live.new[-1]) for live in decoding])
        if len(logits):
            for live, token in zip([*decoding, *ending], logits.argmax(1).tolist(), strict=True):
                live.new.append(token)
        self.peak_bytes = max(self.peak_bytes, sum(live.cache.held_bytes() for live in self.caches.values()))
        now = now_ns(self.decoder.device)
        elapsed, self._ended_ns = now - self._ended_ns, now
        if self.between is not None:
            self.between()
            self._ended_ns = now_ns(self.decoder.device)
        return elapsed * PS_PER_NS

    # -- caches ---------------------------------------------------------------------------------------------------

    def _open(self, sequence: Sequence) -> _Live:
        """A cache for a sequence whose prefill begins, for the first time or after a preemption."""
        steps = sequence.output_tokens - sequence.generated - 1
        cache = self.decoder.open(sequence.prompt_tokens, sequence.prefill_tokens, steps)
        live = self.caches.get(sequence)
        if live is None:
            live = self.caches[sequence] = _Live(self._prompt(sequence.request), cache)
        else:
            self.decoder.close(live.cache)
            live.cache = cache
        assert len(live.prompt) + len(live.new) == sequence.prefill_tokens
        return live

    def _prompt(self, request: Request) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, request.index])
        return torch.from_numpy(rng.integers(0, self._vocab, request.prompt_tokens)).to(self.decoder.device)

    def _drop_preempted(self) -> None:
        """Sequences that the scheduler has sent back to the queue lose their cache; their tokens are kept for when they return."""
        for sequence, live in self.caches.items():
            if sequence not in self.scheduler.running:
                self.decoder.close(live.cache)

    def _finish(self, sequence: Sequence) -> None:
        super()._finish(sequence)
        live = self.caches.pop(sequence)
        self.decoder.close(live.cache)
