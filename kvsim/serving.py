"""What serves one policy: the parts of a replica, the run itself, and the account of where its time and memory went."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import exp
from typing import TYPE_CHECKING

import simpy

from kvsim.cost import StepCosts
from kvsim.engines.base import Engine
from kvsim.engines.scheduler import Scheduler
from kvsim.errors import InputError
from kvsim.memory import Ledger, check_fits
from kvsim.offload import OffloadCosts
from kvsim.ops import Collective
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool, PrefixPool
from kvsim.pricing import Part
from kvsim.profile import Answer
from kvsim.recording import RunLog
from kvsim.requests import Request, RequestSource
from kvsim.result import Basis
from kvsim.scenario import Scenario
from kvsim.simulation import Replica
from kvsim.units import PS_PER_S
from kvsim.workload_fields import MAX_TIME_S

if TYPE_CHECKING:
    from kvsim.api import Deployment


LINK_NOTE_BYTES = 1 << 24
"""The message by which a link is judged: 1,024 tokens of 8,192 numbers. PCIe 4.0 moves it at 1.9 GB/s a GPU between 8 L40S
(aiconfigurator's table), at some 25 between 8 L20 (vllm-project/vllm issue 4852: a TTFT of 427 ms)."""


class Parts:
    """What replicas of one kind are made of, for one policy. costs and contended: prices, worked out once for all of them."""

    def __init__(self, deployment: Deployment, plan: CachePlan, ledger: Ledger, source: RequestSource) -> None:
        self.deployment, self.plan, self.ledger, engine = deployment, plan, ledger, deployment.engine
        self.notes = [*engine.notes(), *(note for policy in plan.composition.policies for note in policy.notes())]
        self.notes += link_note(deployment)
        self._hash_block_tokens = 0
        if source.hash_block_tokens and getattr(engine, "enable_prefix_caching", False):
            if source.hash_block_tokens % engine.block_tokens:
                raise InputError(
                    "engine.block_size_tokens", engine.block_tokens,
                    f"must divide the trace's hash blocks of {source.hash_block_tokens} tokens for prefix caching",
                    "choose another block size or set enable_prefix_caching: false",
                )  # fmt: skip
            if plan.composition.blocks_shareable:
                self._hash_block_tokens = source.hash_block_tokens
            else:
                self.notes.append(
                    f"prefix caching is off: {plan.composition.describe()} compresses blocks, which cannot be shared afterwards"
                )
        self.costs = self._costs()
        self.contended = self._costs(1 - engine.side_stream_hbm_frac) if engine.policy_stream == "side" else None
        self.check = RequestCheck(deployment, plan, self.ledger.pool_units)

    def _costs(self, hbm_share: float = 1.0) -> StepCosts:
        d = self.deployment
        make = OffloadCosts if d.engine.offloads else StepCosts
        return make(d.model, d.tp, d.weight_dtype, d.engine, self.plan, d.profile, self.ledger.pool_slots, hbm_share)

    def scheduler(self) -> Scheduler:
        """Of one replica, over a pool of its own."""
        units, engine = self.ledger.pool_units, self.deployment.engine
        pool = BlockPool(units)
        if self._hash_block_tokens:
            pool = PrefixPool(units, engine.block_tokens, self._hash_block_tokens)
        return engine.scheduler(pool, self.plan, self.deployment.model)


def run(env: simpy.Environment, scenario: Scenario) -> None:
    """Runs the processes of `env` to their end."""
    try:
        with _without_cycle_collection():
            env.run()
    except OverflowError as error:  # of picoseconds in 64 bits
        raise _too_long(scenario.workload.describe()) from error


def check_number(scenario: Scenario, num_finished: int) -> None:
    """Refuses traffic that leaves nothing to measure."""
    workload = scenario.workload
    if not num_finished:
        raise InputError("workload", workload.describe(), "must hold at least one request")
    if workload.warmup_requests >= num_finished:
        rule = f"must be below the number of requests, {num_finished}"
        raise InputError("workload.warmup_requests", workload.warmup_requests, rule, f"try {num_finished // 10}")


NO_LINK = "no NVLink"
"""How the note on links begins."""


def link_note(deployment: Deployment) -> list[str]:
    """How quick all-reduces over PCIe are taken to be: no datasheet says it, and machines differ more than anything else does."""
    d = deployment
    if d.tp == 1 or d.gpu.has_gpu_link:
        return []
    seconds = d.profile.answer(Collective("all_reduce", LINK_NOTE_BYTES, d.tp)).seconds
    rate = 2 * (d.tp - 1) / d.tp * LINK_NOTE_BYTES / seconds / 1e9
    return [
        f"{NO_LINK}: all-reduces cross PCIe, at {rate:.2g} GB/s in long prompts as priced here; between machines that is 2 to 25 GB/s "
        "(switches, peer-to-peer), so prompts may take several times as long or as short: measure yours (kvsim calibrate device), or "
        "give that rate as gpu_link_gb_per_s in a GPU file of your own"
    ]


def side_note(side_ps: int, engine: Engine) -> list[str]:
    if not side_ps:
        return []
    return [
        f"compressions kept a side stream busy for {side_ps / PS_PER_S:.3g} s beside the steps "
        f"({engine.side_stream_hbm_frac:.0%} of HBM bandwidth while it ran)"
    ]


@contextmanager
def _without_cycle_collection() -> Iterator[None]:
    """A simulation makes millions of objects and no cycles: looking for them costs some 6 % of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class RequestCheck:
    """Refuses requests that the deployment can never serve."""

    def __init__(self, deployment: Deployment, plan: CachePlan, pool_units: int) -> None:
        self.max_tokens, self.plan, self.pool_units = deployment.max_tokens, plan, pool_units
        self.model = deployment.model.name
        self.harmless_tokens = min(deployment.max_tokens, plan.tokens_that_fit(pool_units))
        self.of = ""  # whose replicas these are, where a fleet has others

    def __call__(self, request: Request) -> None:
        tokens = request.prompt_tokens + request.output_tokens
        if request.arrival_ps > MAX_TIME_S * PS_PER_S:
            raise _too_long(f"request {request.index} at {request.arrival_ps / PS_PER_S:,.0f} s")
        if tokens <= self.harmless_tokens:
            return
        check_context(request, self.model, self.max_tokens, self.of)
        field = f"workload: request {request.index}{self.of}: prompt tokens"
        check_fits(self.plan, self.pool_units, field, request.prompt_tokens, request.output_tokens)


def check_context(request: Request, model: str, max_tokens: int, of: str = "") -> None:
    """Raises InputError for a request longer than the deployment's context."""
    tokens = request.prompt_tokens + request.output_tokens
    if tokens > max_tokens:
        raise InputError(
            f"workload: request {request.index}{of}: prompt + output tokens", tokens,
            f"must be at most {max_tokens}, the context of {model} or engine.max_model_len",
            "shorten it, raise max_model_len, or choose a model with a longer context",
        )  # fmt: skip


def _too_long(what: str) -> InputError:
    rule = f"must be served within {MAX_TIME_S:,} s of simulated time (104 days)"
    return InputError("workload", what, rule, "raise the rate or simulate fewer requests")


def kv_bytes_per_sequence(log: RunLog, unit_bytes: int) -> float:
    """Mean over time, while anything decodes, of what the pool holds by sequences in decode."""
    rows = log.step_columns()
    steps = rows["num_steps"]
    duration = steps * rows["first_step_ps"] + rows["step_growth_ps"] * (steps * (steps - 1) // 2)
    pure = (rows["num_decodes"] > 0) & (rows["prefill_tokens"] == 0)
    sequence_ps = float((duration[pure].astype(float) * rows["num_decodes"][pure]).sum())
    return log.decode_unit_ps / sequence_ps * unit_bytes if sequence_ps else 0.0


def basis(replicas: Sequence[Replica]) -> tuple[Basis, ...]:
    """What each Op kind's time rests on, the largest share first."""
    times: dict[Part, int] = {}
    answers: dict[Part, Answer] = {}
    for costs in (costs for replica in replicas for costs in (replica.costs, replica.contended) if costs is not None):
        answers = {**costs.basis, **answers}
        for part, value in costs.op_parts().items():
            times[part] = times.get(part, 0) + value
    total = sum(times.values()) or 1
    rows = []
    for part, value in sorted(times.items(), key=lambda item: (-item[1], item[0])):
        label, source = part
        bias = answers[part].log_bias
        rows.append(Basis(label, value / PS_PER_S, value / total, source, exp(bias[1]), exp(bias[2])))
    return tuple(rows)
