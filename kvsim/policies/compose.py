"""Policies composed by dimension (tokens x channels x bits) into one plan of the cache.

`Composition` holds at most one policy for each dimension and refuses contradictions. `CachePlan` is that composition on a given
cache: it turns a sequence's decode steps into `Segment`s, straight pieces of what attention reads and of what the block
pool holds. It knows no policy by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, gcd

from kvsim.errors import InputError
from kvsim.ops import DecodeAttention, Op
from kvsim.policies.base import CacheShape, HeadGroup, Policy, SequenceShape
from kvsim.policies.ramp import FOREVER, Ramp

_SIXTEENTHS = 16
"""Bytes of a slot are counted in sixteenths: every scale layout in use is a whole number of them."""


class Composition:
    """A validated set of policies: `tokens`, `channels` and `bits` each hold the policy of that dimension or a neutral one."""

    def __init__(self, policies: Sequence[Policy], field: str = "policies") -> None:
        neutral = Policy()
        by_dimension: dict[str, Policy] = {}
        for policy in policies:
            kind = _kind(policy)
            if policy.dimension in by_dimension:
                if policy.dimension == "none":
                    continue
                other = _kind(by_dimension[policy.dimension])
                raise InputError(
                    field, [_kind(p) for p in policies],
                    f"must hold at most one policy that acts on {policy.dimension}: {other} and {kind} both do",
                    f"drop {other} or {kind}" if other != kind else f"keep one {kind}",
                )
            by_dimension[policy.dimension] = policy
        self.policies: tuple[Policy, ...] = tuple(p for p in policies if not p.full_cache)
        self.tokens = by_dimension.get("tokens", neutral)
        self.channels = by_dimension.get("channels", neutral)
        self.bits = by_dimension.get("bits", neutral)

    @property
    def is_full(self) -> bool:
        """True where the cache is left whole."""
        return not self.policies

    @property
    def blocks_shareable(self) -> bool:
        return all(p.blocks_shareable for p in self.policies)

    @property
    def per_head_lengths(self) -> bool:
        return any(p.per_head_lengths for p in self.policies)

    @property
    def moves_positions(self) -> bool:
        return any(p.moves_positions for p in self.policies)

    def describe(self) -> str:
        return " + ".join(_kind(p) for p in self.policies) or "full"


def _kind(policy: Policy) -> str:
    return str(getattr(policy, "kind", "full"))


class Segment:
    """A straight piece of one sequence's decoding, `steps` steps long. Tuples run over the plan's scalars or lanes.

    read, d_read: scalar units read in the first step, and growth a step. longest, d_longest: the same for the longest head.
    tokens, d_tokens: tokens in each lane of the block pool; d_tokens is 0 or 1.
    actions: slots handled by each policy's action in the first step. held_units: what the sequence holds of the pool before it.
    With `period`, reads rise by the plan's `tooth` a step from phase 0, where they are `read` and where policies act on
    `tooth_actions` slots; `phase` is that of the first step, in which `actions` come on top.
    """

    __slots__ = (
        "actions", "d_longest", "d_read", "d_tokens", "held_units", "longest", "period", "phase", "read", "steps", "tokens",
        "tooth_actions",
    )  # fmt: skip

    def __init__(
        self, steps: int, read: tuple[int, ...], d_read: tuple[int, ...], longest: tuple[int, ...],
        d_longest: tuple[int, ...], tokens: tuple[int, ...], d_tokens: tuple[int, ...],
        actions: tuple[int, ...] | None, held_units: int, period: int = 0, phase: int = 0,
        tooth_actions: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.tooth_actions = tooth_actions
        self.held_units = held_units
        self.steps, self.read, self.d_read, self.longest, self.d_longest = steps, read, d_read, longest, d_longest
        self.tokens, self.d_tokens, self.actions, self.period, self.phase = tokens, d_tokens, actions, period, phase


class Lane:
    """A class of blocks: one head group's tokens of one width. `units` is what a block of it takes from the pool."""

    __slots__ = ("block_bytes", "group_index", "pruned", "units")

    def __init__(self, group_index: int, pruned: bool, block_bytes: int) -> None:
        self.group_index, self.pruned, self.block_bytes, self.units = group_index, pruned, block_bytes, 0


class CachePlan:
    """A composition on one GPU's cache.

    Scalars are what step costs are functions of. The first `num_layer_groups` count what the attention of one layer group
    reads, in units of `scalar_bytes[i]` bytes over the group's layers; a further one, where `slots_scalar` says so, counts
    resident slots in units of `slots_unit` (token, layer, KV head) triples, for Ops in proportion to tokens rather than bytes.
    """

    def __init__(self, composition: Composition, shape: CacheShape, kv_dtype: str, layout: str = "paged") -> None:
        self.composition, self.shape, self.kv_dtype, self.layout = composition, shape, kv_dtype, layout
        self.groups = composition.tokens.head_groups(shape)
        self.layers_of: list[int] = []
        for group in self.groups:
            if group.layer_group == len(self.layers_of):
                self.layers_of.append(group.num_layers)
        self.num_layer_groups = len(self.layers_of)
        self._widths()
        self._units()
        self._scalars()
        self.acting: tuple[Policy, ...] = composition.policies
        self.segment = lru_cache(maxsize=65536)(self._segment)

    # -- widths ---------------------------------------------------------------------------------------------------

    def _widths(self) -> None:
        shape, bits, channels = self.shape, self.composition.bits, self.composition.channels
        full, pruned = shape.head_dim, channels.stored_key_channels(shape.head_dim)
        e = shape.element_bytes
        self.key_full_wide, self.key_full_narrow = full * e, bits.key_bytes(full, e)
        self.key_pruned_wide, self.key_pruned_narrow = pruned * e, bits.key_bytes(pruned, e)
        self.value_wide, self.value_narrow = full * e, bits.value_bytes(full, e)
        self.prunes = pruned != full
        self.window_tokens = bits.wide_window_tokens()
        self.is_plain = not self.prunes and not self.window_tokens
        """Every slot has one width: bytes read are in proportion to tokens resident."""
        self.slot_bytes = self.key_pruned_narrow + self.value_narrow
        self.code_format = bits.format_name(self.kv_dtype, full)
        """Of tokens whose channels are all there."""
        self.kv_format = channels.format_name(self.code_format, full)

    def _block_bytes(self, group: HeadGroup, key_bytes: float) -> int:
        shape = self.shape
        slot = key_bytes + self.value_narrow + sum(p.state_bytes_per_slot(shape) for p in self.composition.policies)
        per_block = sum(p.state_bytes_per_block(shape) for p in self.composition.policies)
        return ceil(group.num_pairs * (shape.block_size_tokens * slot + per_block))

    def _units(self) -> None:
        self.lanes: list[Lane] = []
        self._full_lanes: list[Lane] = []
        for index, group in enumerate(self.groups):
            lane = Lane(index, False, self._block_bytes(group, self.key_full_narrow))
            self.lanes.append(lane)
            self._full_lanes.append(lane)
            if self.prunes:
                self.lanes.append(Lane(index, True, self._block_bytes(group, self.key_pruned_narrow)))
        self.unit_bytes = gcd(*(lane.block_bytes for lane in self.lanes))
        for lane in self.lanes:
            lane.units = lane.block_bytes // self.unit_bytes
        self.prefill_units_per_block = sum(lane.units for lane in self._full_lanes)
        # A sequence whose newest keys keep all channels may begin a block of each width in place of one.
        self.split_units = sum(lane.units for lane in self.lanes if lane.pruned)
        window_bytes = self.window_tokens * self.shape.num_pairs * self.shape.slot_bytes
        self.window_units = ceil(window_bytes / self.unit_bytes)
        self.lane_units = tuple(lane.units for lane in self.lanes)

    @property
    def widens_in_torch(self) -> bool:
        """Whether transformers widens the cache to 16 bits before it attends."""
        return self.composition.bits.widened_in_torch

    @property
    def plain_block_bytes(self) -> int:
        """Bytes of an uncompressed block over all layers and heads: what an engine's num_gpu_blocks counts."""
        return ceil(self.shape.block_size_tokens * self.shape.num_pairs * self.shape.slot_bytes)

    @property
    def state_bytes_per_token(self) -> float:
        """Policy state of one token over all layers and heads."""
        shape, policies = self.shape, self.composition.policies
        per_block = sum(p.state_bytes_per_block(shape) for p in policies) / shape.block_size_tokens
        return shape.num_pairs * (sum(p.state_bytes_per_slot(shape) for p in policies) + per_block)

    @property
    def narrow_bytes_per_token(self) -> float:
        """KV bytes of one stored token in the pool's blocks, over all layers and heads, before channels are pruned."""
        return self.shape.num_pairs * (self.key_full_narrow + self.value_narrow)

    def prefill_units(self, num_tokens: int) -> int:
        """Pool units of an uncompressed sequence of `num_tokens`, its window buffer included, with room to be compressed in place."""
        blocks = -(-num_tokens // self.shape.block_size_tokens)
        return blocks * self.prefill_units_per_block + self.split_units + self.window_units

    def tokens_that_fit(self, units: int) -> int:
        """Tokens of an uncompressed sequence that so many units hold."""
        blocks = max(0, units - self.split_units - self.window_units) // self.prefill_units_per_block
        return blocks * self.shape.block_size_tokens

    def lane_held(self, tokens: tuple[int, ...], d_tokens: tuple[int, ...], steps_done: int) -> int:
        """Units held after `steps_done` steps of a segment that began with these tokens (before its first step: 0)."""
        size, held, units = self.shape.block_size_tokens, self.window_units, self.lane_units
        for lane, start in enumerate(tokens):
            held += units[lane] * -(-(start + d_tokens[lane] * (steps_done - 1)) // size)
        return held

    def peak_units(
        self, prompt_tokens: int, output_tokens: int, prefill_tokens: int | None = None, whole_prompt: bool = True
    ) -> int:
        """The most units that one sequence holds at any time, alone in the pool, until `output_tokens` more have come.

        prefill_tokens: what is computed first, where a preempted sequence computes more than its prompt. whole_prompt: the
        pool holds the prompt before it is compressed; False where an engine compresses it layer by layer.
        """
        prefill = prompt_tokens if prefill_tokens is None else prefill_tokens
        peak, step, last = self.prefill_units(prefill) if whole_prompt else 0, 1, output_tokens - 1
        while step <= last:
            segment = self.segment(prompt_tokens, prefill, step)
            steps = min(segment.steps, last - step + 1)
            peak = max(peak, *(self.lane_held(segment.tokens, segment.d_tokens, n) for n in (1, steps)))
            step += steps
        return peak

    # -- scalars --------------------------------------------------------------------------------------------------

    def _scalars(self) -> None:
        sixteenths = [
            round(_SIXTEENTHS * b)
            for b in (
                self.key_full_wide, self.key_full_narrow, self.key_pruned_wide, self.key_pruned_narrow,
                self.value_wide, self.value_narrow,
            )
        ]  # fmt: skip
        fw, fn, pw, pn, vw, vn = sixteenths
        used = [pn + vn] if self.is_plain else sixteenths
        units = []
        for layer_group in range(self.num_layer_groups):
            pairs = [g.num_pairs for g in self.groups if g.layer_group == layer_group]
            units.append(gcd(*(n * w for n in pairs for w in used)))
        self.scalar_bytes = [unit / _SIXTEENTHS for unit in units]
        self._weights = [  # of each head group, in its layer group's unit
            tuple(g.num_pairs * w // units[g.layer_group] for w in (fw, fn, pw, pn, vw, vn)) if not self.is_plain
            else (g.num_pairs * (pn + vn) // units[g.layer_group],)
            for g in self.groups
        ]  # fmt: skip
        self._all_pairs = [
            sum(g.num_pairs for g in self.groups if g.layer_group == layer_group)
            for layer_group in range(self.num_layer_groups)
        ]
        shapes = list(zip(self.scalar_bytes, self.layers_of, strict=True))
        self.alike_layer_groups = [shapes.index(shape) for shape in shapes]
        """For each layer group the first of the same shape: what they cost is the same function of what they read."""
        self._slots_per_layer = [
            size / layers / self.slot_bytes for size, layers in zip(self.scalar_bytes, self.layers_of, strict=True)
        ]
        self.has_step_ops = any(p.step_ops(self.shape, 1, self.shape.num_pairs) for p in self.composition.policies)
        self.slots_per_unit = self.scalar_bytes[0] / (self.key_full_narrow + self.value_narrow)
        self.slots_scalar: int | None = None
        if self.has_step_ops and not (self.is_plain and self.num_layer_groups == 1):
            self.slots_scalar = self.num_layer_groups
        self.slots_unit = gcd(*(g.num_pairs for g in self.groups))
        self.num_scalars = self.num_layer_groups + (self.slots_scalar is not None)
        self.tooth = (self._weights[0][0],) if self.is_plain and len(self.groups) == 1 else None
        """Scalar growth a step inside a sawtooth; None where sawtooths are followed tooth by tooth."""

    # -- segments -------------------------------------------------------------------------------------------------

    def _segment(self, prompt_tokens: int, prefill_tokens: int, step: int) -> Segment:
        """The straight piece that begins with decode step `step` of a sequence."""
        seq = SequenceShape(prompt_tokens, prefill_tokens)
        tokens = self.composition.tokens
        period = tokens.period_steps(seq, step) if self.tooth is not None else 0
        if period:
            return self._sawtooth(seq, step, period)
        n = self.num_scalars
        read, d_read, longest, d_longest = [0] * n, [0] * n, [0] * n, [0] * n
        lane_tokens: list[int] = []
        d_lane_tokens: list[int] = []
        steps = FOREVER
        for group, weights in zip(self.groups, self._weights, strict=True):
            resident = tokens.resident(seq, group, step)
            i = group.layer_group
            if self.is_plain:
                size = Ramp(resident.value * weights[0], resident.slope * weights[0], resident.steps)
                lane_tokens.append(resident.value)
                d_lane_tokens.append(resident.slope)
            else:
                size, full = self._bytes_read(seq, step, resident, weights)
                lane_tokens.append(full.value if self.prunes else resident.value)
                d_lane_tokens.append(full.slope if self.prunes else resident.slope)
                if self.prunes:
                    lane_tokens.append(resident.value - full.value)
                    d_lane_tokens.append(resident.slope - full.slope)
            steps = min(steps, size.steps)
            read[i] += size.value
            d_read[i] += size.slope
            every = self._all_pairs[i]  # as if all heads of the layer were as long as these
            as_if = size.value * every // group.num_pairs
            if as_if > longest[i]:
                longest[i], d_longest[i] = as_if, size.slope * every // group.num_pairs
            if self.slots_scalar is not None:
                count = group.num_pairs // self.slots_unit
                read[-1] += resident.value * count
                d_read[-1] += resident.slope * count
        for lane, slope in enumerate(d_lane_tokens):
            if slope < 0:  # keeps its blocks while the segment lasts: until one of them is empty
                steps = min(steps, (lane_tokens[lane] - 1) % self.shape.block_size_tokens + 1)
                d_lane_tokens[lane] = 0
        lanes, d_lanes = tuple(lane_tokens), tuple(d_lane_tokens)
        actions = self._slots_acted(seq, step)
        return Segment(
            steps, tuple(read), tuple(d_read), tuple(longest), tuple(d_longest),
            lanes, d_lanes, actions if any(actions) else None, self.lane_held(lanes, d_lanes, 0),
        )  # fmt: skip

    def _bytes_read(
        self, seq: SequenceShape, step: int, resident: Ramp, weights: tuple[int, ...]
    ) -> tuple[Ramp, Ramp]:
        """Units that attention reads of one head group, and the tokens whose keys keep all channels."""
        fw, fn, pw, pn, vw, vn = weights
        full = self.composition.channels.full_key_tokens(seq, step).at_most(resident)
        wide = self.composition.bits.wide_key_tokens(seq, step).at_most(resident)
        wide_values = self.composition.bits.wide_value_tokens(seq, step).at_most(resident)
        both = full.at_most(wide)
        # Keys lie in four classes: newest first, the shorter of the two windows is full and wide; the oldest pruned and narrow.
        counts = (
            (fw, both),
            (fn, full.minus(both)),
            (pw, wide.minus(both)),
            (pn, resident.minus(full).minus(wide).plus(both)),
            (vw, wide_values),
            (vn, resident.minus(wide_values)),
        )
        value = sum(weight * count.value for weight, count in counts)
        slope = sum(weight * count.slope for weight, count in counts)
        return Ramp(value, slope, min(count.steps for _, count in counts)), full

    def _slots_acted(self, seq: SequenceShape, step: int) -> tuple[int, ...]:
        """Slots that each policy's action handles at the start of a step."""
        return tuple(sum(g.num_pairs * p.acts_at(seq, g, step) for g in self.groups) for p in self.composition.policies)

    def _sawtooth(self, seq: SequenceShape, step: int, period: int) -> Segment:
        group = self.groups[0]
        resident = self.composition.tokens.resident(seq, group, step)
        phase = period - resident.steps
        low = resident.value - phase
        weight = self._weights[0][0]
        peak = low + period - 1
        recurring = self._slots_acted(seq, step + period - phase)
        # The tooth that starts with this step may handle more, such as a whole prompt.
        extra = () if phase else tuple(a - b for a, b in zip(self._slots_acted(seq, step), recurring, strict=True))
        return Segment(
            FOREVER, (low * weight,), (0,), (peak * weight,), (0,), (peak,), (0,), extra if any(extra) else None,
            self.lane_held((peak,), (0,), 0), period, phase, recurring,
        )  # fmt: skip

    # -- Ops ------------------------------------------------------------------------------------------------------

    def attention(self, layer_group: int, batch: int, units: float, longest: float) -> DecodeAttention:
        """Attention of one layer of the group that reads `units` scalar units over all the group's layers."""
        _, q_heads, kv_heads, head_dim, *_ = self.shape
        per_layer = self._slots_per_layer[layer_group]
        return DecodeAttention(
            batch, q_heads, kv_heads, head_dim, round(units * per_layer), round(longest * per_layer / kv_heads),
            self.slot_bytes, self.kv_format, self.layout,
        )  # fmt: skip

    def slots_of_units(self, layer_group: int, units: Sequence[int]) -> list[int]:
        """kv_slots of `attention` at each of these units."""
        per_layer = self._slots_per_layer[layer_group]
        return [round(value * per_layer) for value in units]

    def units_of_slots(self, layer_group: int, kv_slots: float) -> float:
        """The inverse of `attention`: scalar units at which one layer reads so many slots."""
        return kv_slots * self.slot_bytes * self.layers_of[layer_group] / self.scalar_bytes[layer_group]

    def step_ops(self, batch: int, num_slots: int) -> tuple[Op, ...]:
        return tuple(op for p in self.composition.policies for op in p.step_ops(self.shape, batch, num_slots))

    def prefill_ops(self, new_tokens: int, prior_tokens: int) -> tuple[Op, ...]:
        return tuple(op for p in self.composition.policies for op in p.prefill_ops(self.shape, new_tokens, prior_tokens))

    def compress_ops(self, prompt_tokens: int, prefill_tokens: int) -> tuple[Op, ...]:
        seq = SequenceShape(prompt_tokens, prefill_tokens)
        return tuple(op for p in self.composition.policies for op in p.compress_ops(self.shape, seq))

    def joint_compress_ops(self, prompt_tokens: int, prefill_tokens: int) -> tuple[Op, ...]:
        seq = SequenceShape(prompt_tokens, prefill_tokens)
        return tuple(op for p in self.composition.policies for op in p.joint_compress_ops(self.shape, seq))

    def pool_ops(self, pool_slots: int) -> tuple[Op, ...]:
        return tuple(op for p in self.composition.policies for op in p.pool_ops(self.shape, pool_slots))

    def kv_bytes(self, prompt_tokens: int, step: int) -> float:
        """KV bytes (scales included, state and block rounding not) one sequence's attention reads in decode step `step`."""
        segment = self.segment(prompt_tokens, prompt_tokens, step)
        tooth = self.tooth[0] * segment.phase if segment.period and self.tooth else 0
        reads = segment.read[: self.num_layer_groups]
        return sum(units * size for units, size in zip(reads, self.scalar_bytes, strict=True)) + tooth * self.scalar_bytes[0]
