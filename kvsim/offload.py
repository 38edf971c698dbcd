"""What FlexGen's steps cost: layer by layer, every GPU batch computes while the next weights and caches are on their way.

With n GPU batches a layer of attention and its MLP take (flex_opt.py, generation_loop_overlap_multi_batch; one sync a GPU batch)

    max(A, W_mlp + C) + (n - 2) max(A, C) + A   and   max(M, W_attention) + (n - 2) M + max(M, C),

A and M being compute, W the load of the next layer's weights, C that of the next cache; each link is a resource of its own.
What transfers add to compute is entered as "copy". Within a layer group all layers are alike, so its curve holds them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

from kvsim.cost import DecodeState, StepCosts
from kvsim.cost_types import Chunk
from kvsim.curves import Curve
from kvsim.engines.flexgen import FlexGen
from kvsim.engines.flexgen_weights import LayerWeights
from kvsim.offload_ops import attention_linear_ops, decode_attention_ops, mlp_ops, outer_ops, prefill_attention_ops
from kvsim.ops import Copy, Op
from kvsim.pricing import HOST, BatchTable, Part, Price, _Memo, op_label
from kvsim.profile import Answer
from kvsim.units import GB, PS_PER_S

HOST_ATTENTION_PASSES = 7.0
"""Over the cache's bytes on the CPU: copied to a workspace (2), converted to fp32 (1 read, 2 written), read by the bmm (2)."""
Parts = dict[Part, float]
"""Seconds by part."""


class Loads(NamedTuple):
    """Seconds of transfers on each link, which run beside one another."""

    to_gpu: float = 0.0
    from_gpu: float = 0.0
    disk_read: float = 0.0
    disk_write: float = 0.0

    def plus(self, other: Loads) -> Loads:
        return Loads(*(a + b for a, b in zip(self, other, strict=True)))


class OffloadCosts(StepCosts):
    """Costs of `FlexGen`; arguments as `StepCosts`."""

    engine: FlexGen

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.blocks = _Memo(self._block)
        self._attention_weights, self._mlp_weights = self.engine.layer_weights(self.model)

    # -- links ----------------------------------------------------------------------------------------------------

    def _link_s(self, num_bytes: float) -> float:
        return self._ask(Copy("host", round(num_bytes)), Copy.kind)[1] if num_bytes else 0.0

    def _weight_loads(self, weights: LayerWeights) -> Loads:
        """From disk they pass through host memory."""
        off_gpu = weights.cpu_bytes + weights.disk_bytes
        return Loads(self._link_s(off_gpu), disk_read=weights.disk_bytes / (self.engine.disk_read_gb_per_s * GB))

    def _cache_loads(self, cache_bytes: float) -> Loads:
        """One layer's cache of one GPU batch, before its attention."""
        _, in_host, on_disk = self.engine.cache_fracs
        moved = 0.0 if self.engine.cpu_cache_compute else self._link_s(cache_bytes * (in_host + on_disk))
        return Loads(moved, disk_read=cache_bytes * on_disk / (self.engine.disk_read_gb_per_s * GB))

    def _cache_stores(self, new_bytes: float) -> Loads:
        _, in_host, on_disk = self.engine.cache_fracs
        return Loads(
            from_gpu=self._link_s(new_bytes * (in_host + on_disk)),
            disk_write=new_bytes * on_disk / (self.engine.disk_write_gb_per_s * GB),
        )

    def _exposed(self, compute_s: float, loads: Loads) -> float:
        """What transfers add to a GPU batch's compute."""
        return max(0.0, max(loads) - compute_s) if self.engine.overlap else sum(loads)

    def _layer_exposed(self, attention_s: float, mlp_s: float, cache: Loads, store: Loads, n: int) -> float:
        """Over one layer of attention and its MLP, all GPU batches."""
        to_mlp, to_attention = self._weight_loads(self._mlp_weights), self._weight_loads(self._attention_weights)
        if n == 1:
            return self._exposed(attention_s, to_mlp) + self._exposed(mlp_s, to_attention.plus(cache).plus(store))
        first = self._exposed(attention_s, to_mlp.plus(cache))
        middle = (n - 2) * self._exposed(attention_s, cache.plus(store)) + self._exposed(attention_s, store)
        mlp = self._exposed(mlp_s, to_attention.plus(store)) + (n - 2) * self._exposed(mlp_s, Loads()) + self._exposed(mlp_s, cache)
        return first + middle + mlp

    def _copy_part(self) -> Part:
        """The link's own answer stands for all that is waited for; a disk is slower than what it says."""
        self._ask(Copy("host", 1 << 20), Copy.kind)
        part = self._last_part(Copy.kind)
        if self.engine.cache_fracs[2] > 0 or self._attention_weights.disk_bytes or self._mlp_weights.disk_bytes:
            part = (Copy.kind, "assumed: engine.disk_read_gb_per_s, disk_write_gb_per_s")
            self.basis[part] = self.basis[self._last_part(Copy.kind)]._replace(source=part[1])
        return part

    # -- compute --------------------------------------------------------------------------------------------------

    def _seconds_of(self, ops: Iterable[Op]) -> Parts:
        found: Parts = {}
        for op in ops:
            part, value = self._ask(op, op_label(op))
            found[part] = found.get(part, 0.0) + value
        return found

    def _linear_parts(self, rows: int) -> tuple[Parts, Parts]:
        """All but attention itself of one layer and GPU batch: of attention's half and of the MLP's."""
        model, engine, dtype = self.model, self.engine, self.weight_dtype
        return (
            self._seconds_of(attention_linear_ops(model, engine, self._attention_weights, rows, dtype)),
            self._seconds_of(mlp_ops(model, engine, self._mlp_weights, rows, dtype)),
        )

    # -- decode ---------------------------------------------------------------------------------------------------

    def _attention_curve(self, layer_group: int, batch: int) -> Curve:
        """Everything in the group's layers, transfers included, by units read."""
        plan = self.plan
        layers = plan.layers_of[layer_group]
        n, size = self.engine.gpu_batches(batch)
        most = max(self.pool_slots // plan.shape.num_layers, 1)
        slots = [x for x in self.profile.kv_knots(plan.attention(layer_group, size, 0, 0)) if x * n <= 2 * most]
        knots = sorted({round(n * plan.units_of_slots(layer_group, number)) for number in slots} | {0, 1})
        linear, mlp = self._linear_parts(size)
        copy = self._copy_part()
        columns: dict[Part, list[float]] = {}
        for i, units in enumerate(knots):
            attention, loads = self._cache_parts(layer_group, size, units / n)
            new_bytes = size * plan.shape.kv_heads * plan.slot_bytes
            compute = sum(linear.values()) + sum(attention.values())
            exposed = self._layer_exposed(compute, sum(mlp.values()), loads, self._cache_stores(new_bytes), n)
            for found, times in ((linear, n), (mlp, n), (attention, n), ({copy: exposed}, 1)):
                for part, value in found.items():
                    columns.setdefault(part, [0.0] * len(knots))[i] += layers * times * value
        return Curve(knots, _one_source(columns), hold=False)

    def _cache_parts(self, layer_group: int, batch: int, units: float) -> tuple[Parts, Loads]:
        """Attention of one layer and GPU batch that reads so many units, and the load of that cache."""
        op, plan, engine = self.plan.attention(layer_group, batch, units, units / batch), self.plan, self.engine
        in_gpu, in_host, on_disk = engine.cache_fracs
        cache_bytes = op.kv_slots * plan.slot_bytes
        by_gpu = in_gpu if engine.cpu_cache_compute else 1.0
        found: Parts = {}
        if by_gpu:
            found = self._seconds_of(decode_attention_ops(plan, op, by_gpu))
        if plan.has_step_ops and plan.slots_scalar is None:  # one layer group: policies name the Ops of all layers
            for part, value in self._seconds_of(plan.step_ops(batch, op.kv_slots * plan.shape.num_layers)).items():
                found[part] = found.get(part, 0.0) + value / plan.shape.num_layers
        if engine.cpu_cache_compute and in_host + on_disk:
            seconds = HOST_ATTENTION_PASSES * cache_bytes * (in_host + on_disk) / (engine.host_memory_gb_per_s * GB)
            found[self._host_part(seconds)] = seconds
        return found, self._cache_loads(cache_bytes)

    def _host_part(self, seconds: float) -> Part:
        part = ("host_attention", "assumed: engine.host_memory_gb_per_s")
        self.basis[part] = Answer(seconds, part[1], (-0.9, -0.5, 0.7, 1.4), "any")
        return part

    def _single(self, layer_group: int) -> Curve:
        """A block's sequences are equally long: none sets the pace."""
        return Curve([0, 1], {})

    def _table(self, batch: int) -> BatchTable:
        plan = self.plan
        alike = plan.alike_layer_groups
        curves = {i: self._attention_curve(i, batch) for i in set(alike)}
        others: list[tuple[int, Curve]] = []
        if plan.slots_scalar is not None:
            knots = [0, *(1 << k for k in range(50))]
            others.append((plan.slots_scalar, self._curve(knots, lambda units: plan.step_ops(batch, units * plan.slots_unit))))
        n, size = self.engine.gpu_batches(batch)
        outer = self._outer(n, size, size)
        before, beside, after = self.host[batch, False]
        if plan.has_step_ops:
            launches = self._num_launches + self.engine.policy_launches(self.model)
            beside = round(sum(self._seconds(op, HOST) for op in self.engine.host_ops(batch, launches)[1]) * PS_PER_S)
        return BatchTable(batch, Price(outer), [curves[i] for i in alike], others, (before, beside, after))

    def _outer(self, n: int, rows: int, num_sampled: int) -> dict[Part, int]:
        """Embeddings at both ends of n GPU batches."""
        ops = outer_ops(self.model, rows, num_sampled, self.weight_dtype)
        found = {part: n * value for part, value in self._seconds_of(ops).items()}
        inner, outer = (self._weight_loads(w) for w in self.engine.outer_weights(self.model))
        exposed = self._exposed(sum(found.values()), inner.plus(outer))
        if exposed:
            part = self._copy_part()
            found[part] = found.get(part, 0.0) + exposed
        return {part: round(value * PS_PER_S) for part, value in found.items()}

    # -- prefill --------------------------------------------------------------------------------------------------

    def prefill_step(
        self, state: DecodeState | None, chunks: Sequence[Chunk], num_sampled: int, compressed: Sequence[tuple[int, int]]
    ) -> int:
        """The prompts of a block, all of one length."""
        assert state is None and len({chunk[0] for chunk in chunks}) == 1
        total = self.blocks[len(chunks), chunks[0][0]].pay()
        total += self.compress(compressed)
        before, floor, after = self.host[num_sampled, False]
        step: int = max(total, floor) + before + after
        self.busy_ps += step
        return step

    def _block(self, num_sequences: int, tokens: int) -> Price:
        plan, layers = self.plan, self.model.num_layers
        n, size = self.engine.gpu_batches(num_sequences)
        rows = size * tokens
        attention, mlp = self._linear_parts(rows)
        for part, value in self._seconds_of(prefill_attention_ops(self.model, plan, size, tokens, self.weight_dtype)).items():
            attention[part] = attention.get(part, 0.0) + value
        stored = size * plan.kv_bytes(tokens, 1) / layers
        exposed = self._layer_exposed(sum(attention.values()), sum(mlp.values()), Loads(), self._cache_stores(stored), n)
        parts = self._outer(n, rows, size)
        for found, times in ((attention, n), (mlp, n), ({self._copy_part(): exposed}, 1)):
            for part, value in found.items():
                parts[part] = parts.get(part, 0) + round(layers * times * value * PS_PER_S)
        return Price({part: value for part, value in parts.items() if value})

    def twin(self) -> Self:
        new = super().twin()
        new.blocks = _Memo(lambda *size: self.blocks[size].twin())
        return new

    def paid(self) -> dict[Part, int]:
        times = super().paid()
        for price in self.blocks.values():
            for part, value in price.parts.items():
                times[part] = times.get(part, 0) + price.times * value
        return times


def _one_source(columns: Mapping[Part, list[float]]) -> dict[Part, list[float]]:
    """A curve has one source by label: that of its last knot."""
    last: dict[str, Part] = {}
    for part, values in columns.items():
        if part[0] not in last or values[-1]:
            last[part[0]] = part
    found: dict[Part, list[float]] = {}
    for (label, _), values in columns.items():
        sums = found.setdefault(last[label], [0.0] * len(values))
        for i, value in enumerate(values):
            sums[i] += value
    return found
