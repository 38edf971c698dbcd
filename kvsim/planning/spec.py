"""The `plan:` block of a scenario: what load, on which hardware at what price, with which engine settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from kvsim.errors import InputError
from kvsim.frozen import Frozen
from kvsim.metrics import check_slo
from kvsim.scenario import Scenario, parse_as, read_scenario
from kvsim.workload_fields import Number

MAX_RATE_PER_S = 1e9
"""As of arrivals."""
TensorParallel = Annotated[int, Field(ge=1, le=8, strict=True)]


class GpuOffer(Frozen):
    """What a GPU costs; the user's own figure, none is built in."""

    price_per_gpu_hour: Number | None = Field(None, ge=0, le=1e6, description="price of one GPU for an hour, in plan.currency")


class PlanSpec(Frozen):
    """What `kvsim plan` is asked."""

    target_rate_per_s: Number = Field(gt=0, le=MAX_RATE_PER_S, description="load of the whole deployment, requests per second")
    gpus: dict[str, GpuOffer] = Field(
        {}, description="GPUs to choose from, by name or path, each with price_per_gpu_hour or {}; default: the scenario's"
    )
    currency: str | None = Field(None, min_length=1, description="of the prices, such as USD")
    tensor_parallel: list[TensorParallel] = Field([], description="GPUs of a replica to choose from; default: the scenario's")
    engines: list[dict[str, Any]] = Field(
        [{}], description="engine settings to choose from, each laid over the scenario's engine block"
    )
    min_goodput_frac: Number | None = Field(None, gt=0, lt=1, description="least share of requests within every limit of the slo")
    min_quality_frac: Number | None = Field(
        None, gt=0, le=1, description="least published quality of a policy over that of the full cache"
    )
    tolerance_frac: Number = Field(0.01, ge=1e-3, le=0.2, description="the search ends where its bracket is as narrow as this")
    max_requests: Annotated[int, Field(ge=1000, le=10_000_000, strict=True)] = Field(
        16_000, description="requests simulated at one rate at most, where fewer leave the verdict open"
    )
    robust_options: Annotated[int, Field(ge=0, strict=True)] = Field(
        1, description="best options that are simulated again under drawn errors"
    )
    sensitivity_options: Annotated[int, Field(ge=0, strict=True)] = Field(
        1, description="best options whose sensitivity to each uncertain input is worked out"
    )

    @field_validator("tensor_parallel", "engines")
    @classmethod
    def _once_each(cls, value: list[Any]) -> list[Any]:
        for place, item in enumerate(value):
            if item in value[:place]:
                raise ValueError(f"must name each choice once, and {item} is there twice; drop one of them")
        return value

    @field_validator("engines")
    @classmethod
    def _some_engine(cls, value: list[Any]) -> list[Any]:
        if not value:
            raise ValueError("must have at least one choice; try [{}], the engine block as it is")
        return value

    @model_validator(mode="after")
    def _prices_are_complete(self) -> PlanSpec:
        priced = [name for name, offer in self.gpus.items() if offer.price_per_gpu_hour is not None]
        unpriced = [name for name in self.gpus if name not in priced]
        if priced and unpriced:
            raise ValueError(
                f"must give price_per_gpu_hour for every GPU or for none, and {unpriced[0]} has none; "
                f"add gpus.{unpriced[0]}.price_per_gpu_hour"
            )
        if priced and self.currency is None:
            raise ValueError("must name the currency of its prices; try currency: USD")
        if self.currency is not None and not priced:
            raise ValueError(f"must have prices to go with currency={self.currency}; add gpus: {{NAME: {{price_per_gpu_hour: ...}}}}")
        return self


class PlanScenario(Scenario):
    """A scenario with a plan. The plan's choices take the place of `gpu`, `tensor_parallel` and settings of `engine`."""

    plan: PlanSpec = Field(description="target load and what to choose from")


def load_plan(path: str | Path, overrides: Mapping[str, Any] | None = None) -> PlanScenario:
    """Reads and validates a plan file. Raises InputError."""
    return parse_plan(read_scenario(path, overrides), Path(path).parent)


def parse_plan(data: Mapping[str, Any], base_dir: Path = Path()) -> PlanScenario:
    """Validates a plan given as plain data: `gpu` may be left out where plan.gpus has some. Raises InputError."""
    plan = data.get("plan")
    offers = plan.get("gpus") if isinstance(plan, Mapping) else None
    if "gpu" not in data and isinstance(offers, Mapping) and offers and isinstance(next(iter(offers)), str):
        data = {"gpu": next(iter(offers)), **data}
    scenario = parse_as(PlanScenario, data, base_dir)
    if not scenario.slo:
        raise InputError("slo", None, "is missing, and a plan needs limits to meet", "try slo: {ttft_p99_s: 2.0, tpot_p99_s: 0.1}")
    check_slo(scenario.slo)
    if scenario.replicas != 1 or scenario.fleet:
        field, value = ("fleet", None) if scenario.fleet else ("replicas", scenario.replicas)
        raise InputError(field, value, "must not be given, because a plan finds the number of replicas", "leave it out")
    if scenario.plan.min_goodput_frac is not None and all(key.startswith("itl_") for key in scenario.slo):
        raise InputError(
            "plan.min_goodput_frac", scenario.plan.min_goodput_frac, "needs a limit that one request can meet",
            "add slo.ttft_p99_s, tpot_p99_s or e2e_p99_s",
        )  # fmt: skip
    return scenario
