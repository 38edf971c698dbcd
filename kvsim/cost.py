"""What a step costs, in whole picoseconds, and what a run of steps costs in closed form.

`StepCosts` is the only place where Ops become time. The cost of one decode step is a function of state alone:

    host_before + max(host_floor, device) + host_after,
    device = fixed(batch size) + sum over layer groups of max(attention(batch, read), attention(1, longest)) + policy Ops

with every curve piecewise straight in whole units. `decode_run` adds up many such steps without visiting them; `decode_step`
evaluates one, and the tests hold the two together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from kvsim.batch import DecodeBatch
from kvsim.cost_types import Chunk
from kvsim.curves import Curve, steps_to_reach
from kvsim.engines.base import Engine
from kvsim.forward import head_ops, linear_ops
from kvsim.model import Model
from kvsim.ops import Copy, DecodeAttention, MixedAttention, Op, PolicyKernel, PrefillAttention
from kvsim.policies.compose import CachePlan
from kvsim.profile import Answer, Profile
from kvsim.units import PS_PER_S

ATTENTION = DecodeAttention.kind
_MAX_UNITS_LOG2 = 50


class Piece(NamedTuple):
    """Steps of straight length inside a run: `steps` steps, the first of `first_ps`, each `growth_ps` longer."""

    start_ps: int
    first_ps: int
    growth_ps: int
    steps: int


class Run(NamedTuple):
    """A run of decode steps: how many, how long together, and its pieces. Pieces of a sawtooth interleave."""

    steps: int
    elapsed_ps: int
    pieces: list[Piece]


class DecodeState(Protocol):
    """What the cost of a step is a function of; `DecodeBatch` keeps it as sums, the reference simulation step by step."""

    size: int
    longest_bound: list[int]

    def reads(self) -> Sequence[int]: ...
    def action_slots(self) -> Sequence[int] | None: ...
    def longest(self, layer_group: int) -> int: ...


class BatchTable:
    """Everything that depends on the number of decoding sequences alone."""

    __slots__ = ("after_ps", "curves", "fixed", "fixed_ps", "floor_ps", "host_ps", "steps")

    def __init__(self, fixed: dict[str, int], curves: list[tuple[int, Curve]], host_ps: tuple[int, int, int]) -> None:
        self.fixed, self.curves = fixed, curves
        self.fixed_ps = sum(fixed.values())
        before, self.floor_ps, after = host_ps
        self.host_ps = before + after
        self.steps = 0


def op_label(op: Op) -> str:
    """The row of the report in which an Op's time appears."""
    return f"{op.owner}:{op.kernel}" if isinstance(op, PolicyKernel) else op.kind


class StepCosts:
    """Costs of one policy on one engine, model and GPU, answered by a profile.

    pool_slots: (token, layer, KV head) triples that the whole block pool holds, for policies that pass over all of it.
    hbm_share: share of HBM bandwidth left to decoding by a transfer on a side stream.
    """

    def __init__(
        self, model: Model, tp: int, weight_dtype: str, engine: Engine, plan: CachePlan, profile: Profile,
        pool_slots: int, hbm_share: float = 1.0,
    ) -> None:  # fmt: skip
        self.model, self.tp, self.weight_dtype, self.engine, self.plan = model, tp, weight_dtype, engine, plan
        self.profile, self.pool_slots, self.hbm_share = profile, pool_slots, hbm_share
        self._tables: dict[int, BatchTable] = {}
        self._single: list[Curve] = []  # attention of one sequence, by layer group
        self._actions: list[Curve | None] = [None] * len(plan.acting)
        self.spent: dict[str, int] = {}
        self.basis: dict[str, Answer] = {}
        """The last answer given for each Op label: where its numbers come from."""
        self.busy_ps = 0
        self._side: StepCosts | None = None
        self.linear = lru_cache(maxsize=None)(self._linear)
        self.prefill_attention = lru_cache(maxsize=65536)(self._prefill_attention)
        self.compression = lru_cache(maxsize=65536)(self._compression)
        self.prefill_policy = lru_cache(maxsize=65536)(self._prefill_policy)
        self.host_ps = lru_cache(maxsize=None)(self._host_ps)
        self.prefill_op = lru_cache(maxsize=65536)(self._prefill_op)
        self._num_launches = engine.num_launches(model, tp)
        self._pool = self._answer((1, op) for op in plan.pool_ops(pool_slots))

    # -- tables, built on first use -------------------------------------------------------------------------------

    def _answer(self, ops: Iterable[tuple[int, Op]]) -> dict[str, int]:
        """Picoseconds by label of Ops launched so many times."""
        seconds: dict[str, float] = {}
        for times, op in ops:
            label = op_label(op)
            answer = self.profile.answer(op, self.hbm_share)
            self._rests_on(label, answer)
            seconds[label] = seconds.get(label, 0.0) + times * answer.seconds
        return {label: round(value * PS_PER_S) for label, value in seconds.items()}

    def _linear(self, num_tokens: int, num_sampled: int) -> tuple[int, dict[str, int]]:
        """Everything but attention and policies for so many tokens, of which so many sequences are sampled."""
        eager = not self.engine.captured(num_tokens)
        ops = list(linear_ops(self.model, self.tp, self.weight_dtype, self.engine.padded(num_tokens), eager))
        if num_sampled:
            ops += head_ops(self.model, self.tp, num_sampled, eager)
        parts = self._answer(ops)
        return sum(parts.values()), parts

    def _host_ps(self, batch: int, num_tokens: int) -> tuple[int, int, int]:
        for part in self.engine.host_ops(batch, num_tokens, self._num_launches):
            for op in part:
                self._rests_on("host", self.profile.answer(op))
        return self.engine.host_ps(self.profile, batch, num_tokens, self._num_launches)

    def _prefill_op(self, new_tokens: int, prior_tokens: int) -> PrefillAttention:
        shape = self.plan.shape
        return PrefillAttention(
            new_tokens, prior_tokens, shape.q_heads, shape.kv_heads, shape.head_dim, self.plan.kv_dtype
        )

    def _prefill_attention(self, new_tokens: int, prior_tokens: int) -> int:
        """All layers of one sequence's chunk."""
        answer = self.profile.answer(self.prefill_op(new_tokens, prior_tokens), self.hbm_share)
        self._rests_on(PrefillAttention.kind, answer)
        return round(self.plan.shape.num_layers * answer.seconds * PS_PER_S)

    def _mixed_attention(self, chunks: Sequence[Chunk], batch: int, reads: Sequence[int]) -> int:
        """All layers of prompt chunks and a decoding batch in one launch a layer: the largest chunk mixes, others add."""
        largest = max(chunks, key=lambda chunk: (chunk.new_tokens, chunk.prior_tokens))
        prefill, seconds = self.prefill_op(*largest), 0.0
        for i, layers in enumerate(self.plan.layers_of):
            op = MixedAttention(prefill, self.plan.attention(i, batch, reads[i], reads[i] / batch))
            answer = self.profile.answer(op, self.hbm_share)
            seconds += layers * answer.seconds
        self._rests_on(MixedAttention.kind, answer)
        rest = list(chunks)
        rest.remove(largest)
        return round(seconds * PS_PER_S) + sum(self.prefill_attention(*chunk) for chunk in rest)

    def _rests_on(self, label: str, answer: Answer) -> None:
        self.basis[label] = answer

    def _compression(self, prompt_tokens: int, prefill_tokens: int) -> tuple[int, dict[str, int]]:
        parts = self._answer((1, op) for op in self.plan.compress_ops(prompt_tokens, prefill_tokens))
        return sum(parts.values()), parts

    def _prefill_policy(self, new_tokens: int, prior_tokens: int) -> tuple[int, dict[str, int]]:
        parts = self._answer((1, op) for op in self.plan.prefill_ops(new_tokens, prior_tokens))
        return sum(parts.values()), parts

    def table(self, batch: int) -> BatchTable:
        """Tables of a batch of so many decoding sequences."""
        table = self._tables.get(batch)
        if table is None:
            fixed = dict(self.linear(batch, batch)[1])
            for label, value in self._pool.items():
                fixed[label] = fixed.get(label, 0) + value
            curves = [(i, self._attention_curve(i, batch)) for i in range(self.plan.num_layer_groups)]
            if self.plan.slots_scalar is not None:
                curves.append((self.plan.slots_scalar, self._slots_curve(batch)))
            table = self._tables[batch] = BatchTable(fixed, curves, self.host_ps(batch, batch))
        return table

    def _attention_curve(self, layer_group: int, batch: int, alone: bool = False) -> Curve:
        """Attention of a layer group by units read, with the Ops that policy and engine run in proportion."""
        plan, layers = self.plan, self.plan.layers_of[layer_group]
        op = plan.attention(layer_group, batch, 0, 0)
        knots = sorted({round(plan.units_of_slots(layer_group, slots)) for slots in self.profile.kv_knots(op)} | {0})
        seconds: dict[str, list[float]] = {ATTENTION: []}
        for units in knots:
            op = plan.attention(layer_group, batch, units, units / batch)
            answer = self.profile.answer(op, self.hbm_share)
            self._rests_on(ATTENTION, answer)
            seconds[ATTENTION].append(layers * answer.seconds)
        if alone:
            return Curve(knots, seconds)
        for i, units in enumerate(knots):
            num_bytes = units * plan.scalar_bytes[layer_group]
            ops = list(self.engine.cache_ops(plan.shape, batch, num_bytes, layers))
            if plan.has_step_ops and plan.slots_scalar is None:
                ops += plan.step_ops(batch, round(units * plan.slots_per_unit))
            self._add(seconds, ops, i, len(knots))
        return Curve(knots, seconds)

    def _add(self, seconds: dict[str, list[float]], ops: Iterable[Op], knot: int, num_knots: int) -> None:
        """Adds the answers of Ops at one knot to the values by label."""
        for op in ops:
            label, answer = op_label(op), self.profile.answer(op, self.hbm_share)
            self._rests_on(label, answer)
            seconds.setdefault(label, [0.0] * num_knots)[knot] += answer.seconds

    def _slots_curve(self, batch: int) -> Curve:
        knots = [0, *(1 << k for k in range(_MAX_UNITS_LOG2))]
        seconds: dict[str, list[float]] = {}
        for i, units in enumerate(knots):
            self._add(seconds, self.plan.step_ops(batch, units * self.plan.slots_unit), i, len(knots))
        return Curve(knots, seconds)

    def action(self, policy_index: int) -> Curve:
        """What a policy's action costs, by slots handled."""
        curve = self._actions[policy_index]
        if curve is None:
            knots = [0, *(1 << k for k in range(_MAX_UNITS_LOG2))]
            seconds: dict[str, list[float]] = {}
            for i, slots in enumerate(knots[1:], start=1):
                self._add(seconds, self.plan.acting[policy_index].action_ops(self.plan.shape, slots), i, len(knots))
            for values in seconds.values():
                values[0] = values[1]  # launches cost the same however little there is to do
            curve = self._actions[policy_index] = Curve(knots, seconds)
        return curve

    def single(self, layer_group: int) -> Curve:
        """Attention of one sequence alone: the floor that the longest sequence sets (DESIGN: skew)."""
        if not self._single:
            self._single = [self._attention_curve(i, 1, alone=True) for i in range(self.plan.num_layer_groups)]
        return self._single[layer_group]

    # -- one step -------------------------------------------------------------------------------------------------

    def _spend(self, parts: dict[str, int]) -> None:
        spent = self.spent
        for label, value in parts.items():
            spent[label] = spent.get(label, 0) + value

    def _reads_ps(self, table: BatchTable, state: DecodeState, reads: Sequence[int]) -> int:
        """One step's curves, attention no faster than that of the longest sequence; entered into the account."""
        total = 0
        for i, curve in table.curves:
            total += curve.charge(reads[i])
            if state.size > 1 and i != self.plan.slots_scalar:
                part, single = curve.part(ATTENTION, reads[i]), self.single(i)
                if single(state.longest_bound[i]) > part:
                    ahead = single(state.longest(i)) - part
                    if ahead > 0:
                        total += ahead
                        self._spend({ATTENTION: ahead})
        return total

    def _policy_reads_ps(self, table: BatchTable, reads: Sequence[int]) -> int:
        """What policy and engine run in proportion to what a step reads, without attention."""
        total = 0
        for i, curve in table.curves:
            for label in curve.parts:
                if label != ATTENTION:
                    value = curve.part(label, reads[i])
                    self._spend({label: value})
                    total += value
        return total

    def _actions_ps(self, slots: Sequence[int] | None, times: int = 1) -> int:
        if slots is None:
            return 0
        return sum(self.action(i).charge(value, times) for i, value in enumerate(slots) if value)

    def decode_step(self, state: DecodeState) -> int:
        """One step in which every sequence of the batch gets one token."""
        table = self.table(state.size)
        device = table.fixed_ps + self._reads_ps(table, state, state.reads()) + self._actions_ps(state.action_slots())
        table.steps += 1
        step = max(table.floor_ps, device) + table.host_ps
        self.busy_ps += step
        return step

    def prefill_step(
        self, state: DecodeState | None, chunks: Sequence[Chunk], num_sampled: int, compressed: Sequence[tuple[int, int]],
    ) -> int:  # fmt: skip
        """One step that computes prompt chunks, alone or beside the decoding batch.

        state: the decoding batch that advances in the same step, if any does. num_sampled: sequences that get a token.
        compressed: (prompt, prefill) tokens of the sequences whose prefill ends, which their policy now compresses.
        """
        spend = self._spend
        num_tokens = sum(chunk.new_tokens for chunk in chunks) + (state.size if state is not None else 0)
        total, parts = self.linear(num_tokens, num_sampled)
        spend(parts)
        spend(self._pool)
        total += sum(self._pool.values())
        for chunk in chunks:
            policy_ps, parts = self.prefill_policy(chunk.new_tokens, chunk.prior_tokens)
            total += policy_ps
            if parts:
                spend(parts)
        if state is not None and state.size:
            reads = state.reads()
            total += self._policy_reads_ps(self.table(state.size), reads) + self._actions_ps(state.action_slots())
            mixed_ps = self._mixed_attention(chunks, state.size, reads)
            spend({MixedAttention.kind: mixed_ps})
            total += mixed_ps
        else:
            prefill_ps = sum(self.prefill_attention(*chunk) for chunk in chunks)
            spend({PrefillAttention.kind: prefill_ps})
            total += prefill_ps
        for prompt_tokens, prefill_tokens in compressed:
            policy_ps, parts = self.compression(prompt_tokens, prefill_tokens)
            total += policy_ps
            if parts:
                spend(parts)
        before, floor, after = self.host_ps(num_sampled, num_tokens)
        step = max(floor, total) + before + after
        self.busy_ps += step
        return step

    def side_ps(self, prompt_tokens: int, prefill_tokens: int) -> int:
        """A prompt's compression on the side stream, at the bandwidth that decoding leaves it."""
        if self._side is None:
            self._side = StepCosts(
                self.model, self.tp, self.weight_dtype, self.engine, self.plan, self.profile, self.pool_slots,
                1 - self.hbm_share,
            )  # fmt: skip
        return self._side.compression(prompt_tokens, prefill_tokens)[0]

    def spend_transfer(self, duration_ps: int, answer: Answer) -> None:
        """Enters a host-link transfer that a step waited for."""
        self._spend({Copy.kind: duration_ps})
        self._rests_on(Copy.kind, answer)
        self.busy_ps += duration_ps

    # -- a run of steps -------------------------------------------------------------------------------------------

    def decode_run(self, batch: DecodeBatch, limit_ps: int | None, max_steps: int) -> Run:
        """Decode steps from the batch's next one on: `max_steps`, or fewer where an arrival `limit_ps` ahead is noticed.

        The run ends with the first step that ends at or after the arrival. No sequence may finish or turn before its last step.
        """
        table = self.table(batch.size)
        pieces: list[Piece] = []
        done = elapsed = 0
        if batch.acting and not batch.num_periodic:
            elapsed, done = self.decode_step(batch), 1
            pieces.append(Piece(0, elapsed, 0, 1))
            if max_steps == 1 or (limit_ps is not None and elapsed >= limit_ps):
                return Run(1, elapsed, pieces)
        if batch.num_periodic:
            return self._sawtooth_run(batch, table, limit_ps, max_steps)
        if batch.size > 1 and self._may_be_skewed(batch, table):
            return self._skewed_run(batch, table, limit_ps, max_steps, done, elapsed, pieces)
        curves, floor, host = table.curves, table.floor_ps, table.host_ps
        read, growth = batch.read, batch.growth
        while done < max_steps:
            steps, first, slope = max_steps - done, table.fixed_ps, 0
            cells = []
            for i, curve in curves:
                d = growth[i]
                x = read[i] + d * done
                xs = curve.xs
                cell = bisect_right(xs, x) - 1
                m = curve.ms[cell]
                x -= xs[cell]
                first += curve.ys[cell] + m * x
                if d:
                    slope += m * d
                    room = -((x - xs[cell + 1] + xs[cell]) // d)  # steps that begin inside the cell
                    if room < steps:
                        steps = room
                cells.append((curve, cell, x, d))
            if first < floor:
                if slope and first + slope * (steps - 1) > floor:
                    steps = -((first - floor) // slope)  # the steps that stay below what the host takes
                first, slope = floor, 0
            first += host
            if limit_ps is not None:
                steps = steps_to_reach(limit_ps - elapsed, first, slope, steps)
            pieces.append(Piece(elapsed, first, slope, steps))
            triangle = steps * (steps - 1) // 2
            elapsed += steps * first + slope * triangle
            done += steps
            for curve, cell, x, d in cells:
                curve.count[cell] += steps
                curve.offset[cell] += steps * x + d * triangle
            if limit_ps is not None and elapsed >= limit_ps:
                break
        table.steps += done - (1 if pieces and pieces[0].steps == 1 and batch.acting else 0)
        self.busy_ps += elapsed - (pieces[0].first_ps if batch.acting else 0)
        return Run(done, elapsed, pieces)

    def _may_be_skewed(self, batch: DecodeBatch, table: BatchTable) -> bool:
        """False where even the longest sequence at its end costs less alone than the batch does now."""
        for i, curve in table.curves:
            if i != self.plan.slots_scalar and self.single(i)(batch.longest_bound[i]) > curve.part(ATTENTION, batch.read[i]):
                return True
        return False

    def _skewed_run(
        self, batch: DecodeBatch, table: BatchTable, limit_ps: int | None, max_steps: int,
        done: int, elapsed: int, pieces: list[Piece],
    ) -> Run:  # fmt: skip
        """As `decode_run`, where the longest sequence may bind: pieces also end where it starts or stops to."""
        lines = {i: batch.longest_lines(i) for i in range(self.plan.num_layer_groups)}
        for i, top in lines.items():
            batch.longest_bound[i] = max(batch.longest_bound[i], *(value for value, _ in top))
        first_of_run, time_before = done, elapsed
        while done < max_steps:
            steps, first, slope = max_steps - done, table.fixed_ps, 0
            account = []
            for i, curve in table.curves:
                d = batch.growth[i]
                x = batch.read[i] + d * done
                a, b, room = _straight(curve, x, d)
                steps = min(steps, room)
                extra = extra_slope = 0
                if i != self.plan.slots_scalar:
                    part_a, part_b = _straight_part(curve, x, d)
                    longest, grows, room = _leader(lines[i], done)
                    steps = min(steps, room)
                    alone_a, alone_b, room = _straight(self.single(i), longest, grows)
                    steps = min(steps, room)
                    ahead, gains = alone_a - part_a, alone_b - part_b
                    if ahead > 0:
                        extra, extra_slope = ahead, gains
                        if gains < 0:
                            steps = min(steps, -(-ahead // -gains))  # while still ahead
                    elif gains > 0:
                        steps = min(steps, -ahead // gains + 1)  # while not ahead yet
                first += a + extra
                slope += b + extra_slope
                account.append((curve, x, d, extra, extra_slope))
            if first < table.floor_ps:
                if slope > 0 and first + slope * (steps - 1) > table.floor_ps:
                    steps = -((first - table.floor_ps) // slope)
                first, slope = table.floor_ps, 0
            elif slope < 0 and first + slope * (steps - 1) < table.floor_ps:
                steps = (first - table.floor_ps) // -slope + 1
            first += table.host_ps
            if limit_ps is not None:
                steps = steps_to_reach(limit_ps - elapsed, first, slope, steps) if slope >= 0 else _first_to_reach(
                    limit_ps - elapsed, first, slope, steps
                )
            pieces.append(Piece(elapsed, first, slope, steps))
            triangle = steps * (steps - 1) // 2
            elapsed += steps * first + slope * triangle
            done += steps
            for curve, x, d, extra, extra_slope in account:
                cell = bisect_right(curve.xs, x) - 1
                curve.count[cell] += steps
                curve.offset[cell] += steps * (x - curve.xs[cell]) + d * triangle
                if extra or extra_slope:
                    self._spend({ATTENTION: steps * extra + extra_slope * triangle})
            if limit_ps is not None and elapsed >= limit_ps:
                break
        table.steps += done - first_of_run
        self.busy_ps += elapsed - time_before
        return Run(done, elapsed, pieces)

    def _sawtooth_run(self, batch: DecodeBatch, table: BatchTable, limit_ps: int | None, max_steps: int) -> Run:
        """As `decode_run`, with sequences in a short sawtooth: one period is costed step by step, then repeated."""
        period, tooth = batch.period, self.plan.tooth
        assert tooth is not None
        skewed = batch.size > 1 and self._may_be_skewed(batch, table)
        flat = not any(batch.growth)
        done = elapsed = 0
        pieces: list[Piece] = []
        while done < max_steps:
            costs: list[int] = []
            for j in range(min(period, max_steps - done)):
                costs.append(self._tooth_step(batch, table, done + j, tooth, skewed))
            cycle = sum(costs)
            # Actions of sequences that just turned happen in the run's first step alone.
            repeats = 1
            if flat and len(costs) == period and not (done == 0 and batch.acting):
                repeats = (max_steps - done) // period
                if limit_ps is not None:
                    repeats = min(repeats, max(1, (limit_ps - elapsed - 1) // cycle))
            taken = len(costs)
            if limit_ps is not None and repeats == 1:
                reached = elapsed
                for j, cost in enumerate(costs):
                    reached += cost
                    if reached >= limit_ps:
                        taken = j + 1
                        break
            offset = elapsed
            for j in range(taken):
                pieces.append(Piece(offset, costs[j], 0, repeats))
                self._charge_tooth_step(batch, table, done + j, tooth, skewed, repeats)
                offset += costs[j] if repeats == 1 else 0
            elapsed += repeats * sum(costs[:taken])
            done += repeats * taken
            if limit_ps is not None and elapsed >= limit_ps:
                break
        table.steps += done
        self.busy_ps += elapsed
        return Run(done, elapsed, pieces)

    def _tooth_reads(self, batch: DecodeBatch, offset: int, tooth: tuple[int, ...]) -> tuple[list[int], list[int] | None]:
        """Units read and slots acted upon in the `offset`-th step from the batch's next."""
        step = batch.step + 1 + offset
        teeth = batch.tooth_sum(step)
        reads = [value + growth * offset for value, growth in zip(batch.read, batch.growth, strict=True)]
        reads[0] += tooth[0] * teeth
        residue = step % batch.period
        slots = [by_residue[residue] for by_residue in batch.tooth_actions]
        if not offset and batch.acting:
            slots = [a + b for a, b in zip(slots, batch.actions, strict=True)]
        return reads, slots if any(slots) else None

    def _tooth_step(
        self, batch: DecodeBatch, table: BatchTable, offset: int, tooth: tuple[int, ...], skewed: bool
    ) -> int:
        reads, slots = self._tooth_reads(batch, offset, tooth)
        device = table.fixed_ps
        for i, curve in table.curves:
            device += curve(reads[i])
            if skewed and i != self.plan.slots_scalar:
                device += max(0, self.single(i)(batch.longest(i, offset)) - curve.part(ATTENTION, reads[i]))
        if slots is not None:
            device += sum(self.action(i)(value) for i, value in enumerate(slots) if value)
        return max(table.floor_ps, device) + table.host_ps

    def _charge_tooth_step(
        self, batch: DecodeBatch, table: BatchTable, offset: int, tooth: tuple[int, ...], skewed: bool, times: int
    ) -> None:
        reads, slots = self._tooth_reads(batch, offset, tooth)
        for i, curve in table.curves:
            curve.charge(reads[i], times)
            if skewed and i != self.plan.slots_scalar:
                ahead = self.single(i)(batch.longest(i, offset)) - curve.part(ATTENTION, reads[i])
                if ahead > 0:
                    self._spend({ATTENTION: times * ahead})
        self._actions_ps(slots, times)

    # -- account --------------------------------------------------------------------------------------------------

    def op_times(self) -> dict[str, int]:
        """Picoseconds by Op label over all steps so far; "host" is where the device waited for the host."""
        times = dict(self.spent)

        def add(parts: dict[str, int], count: int = 1) -> None:
            for label, value in parts.items():
                times[label] = times.get(label, 0) + count * value

        for table in self._tables.values():
            add(table.fixed, table.steps)
            for _, curve in table.curves:
                add(curve.times())
        for action in self._actions:
            if action is not None:
                add(action.times())
        times["host"] = self.busy_ps - sum(times.values())
        return {label: value for label, value in times.items() if value}


def _straight(curve: Curve, x: int, d: int) -> tuple[int, int, int]:
    """(value, growth a step, steps until the next knot) of a curve at x when x grows by d a step."""
    cell = bisect_right(curve.xs, x) - 1
    m = curve.ms[cell]
    room = -(-(curve.xs[cell + 1] - x) // d) if d else 1 << 60
    return curve.ys[cell] + m * (x - curve.xs[cell]), m * d, room


def _straight_part(curve: Curve, x: int, d: int) -> tuple[int, int]:
    cell = bisect_right(curve.xs, x) - 1
    ys, ms = curve.parts[ATTENTION]
    return ys[cell] + ms[cell] * (x - curve.xs[cell]), ms[cell] * d


def _leader(lines: list[tuple[int, int]], offset: int) -> tuple[int, int, int]:
    """(value, growth, steps it leads) of the greatest of some straight lines from `offset` on."""
    value, slope = max((value + slope * offset, slope) for value, slope in lines)
    steps = 1 << 60
    for other, steeper in lines:
        if steeper > slope:
            behind = value - (other + steeper * offset)
            steps = min(steps, behind // (steeper - slope) + 1)
    return value, slope, steps


def _first_to_reach(target_ps: int, first_ps: int, growth_ps: int, max_steps: int) -> int:
    """`steps_to_reach` where steps get shorter: still longer than nothing, so the sum grows and bisection holds."""
    low, high = 1, max_steps
    while low < high:
        middle = (low + high) // 2
        if middle * first_ps + growth_ps * (middle * (middle - 1) // 2) >= target_ps:
            high = middle
        else:
            low = middle + 1
    return low
