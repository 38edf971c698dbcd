"""The sequences in decode, kept as sums, so that a run of many steps costs no more than one.

Every decoding sequence advances by one token in every decode step, so what a step reads is a straight line in the number of
steps until some sequence changes: it finishes, or its policy's segment ends. Those moments wait in one heap.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count

from kvsim.policies.compose import CachePlan, Segment
from kvsim.requests import Request


class Sequence:
    """A request being served. Times are picoseconds; units are those of the block pool."""

    __slots__ = (
        "cached_tokens",
        "computed_tokens",
        "decode_start",
        "decode_steps",
        "event",
        "finish_step",
        "first_token_ps",
        "generated",
        "held_units",
        "is_beam",
        "join_step",
        "last_token_ps",
        "num_preemptions",
        "output_tokens",
        "prefill_tokens",
        "prompt_tokens",
        "request",
        "scheduled_ps",
        "segment",
        "segment_start",
        "shared_blocks",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.prompt_tokens = request.prompt_tokens  # with padding, where the engine pads
        self.output_tokens = request.output_tokens  # for which it stays in the batch
        self.is_beam = False  # a further beam of a request: it takes part in everything but the records
        self.prefill_tokens = request.prompt_tokens  # tokens to compute before the next one can be sampled
        self.computed_tokens = 0  # of those
        self.generated = 0
        self.cached_tokens = 0
        self.num_preemptions = 0
        self.scheduled_ps = -1
        self.first_token_ps = -1
        self.last_token_ps = -1
        self.held_units = 0  # outside decode; in decode it follows from the segment
        self.event = -1
        self.segment: Segment | None = None
        self.segment_start = 0
        self.decode_start = 0  # the batch's step count when its prefill had ended
        self.join_step = 0  # the batch's step count when it joined, and that of its last token
        self.finish_step = 0
        self.decode_steps = 0  # decode steps done when it was swapped out
        # Its leading blocks as the prefix cache knows them: by key, or None for a copy that cannot be found.
        self.shared_blocks: list[int | tuple[int, int] | None] = []


class DecodeBatch:
    """Sums over the sequences in decode. `step` counts decode steps of the whole simulation; sums are those of the next one."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self.step = 0
        self.size = 0
        self.read = [0] * plan.num_scalars
        self.growth = [0] * plan.num_scalars
        self.actions = [0] * len(plan.acting)  # slots that policies handle in the next step
        self.acting = False
        self.longest_bound = [0] * plan.num_layer_groups
        """Never below the longest sequence until the batch changes again; exact when `longest` has just been asked."""
        self.members: dict[Sequence, None] = {}
        self.block_size = plan.shape.block_size_tokens
        self.need = [0] * self.block_size  # units that sequences take in steps of that residue
        self.need_total = 0
        self._lane_units, self._window_units = plan.lane_units, plan.window_units
        self._layer_groups = range(plan.num_layer_groups)
        self.period = 0
        self.teeth: list[int] = []  # sequences at phase 0 in steps of that residue
        self.tooth_actions: list[list[int]] = []  # slots handled in steps of that residue, by policy
        self.num_periodic = 0
        self.tooth_units = plan.tooth or (0,) * plan.num_scalars
        self.events: list[tuple[int, int, Sequence]] = []
        self._ids = count()

    # -- membership -----------------------------------------------------------------------------------------------

    def join(self, sequence: Sequence, steps_done: int = 0) -> int:
        """A sequence starts to decode, or comes back after `steps_done` steps; returns the units it holds from now on."""
        step = self.step
        sequence.decode_start = step - steps_done
        sequence.join_step = step
        sequence.finish_step = step + sequence.output_tokens - sequence.generated
        self.members[sequence] = None
        self.size += 1
        segment = self.plan.segment(sequence.prompt_tokens, sequence.prefill_tokens, steps_done + 1)
        self._enter(sequence, segment)
        return segment.held_units

    def leave(self, sequence: Sequence) -> int:
        """Takes a sequence out; returns the units it held."""
        held = self._exit(sequence)
        sequence.generated += self.step - sequence.join_step
        sequence.event = -1
        del self.members[sequence]
        self.size -= 1
        if not self.size:
            self.longest_bound = [0] * self.plan.num_layer_groups
            self.events.clear()
        return held

    def held(self, sequence: Sequence) -> int:
        """Pool units that a member holds."""
        segment = sequence.segment
        assert segment is not None
        return self.plan.lane_held(segment.tokens, segment.d_tokens, self.step - sequence.segment_start)

    def turn(self, sequence: Sequence) -> int:
        """The sequence's segment has ended and the next begins; returns the change of the units it holds (never above 0)."""
        before = self._exit(sequence)
        step = self.step - sequence.decode_start + 1
        segment = self.plan.segment(sequence.prompt_tokens, sequence.prefill_tokens, step)
        self._enter(sequence, segment)
        return segment.held_units - before

    def _enter(self, sequence: Sequence, segment: Segment) -> None:
        step = self.step
        sequence.segment, sequence.segment_start = segment, step
        last = sequence.finish_step - step
        steps = segment.steps if segment.steps < last else last
        read, growth, d_read = self.read, self.growth, segment.d_read
        for i, value in enumerate(segment.read):
            read[i] += value
            growth[i] += d_read[i]
        bounds, longest, d_longest = self.longest_bound, segment.longest, segment.d_longest
        for i in self._layer_groups:
            end = longest[i] + d_longest[i] * (steps - 1)
            if end > bounds[i]:
                bounds[i] = end
        need, size = self.need, self.block_size
        tokens = segment.tokens
        for lane, slope in enumerate(segment.d_tokens):
            if slope:  # a block is taken in the step that begins it
                units = self._lane_units[lane]
                need[(step + 2 - tokens[lane]) % size] += units
                self.need_total += units
        if segment.period:
            self._tooth(segment, step, 1)
        if segment.actions is not None:
            self._act(segment, 1)
        event = sequence.event = next(self._ids)
        heappush(self.events, (step + steps, event, sequence))

    def _exit(self, sequence: Sequence) -> int:
        """Undoes `_enter` at the present step; returns the units held until now."""
        segment, start = sequence.segment, sequence.segment_start
        assert segment is not None
        done = self.step - start
        read, growth, d_read = self.read, self.growth, segment.d_read
        for i, value in enumerate(segment.read):
            slope = d_read[i]
            read[i] -= value + slope * done
            growth[i] -= slope
        need, size = self.need, self.block_size
        held, tokens = self._window_units, segment.tokens
        for lane, slope in enumerate(segment.d_tokens):
            units, start_tokens = self._lane_units[lane], tokens[lane]
            if slope:
                need[(start + 2 - start_tokens) % size] -= units
                self.need_total -= units
                held += units * -((1 - done - start_tokens) // size)
            else:
                held += units * -(-start_tokens // size)
        if segment.period:
            self._tooth(segment, start, -1)
        if not done and segment.actions is not None:  # leaves before the step in which it would have acted
            self._act(segment, -1)
        return held

    def _act(self, segment: Segment, sign: int) -> None:
        """Policies act on the sequence in the next step; sign -1 takes it back."""
        assert segment.actions is not None
        for i, slots in enumerate(segment.actions):
            self.actions[i] += sign * slots
        self.acting = any(self.actions)

    def _tooth(self, segment: Segment, start: int, sign: int) -> None:
        if segment.period != self.period:
            self.period = segment.period
            self.teeth = [0] * self.period
            self.tooth_actions = [[0] * self.period for _ in self.plan.acting]
        residue = (start + 1 - segment.phase) % self.period
        self.teeth[residue] += sign
        self.num_periodic += sign
        for i, slots in enumerate(segment.tooth_actions):
            self.tooth_actions[i][residue] += sign * slots

    # -- time -----------------------------------------------------------------------------------------------------

    def next_units(self) -> int:
        """Pool units that the next step takes."""
        return self.need[(self.step + 1) % self.block_size]

    def next_units_of(self, sequence: Sequence) -> int:
        """What one member takes of the pool in the next step."""
        segment, done = sequence.segment, self.step - sequence.segment_start
        assert segment is not None
        held = self.plan.lane_held
        return held(segment.tokens, segment.d_tokens, done + 1) - held(segment.tokens, segment.d_tokens, done)

    def units_needed(self, steps: int) -> int:
        """Pool units that the next `steps` steps take."""
        need, size = self.need, self.block_size
        cycles = steps // size
        taken = cycles * self.need_total
        first = (self.step + 1) % size
        last = first + steps - cycles * size
        if last > size:
            return taken + sum(need[first:]) + sum(need[: last - size])
        return taken + sum(need[first:last])

    def steps_within(self, free_units: int, max_steps: int) -> int:
        """How many of the next `max_steps` steps the pool can feed with `free_units`."""
        if not self.need_total:
            return max_steps
        size = self.block_size
        cycles = free_units // self.need_total  # each whole cycle takes need_total
        left, done = free_units - cycles * self.need_total, cycles * size
        while done < max_steps:
            left -= self.need[(self.step + 1 + done) % size]
            if left < 0:
                return done
            done += 1
        return max_steps

    def next_event(self) -> int:
        """The step after which some sequence finishes or turns. The batch must not be empty."""
        events = self.events
        while events[0][2].event != events[0][1]:
            heappop(events)
        return events[0][0]

    def advance(self, steps: int) -> None:
        """`steps` steps have been run."""
        self.step += steps
        for i, growth in enumerate(self.growth):
            self.read[i] += steps * growth
        if self.acting:
            self.acting = False
            self.actions = [0] * len(self.actions)

    def pop_events(self) -> list[Sequence]:
        """Sequences that finish or turn after the step just run, in the order they entered."""
        events, step, due = self.events, self.step, []
        while events and events[0][0] <= step:
            _, event, sequence = heappop(events)
            if sequence.event == event:
                due.append(sequence)
        return due

    # -- what the next step reads ---------------------------------------------------------------------------------

    def tooth_sum(self, step: int) -> int:
        """Sum over periodic sequences of their phase in that step."""
        period = self.period
        return sum([number * ((step - residue) % period) for residue, number in enumerate(self.teeth) if number])

    def reads(self) -> list[int]:
        """Scalar units that the next step reads."""
        if not self.num_periodic:
            return self.read
        teeth = self.tooth_sum(self.step + 1)
        return [value + tooth * teeth for value, tooth in zip(self.read, self.tooth_units, strict=True)]

    def action_slots(self) -> list[int] | None:
        """Slots that each policy's action handles in the next step; None where none acts."""
        if not self.num_periodic:
            return self.actions if self.acting else None
        residue = (self.step + 1) % self.period
        slots = [now + tooth[residue] for now, tooth in zip(self.actions, self.tooth_actions, strict=True)]
        return slots if any(slots) else None

    def longest(self, layer_group: int, offset: int = 0) -> int:
        """The longest sequence in the `offset`-th step from the next: O(batch), asked only where it may bind."""
        return max(value + slope * offset for value, slope in self.longest_lines(layer_group))

    def longest_lines(self, layer_group: int) -> list[tuple[int, int]]:
        """(units read in the next step, growth) of the longest sequence of each growth. A sawtooth counts as its peak."""
        lines: dict[int, int] = {}
        step = self.step
        for sequence in self.members:
            segment = sequence.segment
            assert segment is not None
            slope = segment.d_longest[layer_group]
            value = segment.longest[layer_group] + slope * (step - sequence.segment_start)
            if value > lines.get(slope, -1):
                lines[slope] = value
        return [(value, slope) for slope, value in lines.items()]


class PlainBatch(DecodeBatch):
    """A batch whose plan has one scalar and one lane: the same sums, without the loops over them."""

    def advance(self, steps: int) -> None:
        self.step += steps
        self.read[0] += steps * self.growth[0]
        if self.acting:
            self.acting = False
            self.actions = [0] * len(self.actions)

    def _enter(self, sequence: Sequence, segment: Segment) -> None:
        step = self.step
        sequence.segment, sequence.segment_start = segment, step
        steps, last = segment.steps, sequence.finish_step - step
        if steps > last:
            steps = last
        self.read[0] += segment.read[0]
        end = segment.longest[0]
        slope = segment.d_read[0]
        if slope:
            self.growth[0] += slope
            end += segment.d_longest[0] * (steps - 1)
        if end > self.longest_bound[0]:
            self.longest_bound[0] = end
        if segment.d_tokens[0]:
            units = self._lane_units[0]
            self.need[(step + 2 - segment.tokens[0]) % self.block_size] += units
            self.need_total += units
        if segment.period:
            self._tooth(segment, step, 1)
        if segment.actions is not None:
            self._act(segment, 1)
        event = sequence.event = next(self._ids)
        heappush(self.events, (step + steps, event, sequence))

    def _exit(self, sequence: Sequence) -> int:
        segment, start = sequence.segment, sequence.segment_start
        assert segment is not None
        done = self.step - start
        slope, tokens, units = segment.d_read[0], segment.tokens[0], self._lane_units[0]
        self.read[0] -= segment.read[0] + slope * done
        self.growth[0] -= slope
        held = self._window_units
        if segment.d_tokens[0]:
            self.need[(start + 2 - tokens) % self.block_size] -= units
            self.need_total -= units
            tokens += done - 1
        if segment.period:
            self._tooth(segment, start, -1)
        if not done and segment.actions is not None:
            self._act(segment, -1)
        return held + units * -(-tokens // self.block_size)


def decode_batch(plan: CachePlan) -> DecodeBatch:
    """The batch for a plan."""
    plain = plan.num_scalars == 1 and len(plan.lanes) == 1
    return PlainBatch(plan) if plain else DecodeBatch(plan)
