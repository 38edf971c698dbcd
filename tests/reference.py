"""The truth in its plainest form: the same serving, simulated one engine step at a time.

No runs, no closed forms, no sums kept from step to step, no heap. In every step every sequence asks its policies what it holds,
reads and does in *this* step. Shared with kvsim: the policies, the engines' settings, the cost of one step
(`StepCosts.decode_step` and `prefill_step`, in an instance of its own), a plan's units, and the sources of requests.

Rules that are conventions rather than physics:
- Time is whole picoseconds; what happens during a step is seen at its end, an arrival at that very moment included.
- Between two steps a sequence holds the blocks of what it keeps. Where its tokens policy drops tokens at the start of its next
  step, those blocks are free as soon as the last step has ended, and the next step's own token asks for its slot anew.
- So are blocks of a shrinking lane that the coming step does not need.
- A prefill under a policy that prunes channels reserves one pruned block more in each lane: it may split in two when compressed.
- From the first action (or return from the host) in a short sawtooth on, a sequence holds, and counts as long as, its peak.
- A lone sequence of the V0 engine needs no spare block, and an idle one swaps in whatever fits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from kvsim.api import build_plan, deploy, run_policy
from kvsim.cost import StepCosts
from kvsim.cost_types import Chunk
from kvsim.engines.base import Engine
from kvsim.ops import Copy
from kvsim.policies.base import HeadGroup, SequenceShape
from kvsim.policies.compose import CachePlan
from kvsim.recording import REQUEST_FIELDS, RunLog
from kvsim.requests import Request, RequestSource
from kvsim.result import PolicyResult
from kvsim.scenario import Scenario
from kvsim.units import GIB, PS_PER_S
from kvsim.workload import build_source


class StuckError(Exception):
    """Nothing runs, nothing will arrive, and what waits does not fit."""


@dataclass(eq=False)
class RefSequence:
    request: Request
    prompt_tokens: int  # padded, where the engine pads
    output_tokens: int
    prefill_tokens: int
    is_beam: bool = False
    computed_tokens: int = 0
    generated: int = 0
    decoding: bool = False
    steps: int = 0  # decode steps since its last prefill
    in_sawtooth: bool = False
    held: int = 0  # pool units
    blocks: list[RefBlock] = field(default_factory=list)  # of a prefix pool
    offered: int = 0  # leading prompt blocks of which the prefix pool knows
    cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled_ps: int = -1
    first_token_ps: int = -1
    last_token_ps: int = -1

    @property
    def shape(self) -> SequenceShape:
        return SequenceShape(self.prompt_tokens, self.prefill_tokens)


# -- one sequence's cache -----------------------------------------------------------------------------------------------


class RefCache:
    """What one sequence keeps, reads and does in one decode step, asked of its policies."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan, self.shape, self.groups = plan, plan.shape, plan.groups
        self.tokens, self.channels, self.bits = (
            plan.composition.tokens, plan.composition.channels, plan.composition.bits,
        )  # fmt: skip
        d, e = self.shape.head_dim, self.shape.element_bytes
        pruned = self.channels.stored_key_channels(d)
        self.prunes = pruned != d
        self.key16 = {  # sixteenths of a byte of one key: (all channels?, engine's own precision?)
            (True, True): round(16 * d * e), (True, False): round(16 * self.bits.key_bytes(d, e)),
            (False, True): round(16 * pruned * e), (False, False): round(16 * self.bits.key_bytes(pruned, e)),
        }  # fmt: skip
        self.value16 = {True: round(16 * d * e), False: round(16 * self.bits.value_bytes(d, e))}

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.shape.block_size_tokens)

    def prefill_units(self, tokens: int) -> int:
        """Uncompressed, with room to be split in two widths and the buffer of a full-precision window."""
        split = sum(lane.units for lane in self.plan.lanes if lane.pruned)
        return self.blocks(tokens) * self.plan.prefill_units_per_block + split + self.plan.window_units

    def lane_units(self, lanes: SequenceOf[int]) -> int:
        units = zip(self.plan.lane_units, lanes, strict=True)
        return sum(unit * self.blocks(tokens) for unit, tokens in units) + self.plan.window_units

    def split(self, seq: RefSequence, step: int, resident: int) -> list[int]:
        """Tokens of one head group, by lane: those with whole keys and, where keys are pruned, those without."""
        if not self.prunes:
            return [resident]
        whole = min(self.channels.full_key_tokens(seq.shape, step).value, resident)
        return [whole, resident - whole]

    def resident(self, seq: RefSequence, group: HeadGroup, step: int) -> int:
        """Tokens of each head while decode step `step` runs, its own included; step 0: once the prompt is compressed."""
        return self.tokens.resident(seq.shape, group, step).value if step else self.tokens.stored(seq.shape, group)

    def peak_tokens(self, seq: RefSequence, group: HeadGroup, step: int) -> int:
        """Most tokens resident in the sawtooth that the sequence is in."""
        period = self.tokens.period_steps(seq.shape, step)
        return max(self.resident(seq, group, step + j) for j in range(period))

    def lanes_in_step(self, seq: RefSequence, step: int) -> list[int]:
        """Tokens in each lane while decode step `step` runs, its own token included."""
        lanes: list[int] = []
        for group in self.groups:
            peak = self.peak_tokens(seq, group, step) if seq.in_sawtooth else 0
            lanes += self.split(seq, step, peak or self.resident(seq, group, step))
        return lanes

    def lanes_kept(self, seq: RefSequence) -> list[int]:
        """Tokens in each lane after `seq.steps` decode steps, before the next."""
        done, step = seq.steps, seq.steps + 1
        lanes: list[int] = []
        for group in self.groups:
            after = self.split(seq, step, self.resident(seq, group, step))
            if seq.in_sawtooth:
                lanes.append(self.peak_tokens(seq, group, step))
            elif self.tokens.acts_at(seq.shape, group, step):
                lanes += [after[0] - 1, *after[1:]]  # the step's own token, whose key is whole, is not there yet
            else:
                before = self.split(seq, done, self.resident(seq, group, done))
                lanes += map(min, before, after)
        return lanes

    def look_ahead(self, seq: RefSequence, returned: bool = False) -> None:
        """Whether the next step begins a short sawtooth, whose blocks are held at its peak."""
        step = seq.steps + 1
        acts = any(self.tokens.acts_at(seq.shape, group, step) for group in self.groups)
        if self.plan.tooth is not None and (acts or returned):
            seq.in_sawtooth = self.tokens.period_steps(seq.shape, step) > 0

    def units_kept(self, seq: RefSequence) -> int:
        return self.lane_units(self.lanes_kept(seq))

    def units_in_step(self, seq: RefSequence) -> int:
        """Held in the sequence's next step."""
        return self.lane_units(self.lanes_in_step(seq, seq.steps + 1))

    def peak_units(self, prompt_tokens: int, output_tokens: int) -> int:
        """The most that a sequence, alone and never preempted, holds at any time."""
        request = Request(0, 0, prompt_tokens, output_tokens)
        seq = RefSequence(request, prompt_tokens, output_tokens, prompt_tokens)
        peak = self.prefill_units(prompt_tokens)
        for _ in range(output_tokens - 1):
            self.look_ahead(seq)
            peak = max(peak, self.units_in_step(seq))
            seq.steps += 1
        return peak

    def read16(self, seq: RefSequence, group: HeadGroup, step: int, resident: int) -> int:
        """Sixteenths of a byte that attention reads of one head with so many tokens resident."""
        full = min(self.channels.full_key_tokens(seq.shape, step).value, resident)
        wide = min(self.bits.wide_key_tokens(seq.shape, step).value, resident)
        wide_values = min(self.bits.wide_value_tokens(seq.shape, step).value, resident)
        both = min(full, wide)
        keys = (
            both * self.key16[True, True]
            + (full - both) * self.key16[True, False]
            + (wide - both) * self.key16[False, True]
            + (resident - max(full, wide)) * self.key16[False, False]
        )
        return keys + wide_values * self.value16[True] + (resident - wide_values) * self.value16[False]

    def units_read(self, seq: RefSequence, group: HeadGroup, step: int, resident: int) -> int:
        """The same of all heads of the group, in scalar units of its layer group."""
        unit16 = round(16 * self.plan.scalar_bytes[group.layer_group])
        units, rest = divmod(self.read16(seq, group, step, resident) * group.num_pairs, unit16)
        assert not rest, "scalar units must divide what is read"
        return units


class RefState:
    """A decoding batch in its next step, as the cost of a step wants to know it."""

    def __init__(self, cache: RefCache, members: SequenceOf[RefSequence]) -> None:
        self.cache, self.members, self.size = cache, members, len(members)
        self.longest_bound = [self.longest(i) for i in range(cache.plan.num_layer_groups)]

    def reads(self) -> list[int]:
        cache, plan = self.cache, self.cache.plan
        reads = [0] * plan.num_scalars
        for seq in self.members:
            for group in cache.groups:
                step = seq.steps + 1
                resident = cache.resident(seq, group, step)
                reads[group.layer_group] += cache.units_read(seq, group, step, resident)
                if plan.slots_scalar is not None:
                    reads[plan.slots_scalar] += resident * group.num_pairs // plan.slots_unit
        return reads

    def action_slots(self) -> list[int]:
        return [
            sum(
                group.num_pairs * policy.acts_at(seq.shape, group, seq.steps + 1)
                for seq in self.members
                for group in self.cache.groups
            )
            for policy in self.cache.plan.acting
        ]

    def longest(self, layer_group: int) -> int:
        """The longest head, as if all heads of its layer were as long."""
        cache = self.cache
        groups = [group for group in cache.groups if group.layer_group == layer_group]
        all_pairs = sum(group.num_pairs for group in groups)
        longest = 0
        for seq in self.members:
            for group in groups:
                step = seq.steps + 1
                resident = cache.resident(seq, group, step)
                if seq.in_sawtooth:
                    resident = cache.peak_tokens(seq, group, step)
                read = cache.units_read(seq, group, step, resident)
                longest = max(longest, read * all_pairs // group.num_pairs)
        return longest


# -- pools --------------------------------------------------------------------------------------------------------------


class RefPool:
    """A number of units. `resize` is the only way to hold more or fewer."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.free = capacity, capacity

    def resize(self, seq: RefSequence, units: int) -> None:
        self.free -= units - seq.held
        seq.held = units
        assert 0 <= self.free <= self.capacity

    def hits(self, seq: RefSequence) -> list[RefBlock]:
        return []

    def share(self, seq: RefSequence, hits: list[RefBlock]) -> None:
        """The sequence, new to the pool, holds these blocks from now on."""
        assert not hits

    def computed(self, seq: RefSequence) -> None:
        """A step has ended that computed tokens of the sequence's prompt."""


@dataclass(eq=False)
class RefBlock:
    number: int
    key: tuple[int, int] | None = None  # (prefix hash, which block of it), where what it holds can be found
    users: int = 0


class RefPrefixPool(RefPool):
    """vLLM v1's: numbered blocks, a free queue (least recently freed first), known contents found by looking at all blocks."""

    def __init__(self, capacity: int, block_size: int, hash_block_tokens: int) -> None:
        super().__init__(capacity)
        self.block_size, self.per_hash = block_size, max(1, hash_block_tokens // block_size)
        self.queue = deque(RefBlock(number) for number in range(capacity))
        self.known: dict[tuple[int, int], RefBlock] = {}

    def resize(self, seq: RefSequence, units: int) -> None:
        while len(seq.blocks) < units:
            block = self.queue.popleft()
            if block.key is not None:
                del self.known[block.key]
            block.key, block.users = None, 1
            seq.blocks.append(block)
        while len(seq.blocks) > units:  # a sequence frees its last block first
            block = seq.blocks.pop()
            block.users -= 1
            if not block.users:
                self.queue.append(block)
        self._count(seq)

    def _count(self, seq: RefSequence) -> None:
        seq.held, self.free = len(seq.blocks), len(self.queue)
        if not seq.blocks:
            seq.offered = 0

    def _find(self, key: tuple[int, int]) -> RefBlock | None:
        return self.known.get(key)

    def _key(self, seq: RefSequence, block: int) -> tuple[int, int] | None:
        value, part = divmod(block, self.per_hash)
        hashes, end = seq.request.prefix_hashes, (block + 1) * self.block_size
        hashed = value < len(hashes) and end <= seq.request.prompt_tokens
        return (hashes[value], part) if hashed else (-1 - seq.request.index, block)  # what only this request contains

    def hits(self, seq: RefSequence) -> list[RefBlock]:
        """Leading whole prompt blocks that are known; one token at least is left to compute."""
        found: list[RefBlock] = []
        while True:
            end = (len(found) + 1) * self.block_size
            key = self._key(seq, len(found))
            block = self._find(key) if key is not None else None
            if block is None or end > seq.prefill_tokens - 1:
                return found
            found.append(block)

    def share(self, seq: RefSequence, hits: list[RefBlock]) -> None:
        for block in hits:
            if not block.users:
                self.queue.remove(block)
            block.users += 1
        seq.blocks = list(hits)
        seq.offered = len(hits)
        self._count(seq)

    def computed(self, seq: RefSequence) -> None:
        while (seq.offered + 1) * self.block_size <= seq.computed_tokens:
            key = self._key(seq, seq.offered)
            if key is not None and self._find(key) is None:
                seq.blocks[seq.offered].key = key
                self.known[key] = seq.blocks[seq.offered]
            seq.offered += 1


def reference_pool(engine: Any, plan: CachePlan, capacity: int, source: RequestSource) -> RefPool:
    """A prefix cache where the engine keeps one: without hashes it knows blocks of preempted sequences alone."""
    if getattr(engine, "enable_prefix_caching", False) and plan.composition.blocks_shareable and plan.prefill_units_per_block == 1:
        return RefPrefixPool(capacity, engine.block_tokens, source.hash_block_tokens)
    return RefPool(capacity)


# -- schedulers ---------------------------------------------------------------------------------------------------------


class RefStep(NamedTuple):
    """What one step computes: prompt chunks, a token for each of `decoding`, after moving units over the host link."""

    chunks: list[tuple[RefSequence, Chunk]]
    decoding: list[RefSequence]
    moved_units: int = 0


class RefScheduler:
    def __init__(self, engine: Any, pool: RefPool, cache: RefCache, model: Any) -> None:
        self.engine, self.pool, self.cache, self.model = engine, pool, cache, model
        self.waiting: list[RefSequence] = []
        self.running: list[RefSequence] = []  # in order of admission
        self.swapped: list[RefSequence] = []
        self.num_preemptions = 0
        self.peak_units = 0

    def schedule(self) -> RefStep | None:
        """The next step, its blocks taken; None where there is nothing to do."""
        raise NotImplementedError

    def arrive(self, request: Request) -> None:
        self.waiting.append(RefSequence(request, request.prompt_tokens, request.output_tokens, request.prompt_tokens))

    def admit(self, seq: RefSequence, cached: int, hits: list[RefBlock]) -> None:
        assert self.waiting[0] is seq
        self.running.append(self.waiting.pop(0))
        self.pool.share(seq, hits)
        seq.computed_tokens = cached
        if seq.scheduled_ps < 0:
            seq.cached_tokens = cached

    def preempt(self) -> RefSequence:
        """Whoever was admitted last loses its cache, and will compute its prompt and what it has generated anew."""
        seq = self.running.pop()
        if seq.decoding:  # all but its newest token have been computed
            seq.computed_tokens = seq.prompt_tokens + seq.generated - 1
        self.pool.computed(seq)
        self.pool.resize(seq, 0)
        seq.decoding, seq.in_sawtooth, seq.steps, seq.computed_tokens = False, False, 0, 0
        seq.prefill_tokens = seq.prompt_tokens + seq.generated
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.insert(0, seq)
        return seq

    def note_peak(self) -> None:
        """Called when a step is scheduled: all that it needs is held."""
        self.peak_units = max(self.peak_units, self.pool.capacity - self.pool.free)

    def started(self, seq: RefSequence) -> None:
        """Its prefill has ended and its policies have compressed the prompt."""
        seq.decoding, seq.steps, seq.in_sawtooth = True, 0, False
        self.cache.look_ahead(seq, returned=True)
        self.pool.resize(seq, self.cache.units_kept(seq))

    def stepped(self, seq: RefSequence) -> None:
        """It has done one more decode step."""
        seq.steps += 1
        self.cache.look_ahead(seq)
        self.pool.resize(seq, self.cache.units_kept(seq))

    def finish(self, seq: RefSequence) -> None:
        self.running.remove(seq)
        self.pool.resize(seq, 0)


class RefV1(RefScheduler):
    def schedule(self) -> RefStep | None:
        engine, pool, cache = self.engine, self.pool, self.cache
        budget, preempted = engine.max_num_batched_tokens, False
        chunks: list[tuple[RefSequence, Chunk]] = []
        decoding: list[RefSequence] = []
        place = 0
        while place < len(self.running) and budget:
            seq = self.running[place]
            chunk = 1 if seq.decoding else min(budget, seq.prefill_tokens - seq.computed_tokens)
            units = cache.units_in_step(seq) if seq.decoding else cache.prefill_units(seq.computed_tokens + chunk)
            while seq in self.running and units - seq.held > pool.free:
                self.preempt()
                preempted = True
            if seq not in self.running:
                break
            pool.resize(seq, units)
            if seq.decoding:
                decoding.append(seq)
            else:
                chunks.append((seq, Chunk(chunk, seq.computed_tokens)))
            budget -= chunk
            place += 1
        while self.waiting and budget and not preempted and len(self.running) < engine.max_num_seqs:
            seq = self.waiting[0]
            hits = pool.hits(seq)
            said = min(seq.request.cached_prompt_tokens, seq.prefill_tokens - 1)
            cached = max(said, len(hits) * engine.block_size_tokens)
            chunk = min(budget, seq.prefill_tokens - cached)
            tokens = seq.prefill_tokens if engine.reserve_full_prompt else cached + chunk
            in_use = sum(1 for block in hits if block.users)
            if cache.prefill_units(tokens) - in_use > pool.free:
                break
            self.admit(seq, cached, hits)
            pool.resize(seq, cache.prefill_units(cached + chunk))
            chunks.append((seq, Chunk(chunk, cached)))
            budget -= chunk
        self.note_peak()
        if chunks or decoding:
            return RefStep(chunks, decoding)
        return self.schedule() if preempted else None


class RefTrtLlm(RefV1):
    """In-flight batching that admits only what can run to its end; with max_utilization, vLLM's way without a prefix cache."""

    def schedule(self) -> RefStep | None:
        engine, pool, cache = self.engine, self.pool, self.cache
        no_evict = engine.capacity_policy == "guaranteed_no_evict"
        budget, preempted = engine.max_num_tokens, False
        chunks: list[tuple[RefSequence, Chunk]] = []
        decoding: list[RefSequence] = []
        place = 0
        while place < len(self.running) and budget:
            seq = self.running[place]
            chunk = 1 if seq.decoding else min(budget, seq.prefill_tokens - seq.computed_tokens)
            units = cache.units_in_step(seq) if seq.decoding else cache.prefill_units(seq.computed_tokens + chunk)
            while seq in self.running and units - seq.held > pool.free:
                assert not no_evict
                self.preempt()
                preempted = True
            if seq not in self.running:
                break
            pool.resize(seq, units)
            if seq.decoding:
                decoding.append(seq)
            else:
                chunks.append((seq, Chunk(chunk, seq.computed_tokens)))
            budget -= chunk
            place += 1
        while self.waiting and budget and not preempted and len(self.running) < engine.max_batch_size:
            seq = self.waiting[0]
            cached = min(seq.request.cached_prompt_tokens, seq.prefill_tokens - 1)
            chunk = min(budget, seq.prefill_tokens - cached)
            if not engine.chunked_context and chunk < seq.prefill_tokens - cached:
                break
            promised = sum(cache.peak_units(s.request.prompt_tokens, s.request.output_tokens) for s in [*self.running, seq])
            if (no_evict and promised > pool.capacity) or cache.prefill_units(cached + chunk) > pool.free:
                break
            self.admit(seq, cached, [])
            pool.resize(seq, cache.prefill_units(cached + chunk))
            chunks.append((seq, Chunk(chunk, cached)))
            budget -= chunk
        self.note_peak()
        if chunks or decoding:
            return RefStep(chunks, decoding)
        return self.schedule() if preempted else None


class RefSgLang(RefScheduler):
    """Prefills first, beside an estimate of what is still to come."""

    def __init__(self, engine: Any, pool: RefPool, cache: RefCache, model: Any) -> None:
        super().__init__(engine, pool, cache, model)
        self.steps, self.ratio, self.ratio_step, self.changed = 0, 0.7, 0, False

    def arrive(self, request: Request) -> None:
        self.changed |= not self.waiting
        super().arrive(request)

    def finish(self, seq: RefSequence) -> None:
        super().finish(seq)
        self.changed = True

    def schedule(self) -> RefStep | None:
        decoding = [seq for seq in self.running if seq.decoding]
        if self.changed or len(decoding) < len(self.running) or not decoding or self.steps % 8 == 0:
            chunks = self._prefills()
            self.changed = bool(chunks)
            if chunks:
                return RefStep(chunks, [])
        retracted = False
        while len(decoding) > 1 and sum(self.cache.units_in_step(seq) - seq.held for seq in decoding) > self.pool.free:
            self.preempt()
            decoding.pop()
            retracted = True
        if retracted:
            done = sum(seq.generated + 20 for seq in decoding)
            self.ratio, self.ratio_step = min(1.0, done / sum(seq.output_tokens for seq in decoding)), self.steps
        if not decoding:
            return None
        for seq in decoding:
            self.pool.resize(seq, self.cache.units_in_step(seq))
        self.note_peak()
        self.steps += 1
        return RefStep([], decoding)

    def _prefills(self) -> list[tuple[RefSequence, Chunk]]:
        engine, units_of = self.engine, self.cache.prefill_units
        budget, ratio = engine.chunked_prefill_size_tokens, max(0.098, self.ratio - (self.steps - self.ratio_step) * (0.7 - 0.098) / 600)
        chunks: list[tuple[RefSequence, Chunk]] = []
        for seq in self.running:
            if not seq.decoding:
                chunk = min(budget, seq.prefill_tokens - seq.computed_tokens)
                chunks.append((seq, Chunk(chunk, seq.computed_tokens)))
                budget -= chunk
                if seq.computed_tokens + chunk < seq.prefill_tokens:
                    return chunks
        while self.waiting and budget and len(self.running) < engine.max_running_requests:
            seq = self.waiting[0]
            cached = min(seq.request.cached_prompt_tokens, seq.prefill_tokens - 1)
            kept = sum(units_of(int(min(s.output_tokens - s.generated, 4096) * ratio)) for s in self.running)
            still = min(seq.output_tokens - seq.generated, 4096)
            if self.running and units_of(seq.prefill_tokens + still) > self.pool.free - kept:
                break
            chunk = min(budget, seq.prefill_tokens - cached)
            self.admit(seq, cached, [])
            self.pool.resize(seq, units_of(seq.prefill_tokens))
            self.note_peak()
            chunks.append((seq, Chunk(chunk, cached)))
            budget -= chunk
            if cached + chunk < seq.prefill_tokens:
                break
        return chunks


class RefV0(RefScheduler):
    def __init__(self, engine: Any, pool: RefPool, cache: RefCache, model: Any) -> None:
        super().__init__(engine, pool, cache, model)
        self.watermark = int(engine.watermark_frac * pool.capacity)
        self.spare = cache.plan.prefill_units_per_block
        self.host_units = int(engine.swap_space_gib * GIB) // cache.plan.unit_bytes

    def schedule(self) -> RefStep | None:
        if not self.swapped:
            chunks = self._prefills()
            if chunks:
                return RefStep(chunks, [])
        pool, cache, moved, preempted = self.pool, self.cache, 0, False
        place = 0
        while place < len(self.running):
            seq = self.running[place]
            units = cache.units_in_step(seq)
            while (
                seq in self.running and len(self.running) > 1 and max(self.spare, units - seq.held) > pool.free
            ):
                moved += self._leave()
                preempted = True
            if seq not in self.running:
                break
            pool.resize(seq, units)
            place += 1
        if not preempted:
            moved += self._return()
        self.note_peak()
        return RefStep([], list(self.running), moved) if self.running else None

    def _prefills(self) -> list[tuple[RefSequence, Chunk]]:
        engine, pool, cache = self.engine, self.pool, self.cache
        budget = engine.prefill_budget(self.model)
        chunks: list[tuple[RefSequence, Chunk]] = []
        while self.waiting and len(self.running) < engine.max_num_seqs:
            seq = self.waiting[0]
            cached = min(seq.request.cached_prompt_tokens, seq.prefill_tokens - 1)
            chunk = seq.prefill_tokens - cached
            units = cache.prefill_units(seq.prefill_tokens)
            if chunk > budget or units > pool.free - (self.watermark if self.running else 0):
                break
            self.admit(seq, cached, [])
            pool.resize(seq, units)
            self.note_peak()
            chunks.append((seq, Chunk(chunk, cached)))
            budget -= chunk
        return chunks

    def _leave(self) -> int:
        """Preempts whoever was admitted last; returns the units that go to the host."""
        seq = self.running[-1]
        units = self.cache.units_kept(seq)
        if self.engine.preemption == "recompute" or units > self.host_units:
            self.preempt()
            return 0
        self.running.pop()
        self.pool.resize(seq, 0)
        self.host_units -= units
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.swapped.insert(0, seq)
        return units

    def _return(self) -> int:
        cache, pool, moved = self.cache, self.pool, 0
        while self.swapped and len(self.running) < self.engine.max_num_seqs:
            seq = self.swapped[0]
            on_host = cache.units_kept(seq)
            cache_before = seq.in_sawtooth
            cache.look_ahead(seq, returned=True)
            units = cache.units_kept(seq)
            room = units + self.watermark + 2 * self.spare if self.running else cache.units_in_step(seq)
            if room > pool.free:
                seq.in_sawtooth = cache_before
                break
            self.running.append(self.swapped.pop(0))
            self.host_units += on_host
            pool.resize(seq, cache.units_in_step(seq))
            moved += on_host
        return moved


class RefStatic(RefScheduler):
    """Hugging Face: a batch of what waits, padded alike; beams; everyone leaves together."""

    def schedule(self) -> RefStep | None:
        if self.running:
            for seq in self.running:
                self.pool.resize(seq, self.cache.units_in_step(seq))
            self.note_peak()
            return RefStep([], list(self.running))
        size = min(self.engine.batch_size, len(self.waiting))
        while size > 1 and self._units(self.waiting[:size]) > self.pool.capacity and self.engine.fit_batch:
            size -= 1
        if not size:
            return None
        members = self.waiting[:size]
        if self._units(members) > self.pool.capacity:
            raise StuckError("the batch does not fit")
        prompt = max(seq.request.prompt_tokens for seq in members)
        output = max(seq.request.output_tokens for seq in members)
        chunks: list[tuple[RefSequence, Chunk]] = []
        for seq in members:
            seq.prompt_tokens, seq.prefill_tokens, seq.output_tokens = prompt, prompt, output
            self.admit(seq, 0, [])
            beams = [RefSequence(seq.request, prompt, output, prompt, True) for _ in range(self.engine.num_beams - 1)]
            self.running += beams
            for beam in (seq, *beams):
                self.pool.resize(beam, self.cache.prefill_units(prompt))
                chunks.append((beam, Chunk(prompt, 0)))
        self.note_peak()
        return RefStep(chunks, [])

    def _units(self, members: list[RefSequence]) -> int:
        prompt = max(seq.request.prompt_tokens for seq in members)
        output = max(seq.request.output_tokens for seq in members)
        return len(members) * self.engine.num_beams * self.cache.peak_units(prompt, output)


SCHEDULERS = {
    "vllm_v1": RefV1, "vllm_v0": RefV0, "trtllm": RefTrtLlm, "sglang": RefSgLang, "huggingface": RefStatic,
}  # fmt: skip


class RefFrontEnd(RequestSource):
    """Requests that can be seen so long after they were sent."""

    def __init__(self, source: RequestSource, delay_ps: int) -> None:
        self.source, self.delay_ps, self.hash_block_tokens = source, delay_ps, source.hash_block_tokens
        self.take, self.completed = source.take, source.completed  # type: ignore[method-assign]

    def __getattribute__(self, name: str) -> Any:
        if name == "next_arrival_ps":
            sent = self.source.next_arrival_ps
            return None if sent is None else sent + self.delay_ps
        return super().__getattribute__(name)


# -- the loop -----------------------------------------------------------------------------------------------------------


class StepRecord(NamedTuple):
    start_ps: int
    duration_ps: int
    num_decodes: int
    prefill_tokens: int
    num_first_tokens: int
    held_units: int


@dataclass
class RefResult:
    requests: dict[int, dict[str, int]] = field(default_factory=dict)  # by index, REQUEST_FIELDS
    steps: list[StepRecord] = field(default_factory=list)
    gaps_ps: Counter[int] = field(default_factory=Counter)  # between the tokens of a sequence, beams included
    op_ps: dict[str, int] = field(default_factory=dict)
    end_ps: int = 0
    num_preemptions: int = 0
    peak_units: int = 0


class RefReplica:
    """One engine, asked to begin a step and told when it has ended.

    contended: costs while a side stream is busy; None where policies act in the step.
    """

    def __init__(
        self, engine: Engine, plan: CachePlan, pool: RefPool, source: RequestSource, costs: StepCosts,
        contended: StepCosts | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.pool, self.source, self.costs, self.contended = plan, pool, source, costs, contended
        self.result, self.side_busy_until = RefResult(), 0
        self.scheduler = SCHEDULERS[engine.kind](engine, pool, RefCache(plan), costs.model)
        self.inbox: list[Request] = []  # routed here during the step under way
        names = ("overlap_scheduler", "overlap_schedule", "async_scheduling")
        self.ahead = any(getattr(engine, name, False) for name in names)
        self.step: RefStep | None = None
        self.started_ps, self.ends_ps = 0, 0

    def begin(self, now: int) -> bool:
        """At a boundary; whether there is a step to do."""
        scheduler, costs, contended, pool = self.scheduler, self.costs, self.contended, self.pool
        step = None
        if self.ahead and (scheduler.running or scheduler.waiting or scheduler.swapped):
            step = scheduler.schedule()  # without those who came since the last step began
        for request in self.inbox:
            scheduler.arrive(request)
        self.inbox.clear()
        step = self.step = scheduler.schedule() if step is None else step
        if step is None:
            return False
        # What the step costs.
        current = contended if contended is not None and now < self.side_busy_until else costs
        state = RefState(scheduler.cache, step.decoding) if step.decoding else None
        self.ending = [seq for seq, chunk in step.chunks if chunk.prior_tokens + chunk.new_tokens == seq.prefill_tokens]
        self.compressed = [
            (seq.prompt_tokens, seq.prefill_tokens) for seq in self.ending if seq.generated + 1 < seq.output_tokens
        ]
        if step.chunks:
            duration = current.prefill_step(
                state, [chunk for _, chunk in step.chunks], len(step.decoding) + len(self.ending),
                self.compressed if contended is None else [],
            )  # fmt: skip
        else:
            assert state is not None
            duration = current.decode_step(state)
        if step.moved_units:
            answer = costs.profile.answer(Copy("host", step.moved_units * self.plan.unit_bytes))
            moved_ps = round(answer.seconds * PS_PER_S)
            costs.spend_transfer(moved_ps, answer)
            duration += moved_ps
        self.result.steps.append(
            StepRecord(
                now, duration, len(step.decoding), sum(chunk.new_tokens for _, chunk in step.chunks), len(self.ending),
                pool.capacity - pool.free,
            )
        )  # fmt: skip
        self.started_ps, self.ends_ps = now, now + duration
        return True

    def end(self) -> None:
        """The step ends, at `ends_ps`."""
        step, now, scheduler, result, source = self.step, self.ends_ps, self.scheduler, self.result, self.source
        assert step is not None
        self.step = None
        if self.contended is not None:
            for prompt_tokens, prefill_tokens in self.compressed:  # one after the other, once the prefill is done
                self.side_busy_until = max(self.side_busy_until, now) + self.contended.side_ps(prompt_tokens, prefill_tokens)
        for seq in step.decoding:
            _token(seq, now, result)
            if seq.generated == seq.output_tokens:
                _finish(seq, now, scheduler, source, result)
            else:
                scheduler.stepped(seq)
        for seq, chunk in step.chunks:
            seq.computed_tokens += chunk.new_tokens
            if seq.scheduled_ps < 0:
                seq.scheduled_ps = self.started_ps
            self.pool.computed(seq)
            if seq.computed_tokens < seq.prefill_tokens:
                continue
            _token(seq, now, result)
            if seq.generated == seq.output_tokens:
                _finish(seq, now, scheduler, source, result)
            else:
                scheduler.started(seq)

    def close(self) -> RefResult:
        """Nothing will arrive any more."""
        scheduler, result = self.scheduler, self.result
        if scheduler.waiting or scheduler.swapped:
            raise StuckError(f"{len(scheduler.waiting)} wait, {len(scheduler.swapped)} are swapped out, none fits")
        assert self.pool.free == self.pool.capacity
        result.end_ps = max((step.start_ps + step.duration_ps for step in result.steps), default=0)
        result.num_preemptions, result.peak_units = scheduler.num_preemptions, scheduler.peak_units
        for account in (self.costs, self.contended):
            for label, value in account.op_times().items() if account is not None else ():
                result.op_ps[label] = result.op_ps.get(label, 0) + value
        return result

    # -- what a router knows --------------------------------------------------------------------------------------

    def outstanding_tokens(self) -> int:
        """Prompt tokens, and tokens that are there by now, of all requests sent here and not answered."""
        scheduler = self.scheduler
        served = [*scheduler.waiting, *scheduler.running, *scheduler.swapped]
        tokens = sum(seq.request.prompt_tokens + seq.generated for seq in served if not seq.is_beam)
        return tokens + sum(request.prompt_tokens for request in self.inbox)

    def kv_use(self) -> float:
        return (self.pool.capacity - self.pool.free) / self.pool.capacity


def simulate_reference(
    engine: Engine, plan: CachePlan, pool: RefPool, source: RequestSource, costs: StepCosts,
    contended: StepCosts | None = None,
) -> RefResult:  # fmt: skip
    """Every step of serving `source` on one replica."""
    replica, now = RefReplica(engine, plan, pool, source, costs, contended), 0
    while True:
        while source.next_arrival_ps is not None and source.next_arrival_ps <= now:
            replica.inbox.append(source.take())
        if replica.begin(now):
            now = replica.ends_ps
            replica.end()
        elif source.next_arrival_ps is not None:
            now = source.next_arrival_ps
        else:
            return replica.close()


class RefRouter:
    """The same choices by looking at every replica anew."""

    def __init__(self, router: Any, weights: SequenceOf[float], replicas: SequenceOf[RefReplica]) -> None:
        self.kind, self.weights, self.replicas = router.kind, weights, replicas
        self.random = Random(getattr(router, "seed", 0))
        self.sent = [0] * len(weights)
        self.last = [-1] * len(weights)  # which request of all was the last that it got
        self.seen: list[list[tuple[int, float]]] = []  # at each choice: (outstanding tokens, KV use) of every replica

    def choose(self) -> int:
        self.seen.append([(replica.outstanding_tokens(), replica.kv_use()) for replica in self.replicas])
        numbers = list(range(len(self.weights)))
        if self.kind == "random":
            best = self.random.choices(numbers, self.weights)[0]
        else:
            if self.kind == "power_of_two" and len(numbers) > 1:
                first = int(len(numbers) * self.random.random())
                others = [i for i in numbers if i != first]
                numbers = [first, others[int(len(others) * self.random.random())]]
            best = min(numbers, key=lambda i: (self.load(i), -1 if self.kind == "round_robin" else self.last[i], i))
        self.last[best] = sum(self.sent)
        self.sent[best] += 1
        return best

    def load(self, i: int) -> float:
        if self.kind == "round_robin":
            return (self.sent[i] + 1) / self.weights[i]
        if self.kind == "least_kv_use":
            return self.replicas[i].kv_use()
        return self.replicas[i].outstanding_tokens() / self.weights[i]


def simulate_fleet_reference(
    replicas: SequenceOf[RefReplica], source: RequestSource, routing: RefRouter
) -> list[RefResult]:
    """Every step of a fleet. In each instant steps end, then arrivals are routed one by one, then steps begin."""
    now = 0
    while True:
        for replica in replicas:
            if replica.step is not None and replica.ends_ps == now:
                replica.end()
        while source.next_arrival_ps is not None and source.next_arrival_ps <= now:
            replicas[routing.choose()].inbox.append(source.take())
        for replica in replicas:
            if replica.step is None:
                replica.begin(now)
        coming = [replica.ends_ps for replica in replicas if replica.step is not None]
        if source.next_arrival_ps is not None:
            coming.append(source.next_arrival_ps)
        if not coming:
            return [replica.close() for replica in replicas]
        now = min(coming)


def _token(seq: RefSequence, now: int, result: RefResult) -> None:
    seq.generated += 1
    if seq.first_token_ps < 0:
        seq.first_token_ps = now
    else:
        result.gaps_ps[now - seq.last_token_ps] += 1
    seq.last_token_ps = now


def _finish(seq: RefSequence, now: int, scheduler: RefScheduler, source: RequestSource, result: RefResult) -> None:
    scheduler.finish(seq)
    if seq.is_beam:
        return
    request = seq.request
    values = (
        request.index, request.arrival_ps, seq.scheduled_ps, seq.first_token_ps, now, request.prompt_tokens,
        request.output_tokens, seq.cached_tokens, seq.num_preemptions,
    )  # fmt: skip
    result.requests[request.index] = dict(zip(REQUEST_FIELDS, values, strict=True))
    source.completed(request, now)


# -- comparison ---------------------------------------------------------------------------------------------------------


def expand(log: RunLog) -> tuple[list[StepRecord], list[tuple[int, int]], Counter[int]]:
    """The log's rows step by step; (step, held units) at the end of each row; and its token gaps.

    Steps do not carry held units (-1): the log has them at the ends of rows only.
    """
    rows = [dict(zip(log.step_columns(), map(int, row), strict=True)) for row in zip(*log.step_columns().values())]  # noqa: B905
    steps: list[StepRecord] = []
    held: list[tuple[int, int]] = []
    gaps: Counter[int] = Counter(log.resumed_gaps_ps)
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and rows[last]["start_ps"] == rows[first]["start_ps"]:
            last += 1
        together, now = rows[first:last], rows[first]["start_ps"]
        for j in range(together[0]["num_steps"]):
            for row in together:
                assert row["num_steps"] == together[0]["num_steps"], "interleaved rows must be equally long"
                duration = row["first_step_ps"] + j * row["step_growth_ps"]
                steps.append(
                    StepRecord(now, duration, row["num_decodes"], row["prefill_tokens"], row["num_first_tokens"], -1)
                )
                now += duration
                gaps[duration] += row["num_decodes"]
                if j == row["num_steps"] - 1:
                    held.append((len(steps) - 1, row["held_units"]))
        first = last
    for row, extra, number in zip(*(map(int, column) for column in log.stall_columns().values())):  # noqa: B905
        duration = rows[row]["first_step_ps"]
        gaps[duration] -= number
        gaps[duration + extra] += number
    return steps, held, Counter({gap: number for gap, number in gaps.items() if number})


def differences(log: RunLog, truth: RefResult) -> list[str]:
    """What the fast simulation's log says otherwise than the reference; the first few of each kind."""
    found: list[str] = []

    def differ(what: str, fast: object, reference: object) -> None:
        if fast != reference:
            found.append(f"{what}: kvsim {fast}, reference {reference}")

    columns = log.request_columns()
    requests = {
        int(index): {name: int(columns[name][i]) for name in REQUEST_FIELDS} for i, index in enumerate(columns["index"])
    }
    differ("requests answered", sorted(requests), sorted(truth.requests))
    for index in sorted(set(requests) & set(truth.requests)):
        for name in REQUEST_FIELDS:
            differ(f"request {index} {name}", requests[index][name], truth.requests[index][name])
    steps, held, gaps = expand(log)
    differ("steps", len(steps), len(truth.steps))
    wrong = [i for i, (a, b) in enumerate(zip(steps, truth.steps, strict=False)) if a[:5] != b[:5]]
    for i in wrong[:3]:
        differ(f"step {i} (start, duration, decodes, prefill tokens, first tokens)", steps[i][:5], truth.steps[i][:5])
    late = [(i, units) for i, units in held if i < len(truth.steps) and units != truth.steps[i].held_units]
    for i, units in late[:3]:
        differ(f"held units in step {i}, the last of a row", units, truth.steps[i].held_units)
    differ("token gaps", sorted((gaps - truth.gaps_ps).items())[:4], sorted((truth.gaps_ps - gaps).items())[:4])
    differ("preemptions", log.num_preemptions, truth.num_preemptions)
    differ("end_ps", log.end_ps, truth.end_ps)
    differ("peak held units", log.peak_held_units, truth.peak_units)
    differ("allocated - freed units", log.units_allocated - log.units_freed, 0)
    for label in sorted({*log.op_ps, *truth.op_ps}):
        differ(f"op_ps {label}", log.op_ps.get(label, 0), truth.op_ps.get(label, 0))
    return found


def check_against_reference(scenario: Scenario, policy_name: str, result: PolicyResult | None = None) -> RefResult:
    """Serves a scenario under one of its policies step by step; AssertionError where `result` (made if None) differs.

    Takes some 50 µs a token: a few hundred requests. Limit them in the scenario's workload.
    """
    deployment = deploy(scenario)
    plan = build_plan(deployment, scenario.policies[policy_name], f"policies.{policy_name}")
    if result is None:
        result = run_policy(scenario, deployment, policy_name, plan)
    engine, source = deployment.engine, build_source(scenario.workload, scenario.base_dir)
    capacity, size = result.pool_units, engine.block_tokens
    pool = reference_pool(engine, plan, capacity, source)
    pool_slots = capacity // plan.prefill_units_per_block * size * plan.shape.num_pairs

    def costs(hbm_share: float = 1.0) -> StepCosts:
        return StepCosts(
            deployment.model, deployment.tp, deployment.weight_dtype, engine, plan, deployment.profile, pool_slots, hbm_share
        )

    contended = costs(1 - engine.side_stream_hbm_frac) if engine.policy_stream == "side" else None
    truth = simulate_reference(engine, plan, pool, source, costs(), contended)
    found = differences(result.log, truth)
    assert not found, "\n".join(found)
    return truth
