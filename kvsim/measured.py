"""A profile that rests on measurements: the physics of the datasheet profile with constants fitted to one GPU and engine, times
a correction interpolated in tables of that GPU and engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, hypot, log2
from typing import NamedTuple

from kvsim.coordinates import AXES, OWN_KINDS, POOLED, Place, error_class, locate
from kvsim.correction import Correction, cell_of
from kvsim.datasheet import BEST_OF_PEAK, DatasheetProfile, sustained_rate
from kvsim.efficiencies import load_efficiencies
from kvsim.hardware import Gpu
from kvsim.ops import DecodeAttention, Elementwise, Gemm, HostWork, MixedAttention, Op, PolicyKernel, PrefillAttention
from kvsim.profile import Answer, LogBias
from kvsim.profile_file import ProfileFile, TableKey

BEYOND_SIGMA = 0.10
"""Further standard deviation of log error outside a table or for an unmeasured head size, where the physics carries on alone:
what the correction of measured tables varies by over an octave (assumed; the physics alone errs by 10-20 % on whole tables)."""
DTYPE_SIGMA = 0.15
"""Further standard deviation where another dtype's table is carried over by the physics: fp8 KV against bf16 KV of the same engine
and GPU differs from the physics' ratio by 8-19 % in the H100 tables."""
KERNEL_SIGMA = 0.5
"""Further standard deviation where other work answers: element-wise kernels of as many bytes, steps of other policies, attention of caches
that are attended plainly. Assumed: a chain of calls takes a multiple of what one call does."""
FROM_KERNELS, FROM_STEPS, FROM_PLAIN = "from other kernels", "from steps of other policies", "from plain launches"
"""What other work than an Op's own answers for it."""
DVFS_EXPONENT = 0.4
"""Under a power limit power goes with clock x voltage squared and voltage nearly with clock, P ~ f^2.5, so clocks go with P^0.4. From an
L40S (350 W, 64 % of its peak in GEMMs) this says 97 % for an RTX 4090 (450 W for half the peak), which measures 98 %."""
MOST_OF_PEAK = 1.0
LARGE_PRODUCTS = tuple((m, n, k) for m in (2048, 4096, 8192) for n, k in ((8192, 8192), (28672, 8192), (8192, 28672), (28672, 4096)))
"""m, n, k: the best of them stands for the best product of a table."""
CONTEXT = AXES[DecodeAttention.kind].index("context")


class Chosen(NamedTuple):
    """The table that answers for a place's (kind, variant, size), and its own variant. carried: why it is not quite that one's; "" where
    it is.
    """

    correction: Correction
    variant: str
    carried: str
    sigma: float


class MeasuredProfile:
    """Answers Ops of the kinds, dtypes and head sizes that its file holds; see `knows`.

    gpu: the GPU to answer for; another one than measured_on, the file's, is reached by the datasheets' ratios.
    """

    def __init__(
        self, content: ProfileFile, gpu: Gpu, measured_on: Gpu, extra_sigma: float = 0.0, carried: str = ""
    ) -> None:
        self.content, self.gpu = content, gpu
        self._extra_sigma, self._carried = extra_sigma, carried
        self.same_generation = gpu.compute_capability == measured_on.compute_capability
        self.same_link = gpu.has_gpu_link == measured_on.has_gpu_link
        efficiencies = load_efficiencies()
        known = {name: value for name, value in content.efficiencies.items() if name in efficiencies.values}
        # Latencies inside a kernel are cycles: fitted ones of A100, H100 and L40S go with 1 / boost clock to within some 10 %.
        cycles = measured_on.boost_clock_hz / gpu.boost_clock_hz
        known = {name: value * cycles if _is_latency(name) else value for name, value in known.items()}
        if gpu.name != measured_on.name:
            known |= _carried_shares(known, content, gpu, measured_on)
        self.physics = DatasheetProfile(gpu.by_datasheet(), efficiencies.replaced(known))
        self._shift = log2(measured_on.num_sms / gpu.num_sms)
        # A benchmark's cache may stay in a large L2; in a step the weights of every layer pass through between two visits.
        self._least_s_per_byte = 0.0 if gpu.name == measured_on.name else 1.0 / gpu.hbm_bandwidth_bytes_per_s
        self._corrections = {key: self._correction(key) for key in content.tables}
        self._names_kernels = any(kind == Elementwise.kind and variant != POOLED for kind, variant, _ in content.tables)
        self._has_prefill = any(kind == PrefillAttention.kind for kind, _, _ in content.tables)
        self._chosen: dict[TableKey, Chosen | None] = {}
        self._prefill_beyond: tuple[PrefillAttention, float, float] | None = None
        self._gemm_lines: dict[tuple[int, int, str], tuple[list[float], list[float]]] = {}
        self._labels: dict[tuple[str, str, str, float], tuple[str, LogBias, str]] = {}
        self.log_biases: Mapping[tuple[str, str], LogBias] = self._all_biases()

    @property
    def name(self) -> str:
        return self.content.title

    def _correction(self, key: TableKey) -> Correction:
        """Tables of attention are read at as many pieces of work per multiprocessor as on the GPU that was measured."""
        shift = [self._shift if axis in ("lanes", "heads") else 0.0 for axis in AXES[key[0]]] if self._shift else None
        return Correction(self.content.tables[key].terms, shift)

    # -- which table ----------------------------------------------------------------------------------------------

    def knows(self, place: Place, exactly: bool) -> bool:
        """Whether a table answers for the place: of its very dtype, or (exactly=False) of another one."""
        chosen = self._choose(place)
        if chosen is None:
            return place.kind == MixedAttention.kind and not exactly and self._has_prefill
        return not exactly or chosen.sigma < DTYPE_SIGMA

    def _choose(self, place: Place) -> Chosen | None:
        key = place[:3]
        if key not in self._chosen:
            self._chosen[key] = self._find(*key)
        return self._chosen[key]

    def _find(self, kind: str, variant: str, size: int) -> Chosen | None:
        same = [key for key in self._corrections if key[0] == kind and key[1] == variant]
        carried, sigma = "", 0.0
        if not same and kind.endswith("attention"):
            plain = variant.partition(" ")[0]
            same = [key for key in self._corrections if key[:2] == (kind, plain)]
            carried, sigma = FROM_PLAIN, KERNEL_SIGMA
            if not same:
                same = [key for key in self._corrections if key[:2] == (kind, "16bit")]
                carried, sigma = "from 16 bit by bytes", DTYPE_SIGMA
        if kind == Elementwise.kind and (not same or variant == POOLED):
            same = [key for key in self._corrections if key[0] == kind and key[1] == POOLED]
            if self._names_kernels:
                carried, sigma = FROM_KERNELS, KERNEL_SIGMA
        if not same and kind == PolicyKernel.kind:  # another statistic of the same kernel
            kernel = variant.partition(" ")[0]
            same = [key for key in self._corrections if key[0] == kind and key[1].partition(" ")[0] == kernel]
            carried, sigma = "from another statistic", DTYPE_SIGMA
        if not same and kind == HostWork.kind:
            part = variant.rpartition(" ")[0]
            same = [key for key in self._corrections if key[:2] == (kind, part)]
            carried, sigma = FROM_STEPS, KERNEL_SIGMA
        if not same:
            return None
        if kind.endswith("attention") and size:
            key = min(same, key=lambda candidate: (abs(log2(candidate[2] / size)), candidate[2]))
            if key[2] != size:
                carried = ", ".join(filter(None, (carried, f"from head size {key[2]}")))
                sigma = hypot(sigma, BEYOND_SIGMA)
        else:
            exact = [key for key in same if key[2] == size]
            if not exact:
                return None
            key = exact[0]
        return Chosen(self._corrections[key], key[1], carried, sigma)

    # -- answers --------------------------------------------------------------------------------------------------

    def answer(self, op: Op, hbm_share: float = 1.0) -> Answer:
        """Time of one launch with this share of the HBM bandwidth; the Op must be one that `knows` accepts."""
        place = locate(op, self.gpu.num_sms)
        chosen = self._choose(place)
        base = self.physics.answer(op, hbm_share)
        if isinstance(op, MixedAttention) and chosen is None:
            return self._mixed(op, base, hbm_share)
        assert chosen is not None, f"{self.name} has no table for {op}"
        seconds = base.seconds
        if isinstance(op, DecodeAttention):
            seconds = self._decode_s(op, chosen, place.at, hbm_share)
        elif isinstance(op, Gemm):
            seconds *= exp(self._gemm_ratio(op, chosen, place))
        else:
            seconds *= exp(chosen.correction.at(place.at))
        inside = chosen.correction.covers(place.at)
        answering = place._replace(variant=chosen.variant)
        source, bias, size_class = self._label(op.kind, error_class(answering, base.size_class), chosen, inside)
        return Answer(seconds, source, bias, size_class)

    def _gemm_ratio(self, op: Gemm, chosen: Chosen, place: Place) -> float:
        """The correction, with the line of one weight matrix over m kept: a model has few matrices and many batch sizes."""
        shapes, *tails = chosen.correction.terms
        key = (op.n, op.k, place.variant)
        line = self._gemm_lines.get(key)
        if line is None:
            line = self._gemm_lines[key] = shapes.along(0, place.at)
        knots, ratios = line
        cell, share = cell_of(knots, place.at[0])
        ratio = ratios[cell] if not share else ratios[cell] + share * (ratios[cell + 1] - ratios[cell])
        for tail in tails:
            ratio += tail.at(place.at)
        return ratio

    def _mixed(self, op: MixedAttention, base: Answer, share: float) -> Answer:
        """The measured prefill, and what the physics adds to it for the decodes in the same launch."""
        if self._prefill_beyond is None or self._prefill_beyond[0] is not op.prefill or self._prefill_beyond[1] != share:
            beyond_s = self.answer(op.prefill, share).seconds - self.physics.answer(op.prefill, share).seconds
            self._prefill_beyond = (op.prefill, share, beyond_s)  # a prompt chunk is asked about beside several batches in a row
        seconds = self._prefill_beyond[2] + base.seconds
        carried = f"fitted: prefill of {self.content.title} + interaction of {base.source.partition(': ')[2]}"
        return Answer(seconds, carried, widened(base.log_bias, self._extra_sigma), base.size_class)

    def _decode_s(self, op: DecodeAttention, chosen: Chosen, at: Sequence[float], share: float) -> float:
        (seconds,) = self.physics.decode_curve(op, (op.kv_slots,), share)
        seconds = max(seconds * exp(chosen.correction.at(at)), self._least_s(op, op.kv_slots, share))
        if op.max_kv_tokens * op.batch * op.kv_heads > op.kv_slots:  # one long sequence among short ones can set the pace
            longest = min(op.kv_slots, op.max_kv_tokens * op.kv_heads)
            alone = DecodeAttention(
                1, op.q_heads, op.kv_heads, op.head_dim, longest, longest // op.kv_heads, op.slot_bytes, op.kv_format, op.layout
            )
            (alone_s,) = self.decode_curve(alone, (longest,), share)
            seconds = max(seconds, alone_s)
        return seconds

    def decode_curve(self, op: DecodeAttention, kv_slots: Sequence[int], hbm_share: float = 1.0) -> list[float]:
        seconds = self.physics.decode_curve(op, kv_slots, hbm_share)
        place = locate(op, self.gpu.num_sms)
        chosen = self._choose(place)
        if chosen is None:
            return seconds
        lanes = op.batch * op.kv_heads
        ratios = chosen.correction.along(CONTEXT, place.at, [max(slots / lanes, 1.0) for slots in kv_slots])
        found = [value * exp(ratio) for value, ratio in zip(seconds, ratios, strict=True)]
        if self._least_s_per_byte:
            least_s = (self._least_s(op, slots, hbm_share) for slots in kv_slots)
            found = [max(pair) for pair in zip(found, least_s, strict=True)]
        return found

    def _least_s(self, op: DecodeAttention, kv_slots: int, share: float) -> float:
        """The cache once at the datasheet's bandwidth: a table carried over from another GPU says nothing below it."""
        return kv_slots * op.slot_bytes * self._least_s_per_byte / share

    def kv_knots(self, op: DecodeAttention) -> Sequence[int]:
        return self.physics.kv_knots(op)

    # -- errors ---------------------------------------------------------------------------------------------------

    def _label(self, kind: str, size_class: str, chosen: Chosen, inside: bool) -> tuple[str, LogBias, str]:
        carried = ", ".join(filter(None, (self._carried, chosen.carried, "" if inside else "beyond the table")))
        sigma = hypot(self._extra_sigma, chosen.sigma, 0.0 if inside else BEYOND_SIGMA)
        key = (kind, size_class, carried, sigma)
        found = self._labels.get(key)
        if found is None:
            found = self._labels[key] = self._new_label(kind, size_class, carried, sigma)
        return found

    def _new_label(self, kind: str, size_class: str, carried: str, sigma: float) -> tuple[str, LogBias, str]:
        quantiles = self._quantiles(kind, size_class)
        if not carried:
            return f"measured: {self.content.title} ({self.content.source})", quantiles, size_class
        of_others = any(reason in carried for reason in (FROM_KERNELS, FROM_STEPS, FROM_PLAIN))
        named = f"{size_class}, {'of others' if of_others else 'carried'}"
        return f"fitted: {self.content.title}, {carried}", widened(quantiles, sigma), named

    def _quantiles(self, kind: str, size_class: str) -> LogBias:
        own = self.content.errors.get((kind, size_class))
        if own is not None:
            return own.quantiles
        others = [error.quantiles for (other, _), error in self.content.errors.items() if other == kind]
        if not others:
            return self.physics.log_biases[kind, size_class]
        return min(q[0] for q in others), min(q[1] for q in others), max(q[2] for q in others), max(q[3] for q in others)

    def _all_biases(self) -> dict[tuple[str, str], LogBias]:
        """Of every class that an answer may carry; the widest of those with one name."""
        sigma = hypot(self._extra_sigma, DTYPE_SIGMA, BEYOND_SIGMA, BEYOND_SIGMA)
        found = {}
        kinds = {key[0] for key in self.content.tables}
        if self._has_prefill and MixedAttention.kind not in kinds:
            for key, bias in self.physics.log_biases.items():
                if key[0] == MixedAttention.kind:
                    found[key] = widened(bias, self._extra_sigma)
        own = [key for key in self.content.errors if key[0] in OWN_KINDS]
        for kind, size_class in (*self.physics.log_biases, *own):
            if kind in kinds:
                quantiles = self._quantiles(kind, size_class)
                found[kind, size_class] = quantiles
                found[kind, f"{size_class}, carried"] = widened(quantiles, sigma)
                found[kind, f"{size_class}, of others"] = widened(quantiles, hypot(sigma, KERNEL_SIGMA))
        return found


def widened(quantiles: LogBias, sigma: float) -> LogBias:
    """Quantiles of a log error with an independent normal one added: the middle stays, half widths add in quadrature."""
    middle = (quantiles[1] + quantiles[2]) / 2
    z = (1.96, 1.0, 1.0, 1.96)
    widths = [hypot(quantile - middle, factor * sigma) for quantile, factor in zip(quantiles, z, strict=True)]
    return middle - widths[0], middle - widths[1], middle + widths[2], middle + widths[3]




def _is_latency(name: str) -> bool:
    """Whether a physical constant is time spent inside a kernel, whatever it moves or computes."""
    return name.endswith("_s") and not name.startswith(("host.", "collective.", "copy."))


def _carried_shares(known: Mapping[str, float], content: ProfileFile, gpu: Gpu, measured_on: Gpu) -> dict[str, float]:
    """Shares of matrix peaks for another GPU than they were fitted on: by what it is known to sustain, or else by power."""
    clock, found = _sustained_clock(gpu, measured_on), {}
    shares = {name: _operands(name) for name in known if name.endswith("compute_frac")}
    sustained = {
        dtype: rate / gpu.peak_flops(dtype) / _best_share(content, measured_on, dtype)
        for dtype in set(shares.values())
        if (rate := sustained_rate(gpu, dtype)) is not None
    }
    for name, dtype in shares.items():
        found[name] = known[name] * sustained[dtype] if dtype in sustained else min(known[name] * clock, MOST_OF_PEAK)
    return found


def _operands(name: str) -> str:
    """What an efficiency's products multiply: attention and weights of 4 bits are widened."""
    return next((dtype for dtype in ("fp8", "int8", "fp32") if f".{dtype}." in name), "bf16")


def _best_share(content: ProfileFile, measured_on: Gpu, dtype: str) -> float:
    """Of its datasheet's peak, what the best large product of a profile reaches on the GPU that it was measured on."""
    profile = MeasuredProfile(content, measured_on, measured_on)
    products = [Gemm(*shape, dtype) for shape in LARGE_PRODUCTS]
    if not profile.knows(locate(products[0], measured_on.num_sms), True):
        return BEST_OF_PEAK
    return max(2.0 * op.m * op.n * op.k / profile.answer(op).seconds for op in products) / measured_on.peak_flops(dtype)


def _sustained_clock(gpu: Gpu, measured_on: Gpu) -> float:
    """How much more of its peak a GPU sustains than another of its generation, by board power per peak FLOP/s."""
    if gpu.compute_capability is None or gpu.compute_capability != measured_on.compute_capability:
        return 1.0
    here, there = (one.board_power_w / one.peak_flops("bf16") for one in (gpu, measured_on))
    return float((here / there) ** DVFS_EXPONENT)
