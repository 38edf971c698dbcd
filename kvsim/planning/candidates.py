"""The candidates of a plan: every GPU x tensor parallelism x engine settings x policy, or why one cannot be deployed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvsim.api import Deployment, build_ledger, build_plan, deploy, resolve_path
from kvsim.engines import Engine
from kvsim.errors import InputError, KvsimError
from kvsim.hardware import Gpu, load_gpu
from kvsim.memory import Ledger
from kvsim.model import load_model
from kvsim.planning.result import PublishedQuality
from kvsim.planning.spec import PlanScenario
from kvsim.policies.compose import CachePlan, Composition
from kvsim.quality import nearest
from kvsim.scenario import Scenario, parse_scenario
from kvsim.schema import kind_of

_BUDGETS = ("budget_tokens", "window_tokens")


@dataclass(frozen=True)
class Candidate:
    """One deployment to be judged. scenario: with this candidate's GPU, engine and its one policy."""

    name: str
    scenario: Scenario
    gpu: Gpu
    policy: str
    policy_description: str
    price_per_gpu_hour: float | None
    quality: PublishedQuality | None

    @property
    def tensor_parallel(self) -> int:
        return self.scenario.tensor_parallel


@dataclass(frozen=True)
class Resources:
    """What a candidate is made of."""

    deployment: Deployment
    plan: CachePlan
    ledger: Ledger


def resources(candidate: Candidate) -> Resources:
    """Loads a candidate. Raises KvsimError where it cannot be deployed: the reason is the message."""
    deployment = deploy(candidate.scenario)
    plan = build_plan(deployment, candidate.scenario.policies[candidate.policy], f"policies.{candidate.policy}")
    return Resources(deployment, plan, build_ledger(deployment, plan))


def candidates(scenario: PlanScenario, mean_prompt_tokens: float) -> list[Candidate]:
    """In the plan's order. Raises InputError for what is wrong whatever the candidate."""
    spec, base_dir = scenario.plan, scenario.base_dir
    gpus = {}
    for name in spec.gpus or [scenario.gpu]:
        try:
            gpus[name] = load_gpu(resolve_path(name, base_dir))
        except InputError as error:
            field = f"plan.gpus.{name}" if spec.gpus else error.field
            raise InputError(field, None if spec.gpus else error.value, error.rule, error.fix) from None
    model = load_model(resolve_path(scenario.model, base_dir))
    engines = _engines(scenario)
    for name, policies in scenario.policies.items():
        Composition(tuple(policies), f"policies.{name}")
        for engine in engines.values():
            _check_budgets(name, policies, engine.max_model_len or model.max_context_tokens)
    found = []
    for gpu_name, gpu in gpus.items():
        offer = spec.gpus.get(gpu_name)
        for tp in spec.tensor_parallel or [scenario.tensor_parallel]:
            for engine_name, engine in engines.items():
                for name, policies in scenario.policies.items():
                    update = {"gpu": gpu_name, "tensor_parallel": tp, "engine": engine, "policies": {name: policies}}
                    plain = {field: getattr(scenario, field) for field in Scenario.model_fields}
                    found.append(Candidate(
                        name=f"{tp} x {gpu.name}, {name}" + (f", {engine_name}" if engine_name else ""),
                        scenario=Scenario.model_construct(**{**plain, **update}), gpu=gpu, policy=name,
                        policy_description=Composition(tuple(policies), f"policies.{name}").describe(),
                        price_per_gpu_hour=None if offer is None else offer.price_per_gpu_hour,
                        quality=nearest(tuple(policies), model, mean_prompt_tokens),
                    ))  # fmt: skip
    return found


def _engines(scenario: PlanScenario) -> dict[str, Engine]:
    """Engine blocks by what tells them apart. A choice of another kind stands on its own; else it is laid over the scenario's."""
    base = scenario.engine.model_dump(exclude_unset=True) | {"kind": kind_of(type(scenario.engine))}
    found: dict[str, Engine] = {}
    for place, choice in enumerate(scenario.plan.engines):
        block = dict(choice) if choice.get("kind", base["kind"]) != base["kind"] else {**base, **choice}
        data = scenario.model_dump(mode="json", exclude={"plan", "engine"}, exclude_unset=True) | {"engine": block}
        try:
            engine = parse_scenario(data, scenario.base_dir).engine
        except InputError as error:
            field = f"plan.engines[{place}]{error.field.removeprefix('engine')}"
            raise InputError(field, error.value, error.rule, error.fix) from None
        name = ", ".join(f"{field}={_text(value)}" for field, value in choice.items())
        found[name if len(scenario.plan.engines) > 1 else ""] = engine
    return found


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_budgets(name: str, policies: Any, max_tokens: int) -> None:
    """Raises InputError for a budget that no sequence can exceed: the policy would do nothing, which nobody means."""
    for place, policy in enumerate(policies):
        for field in _BUDGETS:
            budget = getattr(policy, field, None)
            if budget is not None and budget >= max_tokens:
                raise InputError(
                    f"policies.{name}[{place}].{field}", budget,
                    f"must be below the context of {max_tokens} tokens, or it keeps everything", "lower it, or use full",
                )  # fmt: skip


def why_unfit(candidate: Candidate, min_quality_frac: float | None) -> str | None:
    """Why a candidate is out before anything is simulated; None where it is not."""
    quality = candidate.quality
    if min_quality_frac is not None and candidate.policy_description != "full":
        if quality is None:
            return f"no quality was published for a policy like {candidate.policy_description}"
        if quality.retained_frac < min_quality_frac:
            return f"published quality {quality.retained_frac:.3f} of the full cache's is below {min_quality_frac:g} ({quality.source})"
    try:
        resources(candidate)
    except KvsimError as error:
        return str(error)
    return None


def engine_block(candidate: Candidate) -> Mapping[str, Any]:
    """With defaults."""
    block: Mapping[str, Any] = candidate.scenario.engine.model_dump(mode="json")
    return block
