"""`simulate`: a scenario in, a result for each of its policies out."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import simpy

from kvsim.dtypes import ACTIVATION_DTYPES, activation_dtype, check_weight_dtype, kv_bytes_per_element
from kvsim.engines.base import Engine
from kvsim.errors import DoesNotFitError, InputError, KvsimError
from kvsim.fleet_run import PartsOf, run_fleet
from kvsim.hardware import Gpu, load_gpu
from kvsim.memory import Ledger
from kvsim.metrics import Summary, check_slo, summarize
from kvsim.model import Model, load_model
from kvsim.policies.base import CacheShape, Policy
from kvsim.policies.compose import CachePlan, Composition
from kvsim.profile import Profile
from kvsim.profiles import load_profile
from kvsim.quality import nearest
from kvsim.requests import FrontEnd, RequestSource
from kvsim.result import PolicyResult, Result
from kvsim.routers import UNWEIGHTED
from kvsim.scenario import Scenario
from kvsim.serving import Parts, RequestCheck, basis, check_number, kv_bytes_per_sequence, run, side_note
from kvsim.simulation import Replica
from kvsim.units import ps
from kvsim.workload import build_source

SingleProgress = Callable[[str, int], None]


class Deployment(NamedTuple):
    """A scenario's hardware and model, loaded and checked; of a fleet, those of its first group."""

    gpu: Gpu
    model: Model
    tp: int
    weight_dtype: str
    engine: Engine
    profile: Profile
    max_tokens: int  # longest prompt + output
    groups: tuple[Group, ...] = ()
    """All groups of replicas; empty where there is one replica as the scenario has it."""


class Group(NamedTuple):
    """Replicas that are alike. field: of the scenario, "" where its own fields describe them. policies: None: those compared."""

    name: str
    field: str
    replicas: int
    weight: float
    deployment: Deployment
    policies: tuple[Policy, ...] | None


def deploy(scenario: Scenario) -> Deployment:
    """Loads what a scenario names; raises InputError where the parts do not go together."""
    if scenario.fleet:
        groups = tuple(fleet_groups(scenario))
        _check_front_ends(groups)
        return groups[0].deployment._replace(groups=groups)
    deployment = _deploy_alike(scenario)
    if scenario.replicas > 1:
        group = Group("", "", scenario.replicas, 1.0, deployment, None)
        deployment = deployment._replace(groups=(group,))
    return deployment


def fleet_groups(scenario: Scenario) -> Iterator[Group]:
    """The groups of a mixed fleet, each deployed as a scenario of its own."""
    if scenario.replicas != 1:
        raise InputError(
            "replicas", scenario.replicas, "must not be given beside fleet, whose groups have replicas of their own",
            "leave one of them out",
        )  # fmt: skip
    for place, block in enumerate(scenario.fleet):
        field = f"fleet[{place}]"
        if block.weight != 1 and scenario.router.kind in UNWEIGHTED:
            raise InputError(
                f"{field}.weight", block.weight, f"has no meaning under router.kind={scenario.router.kind}",
                "leave it out or choose another router",
            )  # fmt: skip
        own = {name: getattr(block, name) for name in _GROUP_FIELDS if getattr(block, name) is not None}
        try:
            deployment = _deploy_alike(scenario.model_copy(update=own))
        except InputError as error:
            raise _of_group(error, field, own) from None
        policies = None if block.policy is None else tuple(block.policy)
        name = block.name or deployment.gpu.name + (f" tp {deployment.tp}" if deployment.tp > 1 else "")
        yield Group(name, field, block.replicas, block.weight, deployment, policies)


def _check_front_ends(groups: tuple[Group, ...]) -> None:
    """One front end stands before the router, and so before all replicas."""
    delay_s = groups[0].deployment.engine.front_end_delay_s
    for group in groups:
        if group.deployment.engine.front_end_delay_s != delay_s:
            raise InputError(
                f"{group.field}.engine.front_end_s", group.deployment.engine.front_end_delay_s,
                f"must be {delay_s:g} as in the first group: one front end stands before the fleet's router",
                "give all groups the same",
            )  # fmt: skip


_GROUP_FIELDS = ("gpu", "tensor_parallel", "weight_dtype", "profile", "engine")


def _of_group(error: InputError, field: str, own: Iterable[str]) -> InputError:
    """The same error of a group's own field."""
    where = field + "." if error.field.split(".")[0] in own else f"{field}: "
    return InputError(where + error.field, error.value, error.rule, error.fix)


def _deploy_alike(scenario: Scenario) -> Deployment:
    """One replica as the scenario's own fields have it."""
    base = scenario.base_dir
    gpu, model = load_gpu(resolve_path(scenario.gpu, base)), load_model(resolve_path(scenario.model, base))
    tp = scenario.tensor_parallel
    engine = scenario.engine.for_gpu(gpu, tp)
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
        kv_bytes_per_element(kv_dtype), engine.block_tokens, engine.rotation_passes if model.position == "rope" else 0,
    )  # fmt: skip
    return CachePlan(composition, shape, kv_dtype, engine.attention_layout(composition))


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
    for name, plan in plans.items():
        group_plans(scenario, deployment, name, plan)  # contradictions show before anything is simulated
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
        title=scenario.name or f"{deployment.model.name} on {_hardware(deployment)}",
        policies=results,
        versions=versions(),
        seed=scenario.workload.seed,
        slo=dict(scenario.slo),
        warmup_requests=scenario.workload.warmup_requests,
    )


def run_policy(
    scenario: Scenario, deployment: Deployment, name: str, plan: CachePlan, progress: Callable[[int], None] | None = None,
    *, source: RequestSource | None = None, parts: Parts | None = None,
) -> PolicyResult:  # fmt: skip
    """Simulates one policy, on all replicas that the deployment has.

    source: requests in place of those of scenario.workload. parts: what a lone replica is made of, where an earlier run of the same
    deployment and plan has worked out its prices.
    """
    source = build_source(scenario.workload, scenario.base_dir) if source is None else source
    delay_s = deployment.engine.front_end_delay_s  # of a fleet too: it stands before the router
    source = FrontEnd(source, ps(delay_s)) if delay_s else source
    groups = list(zip(deployment.groups, group_plans(scenario, deployment, name, plan), strict=True))
    if sum(group.replicas for group, _ in groups) > 1:
        parts_of = [PartsOf(group.name, group.replicas, group.weight, _parts(group, own, source)) for group, own in groups]
        return run_fleet(scenario, name, source, parts_of, progress)
    for group, own in groups:
        deployment, plan = group.deployment, own
    env = simpy.Environment(initial_time=0)
    if parts is None:
        parts = Parts(deployment, plan, build_ledger(deployment, plan), source)
        costs, contended = parts.costs, parts.contended
    else:
        costs, contended = parts.costs.twin(), parts.contended and parts.contended.twin()
    replica = Replica(env, source, parts.scheduler(), costs, contended, parts.check, progress)
    env.process(replica.serve())
    run(env, scenario)
    log = replica.log
    check_number(scenario, replica.num_finished)
    notes = [*parts.notes, *source.notes(), *side_note(log.side_ps, deployment.engine)]
    summary = summarize(log, warmup_requests=scenario.workload.warmup_requests, slo=scenario.slo)
    return PolicyResult(
        name=name, description=plan.composition.describe(), summary=summary, log=log, ledger=tuple(parts.ledger.lines),
        pool_units=parts.ledger.pool_units, unit_bytes=plan.unit_bytes,
        kv_bytes_per_sequence=kv_bytes_per_sequence(log, plan.unit_bytes),
        basis=basis([replica]), notes=tuple(dict.fromkeys(notes)), pool_gpu_frac=deployment.engine.cache_fracs[0],
        quality=nearest(
            plan.composition.policies, deployment.model, float(log.request_columns()["prompt_tokens"].mean())
        ),
    )  # fmt: skip


def _parts(group: Group, plan: CachePlan, source: RequestSource) -> Parts:
    try:
        return Parts(group.deployment, plan, build_ledger(group.deployment, plan), source)
    except DoesNotFitError as error:
        raise DoesNotFitError(f"{group.field}: {error}" if group.field else str(error)) from None
    except InputError as error:
        raise _of_group(error, group.field, ()) if group.field else error from None


def group_plans(scenario: Scenario, deployment: Deployment, name: str, plan: CachePlan) -> list[CachePlan]:
    """The cache of each group of the deployment under a policy; `plan` is that of the first one's hardware."""
    plans = []
    for group in deployment.groups:
        policies = scenario.policies[name] if group.policies is None else group.policies
        if not group.field:
            plans.append(plan)
            continue
        field = f"policies.{name} on {group.field}" if group.policies is None else f"{group.field}.policy"
        plans.append(build_plan(group.deployment, policies, field))
    return plans


def _hardware(deployment: Deployment) -> str:
    """For titles: the GPU, or how many replicas on which."""
    groups = deployment.groups
    if sum(group.replicas for group in groups) <= 1:
        return deployment.gpu.name
    return " + ".join(f"{group.replicas} x {group.deployment.gpu.name}" for group in groups)


def resolve_path(name: str, base_dir: Path) -> str:
    """A path relative to the scenario's folder where there is one, else the name as given."""
    path = base_dir / name
    return str(path) if ("/" in name or name.endswith((".yaml", ".yml", ".json"))) and path.exists() else name


def versions() -> dict[str, str]:
    """Of what a simulation's numbers depend on."""
    packages = ("kvsim", "numpy", "simpy", "pydantic")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


__all__ = [
    "Deployment", "RequestCheck", "Summary", "build_ledger", "build_plan", "deploy", "run_policy", "simulate", "versions",
]  # fmt: skip
