"""`simulate`: a scenario in, a result for each of its policies out."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from math import exp
from pathlib import Path
from typing import NamedTuple

import simpy

from kvsim.cost import StepCosts
from kvsim.dtypes import ACTIVATION_DTYPES, activation_dtype, check_weight_dtype, kv_bytes_per_element
from kvsim.engines.base import Engine
from kvsim.errors import InputError, KvsimError
from kvsim.hardware import Gpu, load_gpu
from kvsim.memory import Ledger, check_fits
from kvsim.metrics import Summary, check_slo, summarize
from kvsim.model import Model, load_model
from kvsim.offload import OffloadCosts
from kvsim.policies.base import CacheShape, Policy
from kvsim.policies.compose import CachePlan, Composition
from kvsim.pool import BlockPool, PrefixPool
from kvsim.profile import Profile
from kvsim.profiles import load_profile
from kvsim.quality import nearest
from kvsim.recording import RunLog
from kvsim.requests import Request
from kvsim.result import Basis, PolicyResult, Result
from kvsim.scenario import Scenario
from kvsim.simulation import Replica
from kvsim.units import PS_PER_S
from kvsim.workload import build_source
from kvsim.workload_fields import MAX_TIME_S

SingleProgress = Callable[[str, int], None]


class Deployment(NamedTuple):
    """A scenario's hardware and model, loaded and checked."""

    gpu: Gpu
    model: Model
    tp: int
    weight_dtype: str
    engine: Engine
    profile: Profile
    max_tokens: int  # longest prompt + output


def deploy(scenario: Scenario) -> Deployment:
    """Loads what a scenario names; raises InputError where the parts do not go together."""
    base = scenario.base_dir
    gpu, model = load_gpu(_resolve(scenario.gpu, base)), load_model(_resolve(scenario.model, base))
    engine, tp = scenario.engine, scenario.tensor_parallel
    model.check_tp(tp, "tensor_parallel")
    check_weight_dtype(scenario.weight_dtype)
    engine.check(model, tp)
    check_slo(scenario.slo)
    longest = engine.max_model_len or model.max_context_tokens
    # ALiBi and plain decoders have no hard limit; learned positions have, and rotary ones are trained for theirs.
    if longest > model.max_context_tokens and model.position != "alibi" and not engine.ignores_positions:
        raise InputError(
            "engine.max_model_len", longest, f"must be at most the context of {model.name}, {model.max_context_tokens}",
            "lower it or choose another model",
        )  # fmt: skip
    profile = load_profile(scenario.profile, gpu, engine.kernels, base)
    return Deployment(gpu, model, tp, scenario.weight_dtype, engine, profile, longest)


def build_plan(deployment: Deployment, policies: Iterable[Policy], field: str) -> CachePlan:
    """The cache under a composition of policies; raises InputError for contradictions, with the reason."""
    model, engine, tp = deployment.model, deployment.engine, deployment.tp
    chosen = tuple(policies)
    composition = Composition(chosen, field)
    kv_dtype = engine.kv_dtype(activation_dtype(deployment.weight_dtype))
    kinds = composition.describe()
    if composition.per_head_lengths and not engine.per_head_kv:
        raise InputError(
            field, kinds, "keeps another number of tokens in every KV head, for which the engine has no block tables",
            "set engine.per_head_kv: true to model a fork that has them, or choose another policy",
        )  # fmt: skip
    if composition.bits.dimension == "bits" and kv_dtype not in ACTIVATION_DTYPES:
        raise InputError(
            field, kinds, f"quantises a cache that engine.kv_cache_dtype={kv_dtype} has quantised already",
            "leave engine.kv_cache_dtype at auto",
        )  # fmt: skip
    for place, policy in enumerate(chosen):
        size = getattr(policy, "block_size_tokens", engine.block_tokens)
        if engine.layout == "paged" and size != engine.block_tokens:
            raise InputError(
                f"{field}[{place}].block_size_tokens", size, f"must be engine.block_size_tokens={engine.block_tokens}",
                f"set it to {engine.block_tokens}",
            )  # fmt: skip
    shape = CacheShape(
        model.num_layers, model.q_heads_per_gpu(tp), model.kv_heads_per_gpu(tp), model.head_dim,
        kv_bytes_per_element(kv_dtype), engine.block_tokens,
    )  # fmt: skip
    return CachePlan(composition, shape, kv_dtype, engine.layout)


def build_ledger(deployment: Deployment, plan: CachePlan) -> Ledger:
    """Where one GPU's memory goes; raises DoesNotFitError."""
    return Ledger(
        deployment.gpu, deployment.model, deployment.tp, deployment.weight_dtype, deployment.engine, plan,
        deployment.max_tokens, getattr(deployment.engine, "num_gpu_blocks", None),
    )  # fmt: skip


def simulate(scenario: Scenario, progress: SingleProgress | None = None) -> Result:
    """Simulates every policy of the scenario on the same requests.

    progress: called with a policy's name and the number of its requests finished so far.
    Raises InputError for what the scenario's parts do not allow, DoesNotFitError where memory is short.
    """
    deployment = deploy(scenario)
    plans = {
        name: build_plan(deployment, policies, f"policies.{name}") for name, policies in scenario.policies.items()
    }
    results = {}
    for name, plan in plans.items():
        tell = None if progress is None else (lambda done, name=name: progress(name, done))
        try:
            results[name] = run_policy(scenario, deployment, name, plan, tell)
        except KvsimError as error:
            if isinstance(error, InputError) or len(plans) == 1:
                raise
            raise type(error)(f"policies.{name}: {error}") from None
    return Result(
        scenario=scenario.model_dump(mode="json"),
        title=scenario.name or f"{deployment.model.name} on {deployment.gpu.name}",
        policies=results,
        versions=versions(),
        seed=scenario.workload.seed,
        slo=dict(scenario.slo),
        warmup_requests=scenario.workload.warmup_requests,
    )


def run_policy(
    scenario: Scenario, deployment: Deployment, name: str, plan: CachePlan, progress: Callable[[int], None] | None = None
) -> PolicyResult:
    """Simulates one policy."""
    engine, model, tp = deployment.engine, deployment.model, deployment.tp
    ledger = build_ledger(deployment, plan)
    source = build_source(scenario.workload, scenario.base_dir)
    notes = [*engine.notes(), *(note for policy in plan.composition.policies for note in policy.notes())]
    pool: BlockPool = BlockPool(ledger.pool_units)
    if source.hash_block_tokens and getattr(engine, "enable_prefix_caching", False):
        if source.hash_block_tokens % engine.block_tokens:
            raise InputError(
                "engine.block_size_tokens", engine.block_tokens,
                f"must divide the trace's hash blocks of {source.hash_block_tokens} tokens for prefix caching",
                "choose another block size or set enable_prefix_caching: false",
            )  # fmt: skip
        if plan.composition.blocks_shareable:
            pool = PrefixPool(ledger.pool_units, engine.block_tokens, source.hash_block_tokens)
        else:
            notes.append(
                f"prefix caching is off: {plan.composition.describe()} compresses blocks, which cannot be shared afterwards"
            )

    def costs(hbm_share: float = 1.0) -> StepCosts:
        make = OffloadCosts if engine.offloads else StepCosts
        return make(
            model, tp, deployment.weight_dtype, engine, plan, deployment.profile, ledger.pool_slots, hbm_share
        )

    contended = costs(1 - engine.side_stream_hbm_frac) if engine.policy_stream == "side" else None
    env = simpy.Environment(initial_time=0)
    replica = Replica(
        env, source, engine.scheduler(pool, plan, model), costs(), contended,
        RequestCheck(deployment, plan, ledger.pool_units), progress,
    )  # fmt: skip
    env.process(replica.serve())
    try:
        with _without_cycle_collection():
            env.run()
    except OverflowError as error:  # of picoseconds in 64 bits
        raise _too_long(scenario.workload.describe()) from error
    log = replica.log
    if not replica.num_finished:
        raise InputError("workload", scenario.workload.describe(), "must hold at least one request")
    if scenario.workload.warmup_requests >= replica.num_finished:
        rule = f"must be below the number of requests, {replica.num_finished}"
        raise InputError(
            "workload.warmup_requests", scenario.workload.warmup_requests, rule, f"try {replica.num_finished // 10}"
        )
    notes += source.notes()
    if log.side_ps:
        notes.append(
            f"compressions kept a side stream busy for {log.side_ps / PS_PER_S:.3g} s beside the steps "
            f"({engine.side_stream_hbm_frac:.0%} of HBM bandwidth while it ran)"
        )
    summary = summarize(log, warmup_requests=scenario.workload.warmup_requests, slo=scenario.slo)
    return PolicyResult(
        name=name, description=plan.composition.describe(), summary=summary, log=log, ledger=tuple(ledger.lines),
        pool_units=ledger.pool_units, unit_bytes=plan.unit_bytes,
        kv_bytes_per_sequence=_kv_bytes_per_sequence(log, plan.unit_bytes),
        basis=_basis(replica), notes=tuple(dict.fromkeys(notes)), pool_gpu_frac=engine.cache_fracs[0],
        quality=nearest(plan.composition.policies, model, float(log.request_columns()["prompt_tokens"].mean())),
    )  # fmt: skip


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

    def __call__(self, request: Request) -> None:
        tokens = request.prompt_tokens + request.output_tokens
        if request.arrival_ps > MAX_TIME_S * PS_PER_S:
            raise _too_long(f"request {request.index} at {request.arrival_ps / PS_PER_S:,.0f} s")
        if tokens <= self.harmless_tokens:
            return
        if tokens > self.max_tokens:
            raise InputError(
                f"workload: request {request.index}: prompt + output tokens", tokens,
                f"must be at most {self.max_tokens}, the context of {self.model} or engine.max_model_len",
                "shorten it, raise max_model_len, or choose a model with a longer context",
            )  # fmt: skip
        field = f"workload: request {request.index}: prompt tokens"
        check_fits(self.plan, self.pool_units, field, request.prompt_tokens, request.output_tokens)


def _too_long(what: str) -> InputError:
    rule = f"must be served within {MAX_TIME_S:,} s of simulated time (104 days)"
    return InputError("workload", what, rule, "raise the rate or simulate fewer requests")


def _kv_bytes_per_sequence(log: RunLog, unit_bytes: int) -> float:
    """Mean over time, while anything decodes, of what the pool holds by sequences in decode."""
    rows = log.step_columns()
    steps = rows["num_steps"]
    duration = steps * rows["first_step_ps"] + rows["step_growth_ps"] * (steps * (steps - 1) // 2)
    pure = (rows["num_decodes"] > 0) & (rows["prefill_tokens"] == 0)
    if not pure.any():
        return 0.0
    weight = duration[pure].astype(float)
    return float((weight * rows["held_units"][pure]).sum() / (weight * rows["num_decodes"][pure]).sum() * unit_bytes)


def _basis(replica: Replica) -> tuple[Basis, ...]:
    """What each Op kind's time rests on, the largest share first."""
    times, answers = replica.costs.op_parts(), dict(replica.costs.basis)
    if replica.contended is not None:
        answers = {**replica.contended.basis, **answers}
        for part, value in replica.contended.op_parts().items():
            times[part] = times.get(part, 0) + value
    total = sum(times.values()) or 1
    rows = []
    for part, value in sorted(times.items(), key=lambda item: (-item[1], item[0])):
        label, source = part
        bias = answers[part].log_bias
        rows.append(Basis(label, value / PS_PER_S, value / total, source, exp(bias[1]), exp(bias[2])))
    return tuple(rows)


def _resolve(name: str, base_dir: Path) -> str:
    """A path relative to the scenario's folder where there is one, else the name as given."""
    path = base_dir / name
    return str(path) if ("/" in name or name.endswith((".yaml", ".yml", ".json"))) and path.exists() else name


def versions() -> dict[str, str]:
    """Of what a simulation's numbers depend on."""
    packages = ("kvsim", "numpy", "simpy", "pydantic")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


__all__ = ["Deployment", "Summary", "build_ledger", "build_plan", "deploy", "run_policy", "simulate"]
