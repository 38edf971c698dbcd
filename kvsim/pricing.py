"""Ops become time here: prices in whole picoseconds, tabulated once and kept with an account of how often each was paid.

A `Price` is paid as a whole; a `Curve` (kvsim/curves.py) by what a step reads. Everything is built on first use.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from typing import Any, Self

from kvsim.cost_types import Chunk
from kvsim.curves import Curve
from kvsim.dtypes import activation_bytes
from kvsim.engines.base import Engine
from kvsim.forward import head_ops, linear_ops
from kvsim.model import Model
from kvsim.ops import DecodeAttention, MixedAttention, Op, PolicyKernel, PrefillAttention
from kvsim.policies.compose import CachePlan
from kvsim.profile import Answer, Profile
from kvsim.units import PS_PER_S

ATTENTION = DecodeAttention.kind
HOST = "host"
_MAX_SLOTS_LOG2 = 50

Part = tuple[str, str]
"""(Op label, source): time is kept apart by what it rests on."""


class Price:
    """The cost of something launched again and again: its parts by Op label and source, and how often it was paid."""

    __slots__ = ("parts", "times", "total_ps")

    def __init__(self, parts: dict[Part, int]) -> None:
        self.parts, self.total_ps, self.times = parts, sum(parts.values()), 0

    def pay(self) -> int:
        self.times += 1
        return self.total_ps

    def twin(self) -> Price:
        """The same, never paid."""
        return Price(self.parts)


class BatchTable:
    """Everything that depends on the number of decoding sequences alone.

    attention: a curve for each layer group, over what its attention reads. others: (scalar, curve) of the rest.
    curves: all of them with their scalars; lone: their sum, where all are over one scalar. mixed: attention
    beside a prompt chunk, by (chunk, layer group, cell of its curve): value at the cell's start, and slope.
    A step takes `host_ps + max(floor_ps, device)`.
    """

    __slots__ = ("attention", "batch", "curves", "fixed", "floor_ps", "host_ps", "lone", "mixed", "others")

    def __init__(
        self, batch: int, fixed: Price, attention: list[Curve], others: list[tuple[int, Curve]],
        host_ps: tuple[int, int, int],
    ) -> None:  # fmt: skip
        self.batch, self.fixed, self.attention, self.others = batch, fixed, attention, others
        self.mixed: dict[tuple[Chunk, int, int], tuple[int, int]] = {}
        self.curves = [*enumerate(attention), *others]
        self.lone: Curve | None = None
        if len(self.curves) == 1:
            self.lone = attention[0]
        elif len(attention) == 1 and len(others) == 1 and others[0][0] == 0:
            self.lone = attention[0].plus(others[0][1])
        before, self.floor_ps, after = host_ps
        self.host_ps = before + after

    def twin(self) -> BatchTable:
        """The same with accounts of its own."""
        new = copy(self)
        new.fixed = self.fixed.twin()
        curves = {id(curve): curve.twin() for _, curve in self.curves}
        new.attention = [curves[id(curve)] for curve in self.attention]
        new.others = [(i, curves[id(curve)]) for i, curve in self.others]
        new.curves = [*enumerate(new.attention), *new.others]
        if self.lone is not None:
            new.lone = new.attention[0] if self.lone is self.attention[0] else self.lone.twin()
        return new


class _Memo(dict[Any, Any]):
    """A dictionary that works out what it lacks: faster than a cached method, since a hit runs no Python."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, key: Any) -> Any:
        value = self[key] = self._compute(*key) if isinstance(key, tuple) else self._compute(key)
        return value


def op_label(op: Op) -> str:
    """The row of the report in which an Op's time appears."""
    return f"{op.owner}:{op.kernel}" if isinstance(op, PolicyKernel) else op.kind


def one_by_one(ops: Iterable[Op], kernels: frozenset[str], batch: int) -> list[Op]:
    """Ops of a batch's step where these kernels are launched for each sequence by itself."""
    return [
        replace(op, num_launches=batch * op.num_launches) if isinstance(op, PolicyKernel) and op.kernel in kernels else op for op in ops
    ]


class Prices:
    """Prices of one policy on one engine, model and GPU, as a profile answers them.

    pool_slots: (token, layer, KV head) triples that the whole block pool holds, for policies that pass over all of it.
    hbm_share: share of HBM bandwidth that is left while a side stream runs.

    Lookups: linear[num_tokens] (of steps with chunks), head[num_sampled], prefill_policy[new, prior],
    compression[prompt, prefill] and joint_compression[prompt, prefill] are Prices;
    prefill_attention[new, prior] is picoseconds; tables[batch] a BatchTable; single[layer_group] the attention of one sequence
    alone; actions[policy] what a policy's action costs by slots; host[batch, captured] picoseconds (before, beside, after).
    """

    def __init__(
        self, model: Model, tp: int, weight_dtype: str, engine: Engine, plan: CachePlan, profile: Profile,
        pool_slots: int, hbm_share: float = 1.0,
    ) -> None:  # fmt: skip
        engine = engine.for_plan(plan)
        self.model, self.tp, self.weight_dtype, self.engine, self.plan = model, tp, weight_dtype, engine, plan
        self.profile, self.pool_slots, self.hbm_share = profile, pool_slots, hbm_share
        self.basis: dict[Part, Answer] = {}
        """An answer for each part: how wrong it may be."""
        self._num_launches = engine.num_launches(model, tp, weight_dtype)
        self._chunk_format = engine.chunk_format(plan)
        self.linear = _Memo(self._linear)
        self.head = _Memo(self._head)
        self.prefill_policy = _Memo(self._prefill_policy)
        self.compression = _Memo(self._compression)
        self.joint_compression = _Memo(self._joint_compression)
        self._compresses_jointly = any(plan.joint_compress_ops(1 << 20, 1 << 20))
        self.prefill_attention = _Memo(self._prefill_attention)
        self._prefill_ops = _Memo(self._prefill_op)
        self.tables = _Memo(self._table)
        self.single = _Memo(self._single)
        self.alone_ps: list[dict[int, int]] = [{} for _ in plan.layers_of]  # values of single[layer_group] looked up already
        self.actions = _Memo(self._action_curve)
        self.host = _Memo(self._host)
        pool_ops = plan.pool_ops(pool_slots) if engine.updates_whole_pool else ()
        self.pool_price = Price(self._answer((1, op) for op in pool_ops))

    def _ask(self, op: Op, label: str) -> tuple[Part, float]:
        """(part, seconds) of one launch."""
        answer = self.profile.answer(op, self.hbm_share)
        part = (label, answer.source)
        self.basis[part] = answer
        return part, answer.seconds

    def _seconds(self, op: Op, label: str) -> float:
        return self._ask(op, label)[1]

    def _answer(self, ops: Iterable[tuple[int, Op]]) -> dict[Part, int]:
        """Picoseconds by part of Ops launched so many times."""
        seconds: dict[Part, float] = {}
        for times, op in ops:
            part, value = self._ask(op, op_label(op))
            seconds[part] = seconds.get(part, 0.0) + times * value
        return {part: round(value * PS_PER_S) for part, value in seconds.items()}

    # -- paid as a whole ------------------------------------------------------------------------------------------

    def _linear(self, num_tokens: int, chunks: bool = True) -> Price:
        """Everything but attention, head and policies for so many tokens, padded where a graph is replayed."""
        captured = self.engine.captured(num_tokens) and (self.engine.captures_chunks or not chunks)
        computed = self.engine.padded(num_tokens) if captured else num_tokens
        ops = linear_ops(self.model, self.tp, self.weight_dtype, computed, not captured)
        return Price(self._answer(chain(ops, self.engine.unfused_ops(self.model, self.tp, self.weight_dtype, computed))))

    def _head(self, num_sampled: int) -> Price:
        """From the last hidden states of so many sequences to their tokens; outside captured graphs, as in vLLM."""
        if not num_sampled:
            return Price({})
        head = head_ops(self.model, self.tp, num_sampled, True, self.weight_dtype)
        sampler = self.engine.sampler_ops(num_sampled, self.model.vocab_size, activation_bytes(self.weight_dtype))
        return Price(self._answer(chain(head, ((1, op) for op in sampler))))

    def _prefill_policy(self, new_tokens: int, prior_tokens: int) -> Price:
        """What the policies, and the engine beside attention, launch with a prompt chunk."""
        ops = chain(self.plan.prefill_ops(new_tokens, prior_tokens), self.engine.prompt_ops(self.plan.shape, new_tokens, prior_tokens))
        return Price(self._answer((1, op) for op in ops))

    def _compression(self, prompt_tokens: int, prefill_tokens: int) -> Price:
        """What the policies launch when a prefill ends."""
        return Price(self._answer((1, op) for op in self.plan.compress_ops(prompt_tokens, prefill_tokens)))

    def _joint_compression(self, prompt_tokens: int, prefill_tokens: int) -> Price:
        """What the policies launch for all prefills that end in a step, if this is the longest."""
        return Price(self._answer((1, op) for op in self.plan.joint_compress_ops(prompt_tokens, prefill_tokens)))

    def compress(self, compressed: Sequence[tuple[int, int]]) -> int:
        """Pays for the compression of these (prompt, prefill) tokens, whose prefills end in one step."""
        total = 0
        for ended in compressed:
            total += self.compression[ended].pay()
        if compressed and self._compresses_jointly:
            prices = [self.joint_compression[ended] for ended in compressed]
            total += max(prices, key=lambda price: price.total_ps).pay()
        return total

    def _prefill_op(self, new_tokens: int, prior_tokens: int) -> PrefillAttention:
        shape = self.plan.shape
        heads = shape.q_heads, shape.kv_heads, shape.head_dim
        return PrefillAttention(new_tokens, prior_tokens, *heads, self.plan.kv_dtype, stored=self._chunk_format)

    def _prefill_attention(self, new_tokens: int, prior_tokens: int) -> int:
        """All layers of one sequence's chunk."""
        seconds = self._seconds(self._prefill_ops[new_tokens, prior_tokens], PrefillAttention.kind)
        return round(self.plan.shape.num_layers * seconds * PS_PER_S)

    def mixed_attention(self, chunks: Sequence[Chunk], table: BatchTable, reads: Sequence[int]) -> int:
        """All layers of prompt chunks and a decoding batch in one launch a layer: the largest chunk mixes, others add."""
        largest, total = chunks[0], 0
        if len(chunks) > 1:
            largest = max(chunks)
            total = sum(self.prefill_attention[chunk] for chunk in chunks) - self.prefill_attention[largest]
        cells, alike = table.mixed, self.plan.alike_layer_groups
        for i, curve in enumerate(table.attention):
            x, xs = reads[i], curve.xs
            cell = bisect_right(xs, x) - 1
            i = alike[i]
            line = cells.get((largest, i, cell))
            if line is None:
                line = cells[largest, i, cell] = self._mixed_line(largest, i, table, cell)
            total += line[0] + line[1] * (x - xs[cell])
        return total

    def _mixed_line(self, chunk: Chunk, layer_group: int, table: BatchTable, cell: int) -> tuple[int, int]:
        """(value at the cell's first knot, slope) of a chunk's attention beside a decoding batch, over a layer group."""
        plan, layers, batch = self.plan, self.plan.layers_of[layer_group], table.batch
        knots = table.attention[layer_group].knots[cell : cell + 2]
        prefill = self._prefill_ops[chunk]
        first, last = (
            round(layers * self._seconds(MixedAttention(prefill, decode), MixedAttention.kind) * PS_PER_S)
            for decode in (plan.attention(layer_group, batch, units, units / batch) for units in knots)
        )
        return first, max(0, last - first) // (knots[1] - knots[0])

    def _host(self, batch: int, captured: bool) -> tuple[int, int, int]:
        parts = self.engine.host_ops(batch, 0 if captured else self._num_launches)
        before, beside, after = (round(sum(self._seconds(op, HOST) for op in ops) * PS_PER_S) for ops in parts)
        return before, beside, after

    def _single(self, layer_group: int) -> Curve:
        first = self.plan.alike_layer_groups[layer_group]
        curve: Curve = self._attention_curve(layer_group, 1) if first == layer_group else self.single[first]
        return curve

    # -- curves ---------------------------------------------------------------------------------------------------

    def _table(self, batch: int) -> BatchTable:
        plan = self.plan
        fixed: dict[Part, int] = {}
        linear = self.linear[batch] if self.engine.captures_chunks else self._linear(batch, chunks=False)
        for price in (linear, self.head[batch], self.pool_price):
            for part, value in price.parts.items():
                fixed[part] = fixed.get(part, 0) + value
        alike = plan.alike_layer_groups  # those of one shape share a curve, and its account
        curves = {i: self._attention_curve(i, batch) for i in set(alike)}
        attention = [curves[i] for i in alike]
        extras = {i: self._cache_curve(i, batch, curves[i].knots) for i in set(alike)}
        others = [(i, extras[first]) for i, first in enumerate(alike) if extras[first].parts]
        if plan.slots_scalar is not None:
            knots = [0, *(1 << k for k in range(_MAX_SLOTS_LOG2))]
            others.append((plan.slots_scalar, self._curve(knots, lambda n: self._step_ops(batch, n * plan.slots_unit))))
        return BatchTable(batch, Price(fixed), attention, others, self.host[batch, self.engine.captured(batch)])

    def _attention_curve(self, layer_group: int, batch: int) -> Curve:
        """Attention over all layers of a group, by units read."""
        plan, layers = self.plan, self.plan.layers_of[layer_group]
        slots = self.profile.kv_knots(plan.attention(layer_group, batch, 0, 0))
        most = max(self.pool_slots // plan.shape.num_layers, 1)  # no step reads more than the pool holds
        slots = slots[: bisect_left(slots, most) + 1]
        knots = sorted({round(plan.units_of_slots(layer_group, number)) for number in slots} | {0})
        units = knots[len(knots) * 3 // 4]  # knots are geometric: a step of some length stands for the curve's source
        typical = plan.attention(layer_group, batch, units, units / batch)
        part, _ = self._ask(typical, ATTENTION)
        seconds = self.profile.decode_curve(typical, plan.slots_of_units(layer_group, knots), self.hbm_share)
        return Curve(knots, {part: [layers * value for value in seconds]})

    def _cache_curve(self, layer_group: int, batch: int, knots: Sequence[int]) -> Curve:
        """What engine and policies run in proportion to what attention reads."""
        plan, layers = self.plan, self.plan.layers_of[layer_group]

        def ops(units: int) -> list[Op]:
            cache_bytes = units * plan.scalar_bytes[layer_group]
            found = list(self.engine.cache_ops(plan, batch, cache_bytes, cache_bytes / plan.slot_bytes, layers))
            if plan.has_step_ops and plan.slots_scalar is None:
                found += self._step_ops(batch, round(units * plan.slots_per_unit))
            return found

        return self._curve(knots, ops)

    def _step_ops(self, batch: int, num_slots: int) -> list[Op]:
        """What policies launch in a decode step, for the whole batch at once or for one sequence after the other."""
        return one_by_one(self.plan.step_ops(batch, num_slots), self.engine.one_by_one(self.plan), batch)

    def _action_curve(self, policy_index: int) -> Curve:
        knots = [0, *(1 << k for k in range(_MAX_SLOTS_LOG2))]
        policy, shape = self.plan.acting[policy_index], self.plan.shape
        return self._curve(knots, lambda slots: policy.action_ops(shape, max(slots, 1)))

    def _curve(self, knots: Sequence[int], ops_at: Callable[[int], Iterable[Op]]) -> Curve:
        by_label: dict[str, list[float]] = {}
        if not any(ops_at(knots[-1])):
            return Curve(knots, {})
        last: dict[str, Part] = {}  # a curve has one source by label: that of its last knot
        for i, units in enumerate(knots):
            for op in ops_at(units):
                label = op_label(op)
                last[label], value = self._ask(op, label)
                by_label.setdefault(label, [0.0] * len(knots))[i] += value
        return Curve(knots, {last[label]: seconds for label, seconds in by_label.items()})

    # -- account --------------------------------------------------------------------------------------------------

    def twin(self) -> Self:
        """The same prices, worked out once for both, with an account of its own."""
        new = copy(self)
        new.linear = _Memo(lambda num_tokens: self.linear[num_tokens].twin())
        new.head = _Memo(lambda num_sampled: self.head[num_sampled].twin())
        new.prefill_policy = _Memo(lambda *tokens: self.prefill_policy[tokens].twin())
        new.compression = _Memo(lambda *tokens: self.compression[tokens].twin())
        new.joint_compression = _Memo(lambda *tokens: self.joint_compression[tokens].twin())
        new.tables = _Memo(lambda batch: self.tables[batch].twin())
        new.actions = _Memo(lambda policy: self.actions[policy].twin())
        new.pool_price = self.pool_price.twin()
        return new

    def paid(self) -> dict[Part, int]:
        """Picoseconds by part of everything paid by price or curve so far."""
        times: dict[Part, int] = {}
        memos = (self.linear, self.head, self.prefill_policy, self.compression, self.joint_compression)
        prices = [self.pool_price, *(price for memo in memos for price in memo.values())]
        curves = [*self.single.values(), *self.actions.values()]
        for table in self.tables.values():
            prices.append(table.fixed)
            curves += {id(curve): curve for _, curve in table.curves}.values()
            if table.lone is not None and table.lone is not table.attention[0]:
                curves.append(table.lone)
        for price in prices:
            for part, value in price.parts.items():
                times[part] = times.get(part, 0) + price.times * value
        for curve in curves:
            for part, value in curve.times().items():
                times[part] = times.get(part, 0) + value
        return times
