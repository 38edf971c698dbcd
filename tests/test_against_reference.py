"""The fast simulation against the step-by-step reference, to the picosecond, on random scenarios.

KVSIM_EXAMPLES=2000 runs so many random scenarios for each composition of policies instead of a few.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from reference import (
    RefCache,
    RefFrontEnd,
    RefSequence,
    check_against_reference,
    differences,
    expand,
    reference_pool,
    simulate_reference,
)

from kvsim.arrivals import AllAtOnce, ClosedLoopArrivals, Constant, Gamma, Poisson
from kvsim.cost import StepCosts
from kvsim.datasheet import DatasheetProfile
from kvsim.engines.base import Engine
from kvsim.engines.huggingface import HuggingFace
from kvsim.engines.sglang import SgLang
from kvsim.engines.trtllm import TensorRtLlm
from kvsim.engines.vllm_v0 import VllmV0
from kvsim.engines.vllm_v1 import VllmV1
from kvsim.errors import DoesNotFitError
from kvsim.hardware import load_gpu
from kvsim.model import Model
from kvsim.ops import DecodeAttention, HostWork, MixedAttention, Op, PolicyKernel, PrefillAttention
from kvsim.policies.ada_kv import AdaKV
from kvsim.policies.base import CacheShape, Policy, SequenceShape
from kvsim.policies.compose import CachePlan, Composition
from kvsim.policies.full import Full
from kvsim.policies.h2o import H2O
from kvsim.policies.keyformer import Keyformer
from kvsim.policies.kivi import KIVI
from kvsim.policies.kv_compress import KVCompress
from kvsim.policies.kv_quant import KVQuant
from kvsim.policies.pyramid_kv import PyramidKV
from kvsim.policies.scissorhands import Scissorhands
from kvsim.policies.snapkv import SnapKV
from kvsim.policies.streaming_llm import StreamingLLM
from kvsim.policies.think import ThinK
from kvsim.policies.window import Window
from kvsim.pool import BlockPool, PrefixPool
from kvsim.profile import Answer, LogBias, Profile, curve_by_answers
from kvsim.recording import RunLog
from kvsim.requests import ClosedLoop, FrontEnd, OpenLoop, Request, RequestSource
from kvsim.scenario import parse_scenario
from kvsim.simulation import Replica
from kvsim.units import PS_PER_S

EXAMPLES = int(os.environ.get("KVSIM_EXAMPLES", "0"))
MICROSECOND = 1e-6
NO_BIAS: LogBias = (0.0, 0.0, 0.0, 0.0)


# -- profiles that make closed forms hard ------------------------------------------------------------------------------


class RoughProfile:
    """Tables that are neither smooth nor convex nor monotone, in which one sequence alone is slow.

    alone: how much slower a slot is read by a batch of one than by a large one: the longest sequence then sets the pace.
    host_s: of each part of the host's work. tick_s: everything is a multiple of it, so that ties happen.
    """

    name = "rough"
    log_biases: Mapping[tuple[str, str], LogBias] = {}

    def __init__(self, seed: int, alone: float, host_s: float, tick_s: float = 0.0) -> None:
        self.seed, self.alone, self.host_s, self.tick_s = seed, alone, host_s, tick_s
        rng = random.Random(seed)
        self.knots = sorted({1, *(rng.randrange(2, 6000) for _ in range(rng.randrange(3, 25)))})
        self.knots += [self.knots[-1] * 2, 1 << 40]

    def _noise(self, *key: object) -> float:
        return random.Random(repr((self.seed, *key))).uniform(0.6, 1.6)

    def kv_knots(self, op: DecodeAttention) -> Sequence[int]:
        return self.knots[op.batch % 2 :]

    def decode_curve(self, op: DecodeAttention, kv_slots: Sequence[int], hbm_share: float = 1.0) -> list[float]:
        return curve_by_answers(self, op, kv_slots, hbm_share)

    def _decode_s(self, op: DecodeAttention) -> float:
        bucket = sum(knot <= op.kv_slots for knot in self.knots)
        per_slot = 0.002 * (1 + self.alone / op.batch) * op.slot_bytes / 64
        return (2 + 0.1 * op.batch + per_slot * min(op.kv_slots, 1 << 24)) * self._noise(op.batch, bucket)

    def _us(self, op: Op) -> float:
        if isinstance(op, DecodeAttention):
            return self._decode_s(op)
        if isinstance(op, MixedAttention):
            return 1.3 * (self._us(op.prefill) + self._decode_s(op.decode)) * self._noise("mixed", op.prefill.new_tokens)
        if isinstance(op, PrefillAttention):
            return (3 + 0.05 * op.new_tokens * (op.prior_tokens + op.new_tokens)) * self._noise("prefill", op.new_tokens)
        if isinstance(op, HostWork):
            return (1 + 0.05 * min(op.batch, 200)) * self.host_s / MICROSECOND
        if isinstance(op, PolicyKernel):
            size = max(1.0, op.bytes_moved)
            return op.num_launches * 0.5 + min(size, 2.0**40) * 1e-5 * self._noise(op.kernel, size // 10_000)
        return 2 * self._noise(op.kind, repr(op))

    def answer(self, op: Op, hbm_share: float = 1.0) -> Answer:
        seconds = self._us(op) * MICROSECOND / (1.0 if isinstance(op, HostWork) else hbm_share)
        if self.tick_s:
            seconds = ceil(seconds / self.tick_s) * self.tick_s
        return Answer(seconds, "assumed: rough", NO_BIAS, "any")


DATASHEET: dict[str, DatasheetProfile] = {}


def datasheet(gpu: str) -> DatasheetProfile:
    if gpu not in DATASHEET:
        DATASHEET[gpu] = DatasheetProfile(load_gpu(gpu))
    return DATASHEET[gpu]


def tiny_model(layers: int = 2, q_heads: int = 4, kv_heads: int = 2, head_dim: int = 32) -> Model:
    return Model("tiny", layers, 64, q_heads, kv_heads, head_dim, 128, 500, 4096)


TINY = tiny_model()


# -- one case, simulated twice ------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Everything that a simulation of one policy depends on. extra_units: of the pool, beyond what one request may need."""

    engine: Engine
    policies: tuple[Policy, ...]
    source: Callable[[], RequestSource]
    longest: Sequence[tuple[int, int]]  # prompt and output tokens of the requests
    profile: Profile
    model: Model = TINY
    tp: int = 1
    extra_units: int = 0
    pool_units: int | None = None
    front_end_ps: int = 0

    def __post_init__(self) -> None:
        engine, model, tp = self.engine, self.model, self.tp
        kv_bytes = 1.0 if engine.kv_cache_dtype == "fp8" else 2.0
        shape = CacheShape(
            model.num_layers, model.q_heads_per_gpu(tp), model.kv_heads_per_gpu(tp), model.head_dim, kv_bytes,
            engine.block_tokens, engine.rotation_passes,
        )  # fmt: skip
        self.plan = CachePlan(Composition(self.policies), shape, engine.kv_dtype(), engine.layout)
        if self.pool_units is None:
            self.pool_units = self.least_units() + self.extra_units

    def least_units(self) -> int:
        """What one request needs alone in the pool, and to be computed again after its last token but one."""
        cache, units = RefCache(self.plan), 0
        for prompt, output in set(self.longest):
            units = max(units, cache.peak_units(prompt, output), cache.prefill_units(prompt + output - 1))
        return units * getattr(self.engine, "num_beams", 1)

    def __repr__(self) -> str:
        profile = vars(self.profile) if isinstance(self.profile, RoughProfile) else self.profile.name
        source, requests = self.source(), []
        if isinstance(source, OpenLoop):
            while source.next_arrival_ps is not None:
                request = source.take()
                hashes = f", hashes {request.prefix_hashes}" if request.prefix_hashes else ""
                requests.append(
                    f"{request.arrival_ps}: {request.prompt_tokens} -> {request.output_tokens}"
                    f" ({request.cached_prompt_tokens} cached{hashes})"
                )
        return (
            f"{self.engine!r}\npolicies {self.policies}\npool {self.pool_units} units, {self.plan.prefill_units_per_block} a"
            f" block, lanes {self.plan.lane_units}\nprofile {profile}\nmodel {self.model.num_layers} layers,"
            f" {self.model.num_q_heads}/{self.model.num_kv_heads} heads of {self.model.head_dim}, tp {self.tp}\n"
            f"front end of {self.front_end_ps} ps, requests {requests or getattr(self.source, '__doc__', '')}\nlengths {self.longest}"
        )

    def costs(self, hbm_share: float = 1.0) -> StepCosts:
        plan = self.plan
        assert self.pool_units is not None
        slots = self.pool_units // plan.prefill_units_per_block * plan.shape.block_size_tokens * plan.shape.num_pairs
        return StepCosts(self.model, self.tp, "bf16", self.engine, plan, self.profile, slots, hbm_share)

    def contended(self) -> StepCosts | None:
        return self.costs(1 - self.engine.side_stream_hbm_frac) if self.engine.policy_stream == "side" else None

    def seen(self, reference: bool = False) -> RequestSource:
        """The requests behind the front end."""
        source = self.source()
        if not self.front_end_ps:
            return source
        return (RefFrontEnd if reference else FrontEnd)(source, self.front_end_ps)

    def fast(self) -> RunLog:
        source, engine, capacity = self.seen(), self.engine, self.pool_units
        assert capacity is not None
        pool = BlockPool(capacity)
        if self._shares(source):
            pool = PrefixPool(capacity, engine.block_tokens, source.hash_block_tokens)
        env = simpy.Environment(initial_time=0)
        replica = Replica(env, source, engine.scheduler(pool, self.plan, self.model), self.costs(), self.contended())
        env.process(replica.serve())
        env.run()
        return replica.log

    def check(self) -> None:
        source, capacity = self.seen(reference=True), self.pool_units
        assert capacity is not None
        pool = reference_pool(self.engine, self.plan, capacity, source)
        log = self.fast()
        truth = simulate_reference(self.engine, self.plan, pool, source, self.costs(), self.contended())
        found = differences(log, truth)
        assert not found, "\n".join([*found, repr(self)])

    def _shares(self, source: RequestSource) -> bool:
        return bool(
            source.hash_block_tokens
            and getattr(self.engine, "enable_prefix_caching", False)
            and self.plan.composition.blocks_shareable
        )


# -- random cases -------------------------------------------------------------------------------------------------------


@st.composite
def token_policy(draw: st.DrawFn, kind: str) -> Policy:
    budget = draw(st.integers(2, 24), "budget")
    frac = draw(st.sampled_from([0.2, 0.3, 0.5, 0.75, 1.0]), "fraction")
    if kind == "streaming_llm":
        return StreamingLLM(sink_tokens=draw(st.integers(0, 4)), window_tokens=budget)
    if kind == "window":
        return Window(window_tokens=budget)
    if kind == "snapkv":
        return SnapKV(budget_tokens=budget, window_tokens=1)
    if kind == "pyramid_kv":
        return PyramidKV(budget_tokens=budget, window_tokens=1, beta=draw(st.sampled_from([1.0, 2.0, 20.0])))
    if kind == "ada_kv":
        shares = draw(st.sampled_from([(1.0,), (1.0, 3.0), (0.2, 1.0, 2.5)]))
        return AdaKV(budget_tokens=budget, window_tokens=1, head_shares=shares, flattened_copy=draw(st.booleans()))
    if kind == "h2o":
        if draw(st.booleans()):
            return H2O(budget_tokens=budget)
        return H2O(kept_frac=frac, variant=draw(st.sampled_from(["paper", "flexgen"])))
    if kind == "keyformer":
        return Keyformer(kept_frac=frac)
    if kind == "keyformer code":
        return Keyformer(kept_frac=frac, schedule="code", keep_original_index=draw(st.booleans()))
    if kind == "scissorhands":
        return Scissorhands(
            budget_tokens=budget, drop_frac=draw(st.sampled_from([0.5, 0.75])), recent_tokens=0,
            recompute=draw(st.booleans()),
        )  # fmt: skip
    if kind == "scissorhands layers":
        return Scissorhands(
            budget_tokens=budget + 8, recent_tokens=0, later_layer_weight=draw(st.sampled_from([0.5, 2.0, 3.0]))
        )
    assert kind == "kv_compress"
    return KVCompress(
        compression_ratio=draw(st.sampled_from([1.0, 1.5, 2.0, 4.0])), min_kept_tokens=budget, protected_tokens=0,
        interval_steps=draw(st.sampled_from([1, 1, 2, 5, 8, 40])), block_size_tokens=draw(st.sampled_from([1, 4, 16])),
        block_rounding=draw(st.sampled_from(["up", "down"])), max_kvs_per_compression=64,
        head_shares=draw(st.sampled_from([(1.0,), (1.0, 3.0), (0.2, 1.0, 2.5)])),
    )  # fmt: skip


@st.composite
def other_policy(draw: st.DrawFn, kind: str) -> Policy:
    if kind == "think":
        return ThinK(pruned_frac=draw(st.sampled_from([0.4, 0.5, 0.75])), recent_tokens=draw(st.integers(0, 9)))
    if kind == "kivi":
        group = draw(st.sampled_from([4, 8]))
        return KIVI(
            bits=draw(st.sampled_from([2, 4])), group_size_tokens=group, residual_tokens=group * draw(st.integers(1, 3))
        )
    if kind == "kv_quant":
        return KVQuant(
            dtype=draw(st.sampled_from(["fp8", "int8", "int4"])), scales=draw(st.sampled_from(["group", "token"]))
        )
    assert kind == "full"
    return Full()


OTHERS = ("full", "think", "kivi", "kv_quant")
COMPOSITIONS = (
    ("full",), ("kv_quant",), ("think",), ("kivi",), ("think", "kivi"), ("think", "kv_quant"),
    ("snapkv",), ("streaming_llm",), ("window",), ("pyramid_kv",), ("ada_kv",), ("h2o",), ("keyformer",), ("keyformer code",),
    ("scissorhands",), ("scissorhands layers",), ("kv_compress",),
    ("snapkv", "think"), ("snapkv", "kivi"), ("snapkv", "think", "kivi"), ("streaming_llm", "kivi"), ("window", "think"),
    ("h2o", "think", "kivi"), ("keyformer code", "kv_quant"), ("keyformer code", "think"), ("keyformer", "think"),
    ("scissorhands", "kv_quant"), ("scissorhands", "think"), ("scissorhands layers", "kivi"), ("pyramid_kv", "kv_quant"),
    ("pyramid_kv", "think"), ("ada_kv", "kivi"), ("kv_compress", "kv_quant"), ("kv_compress", "think"),
)  # fmt: skip


@st.composite
def policies_of(draw: st.DrawFn, kinds: tuple[str, ...]) -> tuple[Policy, ...]:
    return tuple(draw(other_policy(kind) if kind in OTHERS else token_policy(kind)) for kind in kinds)


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    which = draw(st.sampled_from(["v1", "v1", "v0", "trtllm", "sglang", "huggingface"]), "engine")
    common: dict[str, Any] = {"enforce_eager": draw(st.booleans()), "per_head_kv": True}
    if draw(st.booleans()):
        common |= {"policy_stream": "side", "side_stream_hbm_frac": draw(st.sampled_from([0.2, 0.5, 0.9]))}
    if which == "huggingface":
        return HuggingFace(batch_size=draw(st.integers(1, 5)), num_beams=draw(st.sampled_from([1, 1, 2, 3])), **common)
    seqs, size = draw(st.sampled_from([1, 2, 3, 5, 16]), "seqs"), draw(st.sampled_from([1, 4, 16]), "block")
    if which == "v0":
        return VllmV0(
            max_num_seqs=seqs, block_size_tokens=size, watermark_frac=draw(st.sampled_from([0.0, 0.01, 0.1])),
            max_num_batched_tokens=draw(st.sampled_from([None, 100, 150])),
            preemption=draw(st.sampled_from(["recompute", "swap"])),
            swap_space_gib=draw(st.sampled_from([0.0, 2.0**-16, 2.0**-12, 4.0])), **common,
        )  # fmt: skip
    if which == "trtllm":
        return TensorRtLlm(
            max_batch_size=seqs, max_num_tokens=draw(st.sampled_from([150, 300, 2000])), tokens_per_block=size,
            chunked_context=draw(st.booleans()), overlap_scheduler=draw(st.booleans()),
            capacity_policy=draw(st.sampled_from(["guaranteed_no_evict", "max_utilization"])), **common,
        )  # fmt: skip
    if which == "sglang":
        return SgLang(
            max_running_requests=seqs, chunked_prefill_size_tokens=draw(st.sampled_from([7, 100, 2000])),
            page_size_tokens=size, overlap_schedule=draw(st.booleans()), **common,
        )  # fmt: skip
    return VllmV1(
        max_num_seqs=seqs, async_scheduling=draw(st.booleans()), enable_prefix_caching=draw(st.booleans()),
        max_num_batched_tokens=seqs + draw(st.sampled_from([0, 1, 5, 20, 2000])),
        block_size_tokens=size, reserve_full_prompt=draw(st.booleans()), **common,
    )  # fmt: skip


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    kind = draw(st.sampled_from(["rough", "rough", "tick", "datasheet"]), "profile")
    if kind == "datasheet":
        return datasheet(draw(st.sampled_from(["a100", "l4", "h100-sxm"])))
    return RoughProfile(
        draw(st.integers(0, 1000)), draw(st.sampled_from([0.0, 3.0, 20.0])),
        draw(st.sampled_from([1e-7, 8e-6, 1e-3])), 1e-4 if kind == "tick" else 0.0,
    )  # fmt: skip


TICK_PS = PS_PER_S // 10_000


def arrival_times(kind: str, rate_per_s: float, seed: int, number: int) -> list[int]:
    if kind == "ticks":  # on, just before and just after the boundaries of steps
        rng = random.Random(seed)
        return sorted(rng.randrange(60) * TICK_PS + rng.choice([-1, 0, 0, 0, 1]) + 1 for _ in range(number))
    how: Any = {
        "poisson": lambda: Poisson(rate_per_s=rate_per_s), "gamma": lambda: Gamma(rate_per_s=rate_per_s, burstiness=0.3),
        "constant": lambda: Constant(rate_per_s=rate_per_s), "all_at_once": AllAtOnce,
    }[kind]()  # fmt: skip
    times = how.times_ps(np.random.Generator(np.random.PCG64(seed)))
    return [next(times) for _ in range(number)]


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...]) -> Case:
    engine, profile, policies = draw(engines()), draw(profiles()), draw(policies_of(kinds))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    model = tiny_model(
        draw(st.integers(2, 4)), kv_heads * draw(st.sampled_from([1, 2, 4])), kv_heads, draw(st.sampled_from([32, 64]))
    )
    number = draw(st.integers(1, 12), "number of requests")
    length = st.one_of(st.integers(1, 50), st.sampled_from([1, 4, 15, 16, 17, 32]))
    output = st.one_of(st.integers(1, 50), st.sampled_from([1, 2, 16, 17]))
    lengths = draw(st.lists(st.tuples(length, output), min_size=number, max_size=number), "lengths")
    arrivals = draw(st.sampled_from(["poisson", "gamma", "constant", "all_at_once", "ticks", "closed"]), "arrivals")
    rate = draw(st.sampled_from([100.0, 1000.0, 5000.0, 10_000.0, 50_000.0]), "rate")
    tp = draw(st.sampled_from([1, 1, 1, 2])) if model.num_q_heads % 2 == 0 else 1
    seed = draw(st.integers(0, 99))
    extra = draw(st.sampled_from([0, 0, 1, 2, 5, 20, 1000]), "extra blocks")

    if arrivals == "closed":
        clients = draw(st.integers(1, number))
        per_client = draw(st.sampled_from([None, 1, 2]))
        loop = ClosedLoopArrivals(clients=clients, think_time_s=draw(st.sampled_from([0.0, 1e-4, 1.23456e-3])))
        if draw(st.booleans()):
            loop = loop.model_copy(update={"start": "staggered", "stagger_s": 1e-3})
        think_ps = round(loop.think_time_s * PS_PER_S)
        total = number if per_client is None else clients * per_client

        def source() -> RequestSource:
            endless = (lengths[i % number] for i in range(10**6))
            return ClosedLoop(loop.starts_ps(), endless, think_ps, total, per_client)

        source.__doc__ = f"{loop!r}, {total} requests, {per_client} per client"
    else:
        times = arrival_times(arrivals, rate, seed, number)
        hash_blocks = 0
        if isinstance(engine, VllmV1) and draw(st.booleans(), "prefix hashes"):
            hash_blocks = engine.block_tokens * draw(st.sampled_from([1, 1, 2, 3]))
        said = draw(st.booleans(), "cached prompt tokens")
        rng, requests = random.Random(seed), []
        for i, (prompt, answer) in enumerate(lengths):
            cached = rng.choice([0, prompt // 2, prompt]) if said else 0
            hashes: tuple[int, ...] = ()
            if hash_blocks:
                family, shared = rng.randrange(2), rng.randrange(8)
                num_hashes = rng.choice([-(-prompt // hash_blocks), prompt // hash_blocks])
                hashes = tuple(1000 * family + b if b < shared else 1000 * (i + 2) + b for b in range(num_hashes))
            requests.append(Request(i, times[i], prompt, answer, cached, hashes))

        def source() -> RequestSource:
            return OpenLoop(iter(requests), hash_blocks)

    front_end_ps = draw(st.sampled_from([0, 0, 0, 1, TICK_PS, 123_456_789]), "front end")
    case = Case(engine, policies, source, lengths, profile, model, tp, front_end_ps=front_end_ps)
    assert case.pool_units is not None
    case.pool_units += extra * case.plan.prefill_units_per_block
    return case


def slow_or_not(few: int) -> Any:
    return settings(
        max_examples=EXAMPLES or few, deadline=None, derandomize=not EXAMPLES, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.mark.parametrize("kinds", COMPOSITIONS, ids="+".join)
def test_random_scenarios(kinds: tuple[str, ...]) -> None:
    @slow_or_not(60 if kinds in (("full",), ("kv_quant",)) else 12)  # blocks are shared under these two only
    @given(cases(kinds))
    def agree(case: Case) -> None:
        try:
            case.check()
        except DoesNotFitError:  # preempted at a moment from which it cannot be computed again
            reject()

    agree()


# -- single cases -------------------------------------------------------------------------------------------------------

CLOCKWORK = RoughProfile(0, 0.0, 1e-3, 1e-4)  # every step takes a multiple of 100 µs
SKEWED = RoughProfile(7, 20.0, 1e-7)


def requests(*rows: tuple[Any, ...], hash_blocks: int = 0) -> Callable[[], RequestSource]:
    """Rows are arrival_ps, prompt, output, and possibly cached prompt tokens and prefix hashes."""
    found = [Request(i, *row) for i, row in enumerate(rows)]
    return lambda: OpenLoop(iter(found), hash_blocks)


def case_of(
    engine: Engine, policies: Sequence[Policy], *rows: tuple[Any, ...], hash_blocks: int = 0, profile: Profile = CLOCKWORK,
    **more: Any,
) -> Case:  # fmt: skip
    lengths = [(row[1], row[2]) for row in rows]
    return Case(engine, tuple(policies), requests(*rows, hash_blocks=hash_blocks), lengths, profile, **more)


def boundaries(case: Case) -> list[int]:
    """When its steps begin."""
    return [step.start_ps for step in expand(case.fast())[0]]


ENGINES_SMALL = (
    VllmV1(max_num_seqs=3, max_num_batched_tokens=8, block_size_tokens=4),
    VllmV0(max_num_seqs=3, block_size_tokens=4),
    HuggingFace(batch_size=3),
)
small_engines = pytest.mark.parametrize("engine", ENGINES_SMALL, ids=lambda engine: engine.kind)


@small_engines
def test_arrivals_at_and_around_every_boundary(engine: Engine) -> None:
    first = (0, 6, 9)
    for boundary in boundaries(case_of(engine, [], first)):
        for arrival_ps in (boundary - 1, boundary, boundary + 1):
            if arrival_ps >= 0:
                case_of(engine, [], first, (arrival_ps, 5, 3)).check()
                case_of(engine, [], first, (arrival_ps, 5, 3), (arrival_ps, 2, 1)).check()


@small_engines
@pytest.mark.parametrize("output", [1, 2, 3])
def test_short_outputs_and_prompts_that_fill_their_blocks(engine: Engine, output: int) -> None:
    for prompt in (1, 3, 4, 5, 8, 16):
        case_of(engine, [], (0, prompt, output), (0, prompt, 1), (7, 4, output)).check()


@pytest.mark.parametrize("extra_blocks", [0, 1, 2])
@pytest.mark.parametrize("profile", [CLOCKWORK, SKEWED], ids=["clockwork", "skewed"])
def test_pool_exactly_full(extra_blocks: int, profile: Profile) -> None:
    rows = [(0, 8, 9), (0, 7, 10), (1, 1, 16), (1, 15, 2)]
    for engine in (
        VllmV1(max_num_seqs=4, max_num_batched_tokens=4, block_size_tokens=4),
        VllmV1(max_num_seqs=4, max_num_batched_tokens=64, block_size_tokens=4, reserve_full_prompt=False),
        VllmV0(max_num_seqs=4, block_size_tokens=4),
        VllmV0(max_num_seqs=4, block_size_tokens=4, preemption="swap", watermark_frac=0.0),
    ):
        for blocks in range(4, 12):
            case_of(engine, [], *rows, pool_units=blocks + extra_blocks, profile=profile).check()


@pytest.mark.parametrize("seqs", [1, 2, 4])
def test_budget_no_larger_than_the_batch(seqs: int) -> None:
    engine = VllmV1(max_num_seqs=seqs, max_num_batched_tokens=seqs, block_size_tokens=4)
    case_of(engine, [], *((i, 5 + i, 6) for i in range(6))).check()


@pytest.mark.parametrize(
    "policies",
    [
        [Keyformer(kept_frac=0.5, schedule="code")], [Scissorhands(budget_tokens=8, recent_tokens=0)], [KIVI(residual_tokens=32)],
        [KVCompress(compression_ratio=2, min_kept_tokens=8, protected_tokens=0, interval_steps=4, block_size_tokens=4)],
        [StreamingLLM(sink_tokens=2, window_tokens=10), KIVI(group_size_tokens=4, residual_tokens=8)],
    ],
    ids=lambda policies: "+".join(policy.kind for policy in policies),
)  # fmt: skip
def test_finishing_and_turning_in_the_same_step(policies: list[Policy]) -> None:
    engine = VllmV1(max_num_seqs=4, block_size_tokens=4, per_head_kv=True)
    for output in range(1, 20):
        case_of(engine, policies, (0, 9, output), (0, 12, 20), profile=SKEWED).check()


@pytest.mark.parametrize("policy", [Window(window_tokens=9), StreamingLLM(sink_tokens=1, window_tokens=8), H2O(budget_tokens=9)])
def test_window_that_the_first_new_token_fills(policy: Policy) -> None:
    """Before that token one block less is held."""
    for engine in ENGINES_SMALL:
        for others in ([], [ThinK(pruned_frac=0.5, recent_tokens=8)], [ThinK(pruned_frac=0.5, recent_tokens=5)]):
            case_of(engine, [policy, *others], (0, 8, 9), (0, 7, 9), (0, 9, 9), model=tiny_model(head_dim=64)).check()


def test_think_splits_one_block_in_two() -> None:
    think = ThinK(pruned_frac=0.5, recent_tokens=5)
    for engine in ENGINES_SMALL:
        case_of(engine, [think], (0, 8, 5), (0, 8, 5), model=tiny_model(head_dim=64)).check()


def test_first_tooth_is_no_taller_than_what_is_held() -> None:
    """A prompt below its target grows until the first compression, which may come before the sawtooth's peak."""
    policy = KVCompress(compression_ratio=2, min_kept_tokens=20, protected_tokens=0, interval_steps=2, head_shares=(1.0,))
    for prompt in (1, 2, 13):
        case_of(HuggingFace(), [policy], (0, prompt, 50)).check()


def test_a_prefill_that_is_preempted_tries_again_in_the_next_step() -> None:
    engine = VllmV1(max_num_seqs=2, max_num_batched_tokens=2, block_size_tokens=1, reserve_full_prompt=False)
    case_of(engine, [], (0, 1, 6), (1, 3, 1), profile=RoughProfile(0, 0.0, 1e-7), pool_units=6).check()


def test_v0_default_budget_is_the_context() -> None:
    """max(max_model_len, 2048) prompt tokens in one step, as vLLM: here the model's context of 4096."""
    case_of(VllmV0(), [], *((0, 1500, 2) for _ in range(4)), pool_units=1000).check()
    case_of(VllmV0(max_model_len=1000), [], *((0, 900, 2) for _ in range(4)), pool_units=1000).check()


def test_v0_spare_block_is_for_each_at_its_turn() -> None:
    engine = VllmV0(block_size_tokens=4, watermark_frac=0.0)
    for blocks in range(4, 10):
        case_of(engine, [], (0, 4, 6), (0, 4, 6), (0, 3, 6), pool_units=blocks).check()


def test_v0_swaps_in_what_fills_the_pool() -> None:
    engine = VllmV0(block_size_tokens=1, watermark_frac=0.0, preemption="swap")
    for units in range(9, 16):
        case_of(engine, [], (0, 2, 8), (0, 2, 8), pool_units=units).check()


def test_v0_swap_in_leaves_what_shrinking_lanes_will_give_back() -> None:
    """Those blocks are not free yet when the sequence comes back."""
    engine = VllmV0(max_num_seqs=8, block_size_tokens=4, watermark_frac=0.0, preemption="swap")
    rows = [(0, 9, 37), (0, 15, 22), (0, 24, 24), (400 * TICK_PS, 28, 14)]
    think = [Window(window_tokens=27), ThinK(pruned_frac=0.5, recent_tokens=0)]
    case_of(engine, think, *rows, model=tiny_model(head_dim=64), pool_units=114).check()


def test_peak_in_the_middle_of_a_run() -> None:
    """Lanes of whole keys grow and lanes of pruned keys shrink, each in its own step."""
    think = [Window(window_tokens=18), ThinK(pruned_frac=0.5, recent_tokens=0)]
    for output in range(2, 24):
        engine = VllmV1(max_num_seqs=4, block_size_tokens=4)
        case_of(engine, think, (0, 13, output), model=tiny_model(head_dim=64)).check()


def test_decodes_take_their_blocks_before_the_queue_looks_for_hits() -> None:
    """The block at the head of the free queue is a hit of the next in line, but a running sequence takes it first."""
    engine = VllmV1(max_num_seqs=4, max_num_batched_tokens=64, block_size_tokens=4)
    known, grows, makes_room = (0, 8, 1, 0, (1, 2)), (0, 4, 12), (0, 9, 2)
    begins = boundaries(case_of(engine, [], known, grows, makes_room, hash_blocks=4, pool_units=7))
    for begin in begins:
        late = (begin + 1, 9, 2, 0, (1, 2))
        case_of(engine, [], known, grows, makes_room, late, hash_blocks=4, pool_units=7).check()


def test_peak_leaves_out_what_a_preempted_prefill_gave_back_before_the_step() -> None:
    engine = VllmV1(max_num_seqs=2, max_num_batched_tokens=2, block_size_tokens=1, reserve_full_prompt=False)
    for hash_blocks in (0, 1):  # without and with a prefix cache
        case_of(engine, [], (0, 1, 3), (0, 4, 1), hash_blocks=hash_blocks, pool_units=5).check()


def test_blocks_are_freed_last_first_whether_known_or_not() -> None:
    """Of b's blocks the first two are copies of a's and cannot be found, the third can: it is freed, and reused, before them."""
    engine = VllmV1(max_num_seqs=4, max_num_batched_tokens=64, block_size_tokens=4)
    a, b = (0, 9, 5, 0, (1, 2)), (0, 13, 1, 0, (1, 2, 3))
    filler = (1, 12, 1)
    second = boundaries(case_of(engine, [], a, b, filler, hash_blocks=4, pool_units=8))[1]
    case_of(engine, [], a, b, filler, (second + 1, 14, 1, 0, (1, 2, 3, 4)), hash_blocks=4, pool_units=8).check()


def test_a_preempted_sequence_that_has_outgrown_the_pool_is_an_error() -> None:
    """Computed again, 2 + n tokens grow by 7 before the first eviction."""
    case = case_of(
        VllmV0(block_size_tokens=1, watermark_frac=0.0), [Keyformer(kept_frac=0.2, schedule="code")], (0, 1, 5), (0, 2, 9),
        pool_units=9,
    )  # fmt: skip
    with pytest.raises(DoesNotFitError):
        case.fast()


def test_scales_that_outweigh_what_they_scale() -> None:
    """4 bits and half of 4 bytes of scale are more than the 16 bits before: refused, or reads that fall step by step."""
    try:
        kivi = KIVI(bits=4, group_size_tokens=2, residual_tokens=4)
    except ValueError:
        return
    case_of(VllmV1(block_size_tokens=4), [Window(window_tokens=9), kivi], (0, 12, 20)).check()


# -- parts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", COMPOSITIONS, ids="+".join)
def test_peak_of_one_sequence(kinds: tuple[str, ...]) -> None:
    """What decides whether a request can be served at all."""

    @slow_or_not(10)
    @given(policies_of(kinds), st.integers(1, 50), st.integers(1, 50), st.sampled_from([1, 4, 16]))
    def agree(policies: tuple[Policy, ...], prompt: int, output: int, size: int) -> None:
        plan = CachePlan(Composition(policies), CacheShape(3, 4, 2, 64, 2.0, size), "bf16")
        assert plan.peak_units(prompt, output) == RefCache(plan).peak_units(prompt, output)

    agree()


def test_peak_between_a_block_that_is_taken_and_one_that_is_given_back() -> None:
    for recent in range(5):
        policies = (Window(window_tokens=6), ThinK(pruned_frac=0.5, recent_tokens=recent))
        plan = CachePlan(Composition(policies), CacheShape(3, 4, 2, 64, 2.0, 4), "bf16")
        for prompt in range(1, 8):
            for output in range(1, 12):
                assert plan.peak_units(prompt, output) == RefCache(plan).peak_units(prompt, output)


@given(st.integers(0, 30), st.integers(0, 8), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, derandomize=True, database=None)
def test_bytes_read_token_by_token(recent: int, step: int, residuals: int, prompt: int, resident: int) -> None:
    """The reference's own arithmetic: each resident token, from the newest on, is read at the width its place says."""
    think, kivi = ThinK(pruned_frac=0.5, recent_tokens=recent), KIVI(group_size_tokens=4, residual_tokens=4 * residuals)
    plan = CachePlan(Composition((think, kivi)), CacheShape(3, 4, 2, 64, 2.0, 16), "bf16")
    seq = RefSequence(Request(0, 0, prompt, 9), prompt, 9, prompt)
    full = think.full_key_tokens(SequenceShape(prompt, prompt), step + 1).value
    wide = kivi.wide_key_tokens(SequenceShape(prompt, prompt), step + 1).value
    wide_values = kivi.wide_value_tokens(SequenceShape(prompt, prompt), step + 1).value
    total = 0.0
    for place in range(resident):
        channels = 64 if place < full else 32
        total += 2.0 * channels if place < wide else kivi.key_bytes(channels, 2.0)
        total += 2.0 * 64 if place < wide_values else kivi.value_bytes(64, 2.0)
    assert RefCache(plan).read16(seq, plan.groups[0], step + 1, resident) == 16 * total


@pytest.mark.parametrize("engine", ["vllm_v1", "vllm_v0", "huggingface"])
@pytest.mark.parametrize("rate_per_s", [2.0, 50.0])
def test_catalogue_scenario(engine: str, rate_per_s: float) -> None:
    """The whole path from a scenario's YAML, as benchmarks use it."""
    fields: dict[str, Any] = {"kind": engine}
    if engine != "huggingface":
        fields |= {"num_gpu_blocks": 120, "max_num_seqs": 32, "max_model_len": 1024, "front_end_s": 0}
    policies = {
        "full": [],
        "snapkv+think": [{"kind": "snapkv", "budget_tokens": 64}, {"kind": "think"}],
        "keyformer": [{"kind": "keyformer", "schedule": "code"}],
    }
    scenario = parse_scenario(
        {
            "gpu": "a100-sxm-80gb", "model": "llama-3.1-8b", "engine": fields, "policies": policies,
            "workload": {
                "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s}, "num_requests": 15,
                "lengths": {
                    "kind": "uniform", "prompt_min_tokens": 1, "prompt_max_tokens": 600,
                    "output_min_tokens": 1, "output_max_tokens": 120,
                },
            },
        },
        Path(),
    )  # fmt: skip
    for name in policies:
        check_against_reference(scenario, name)
