"""What a plan answers, as plain frozen models: `plan.json` is their JSON, and every report is made from it alone."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Binding = Literal["compute", "hbm_bandwidth", "kv_capacity", "host", "interconnect", "latency"]
"""What stops a higher rate: the resource that is used up at the rate found, or the latency target alone."""


class Frozen(BaseModel):
    """Base of these models: immutable, and only numbers that JSON has. Unlike input, bytes and the like know no upper bound."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Probe(Frozen):
    """One request rate that was simulated, over all of its seeds."""

    rate_per_s: float
    num_requests: int
    num_seeds: int
    meets_slo: bool
    decided: bool = True
    """False where so many requests cannot tell: meets_slo is then their face value, and the search went on around this rate."""
    latency_s: dict[str, float]
    """By SLO key: ttft_p50_s, ttft_p99_s, tpot_p50_s, ..., those of the SLO among them."""
    goodput_frac: float | None
    output_tokens_per_s: float
    mean_batch: float
    mean_in_system: float | None = None
    """Requests arrived and not finished, by Little's law over the counted ones."""
    utilisation_frac: float
    peak_pool_frac: float


class PublishedQuality(Frozen):
    """The published figure nearest to a policy, budget and model."""

    retained_frac: float
    """Score over the score with the full cache."""
    score: float
    full_score: float
    metric: str
    model: str
    task: str
    budget: str
    source: str
    same_model: bool
    same_budget: bool
    note: str = ""


class Sensitivity(Frozen):
    """The rate when one uncertain input is at the low and at the high end of its band, all others as they are."""

    name: str
    low_input: str
    high_input: str
    rate_at_low_per_s: float
    rate_at_high_per_s: float


class LedgerEntry(Frozen):
    name: str
    num_bytes: int = Field(ge=0, le=2**60)
    note: str = ""


class BasisEntry(Frozen):
    """As `kvsim.result.Basis`."""

    op: str
    share_frac: float
    source: str
    bias_low: float
    bias_high: float


class Option(Frozen):
    """One candidate's answer. What cannot be deployed has a `reason` and no rate."""

    name: str
    gpu: str
    tensor_parallel: int
    policy: str
    policy_description: str
    engine: dict[str, Any]
    """The engine block, defaults included."""
    reason: str | None = None
    rate_per_s: float | None = None
    """The highest request rate of one replica found to meet the SLO."""
    failing_rate_per_s: float | None = None
    """The lowest rate found to miss it: the answer lies between the two."""
    robust_rate_per_s: float | None = None
    """The rate that meets the SLO in 95 % of re-simulations under calibration errors and seeds; None: not asked for."""
    binds: Binding | None = None
    replicas: int | None = None
    num_gpus: int | None = None
    headroom_frac: float | None = None
    """1 - target / (replicas x rate)."""
    output_tokens_per_s: float | None = None
    """Of one replica at the rate found."""
    robust_replicas: int | None = None
    """Replicas for the target at the robust rate."""
    share_met_frac: float | None = None
    """Share of those re-simulations that meet the SLO at `rate_per_s`."""
    capacity_per_s: float | None = None
    """Throughput of one replica with a queue always there: no higher rate can be borne for long."""
    cost_per_hour: float | None = None
    cost_per_million_output_tokens: float | None = None
    watts: float | None = None
    """Board power of all GPUs: an upper bound."""
    kwh_per_million_output_tokens: float | None = None
    gpu_hours_per_million_output_tokens: float | None = None
    quality: PublishedQuality | None = None
    probes: tuple[Probe, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()
    op_share_frac: dict[str, float] = Field(default_factory=dict)
    resource_share_frac: dict[str, float] = Field(default_factory=dict)
    """Share of device time that waits for compute, hbm_bandwidth, interconnect or host."""
    basis: tuple[BasisEntry, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    flags: tuple[str, ...] = ()
    """Command line of the engine, empty where none is known."""
    notes: tuple[str, ...] = ()


class PlanResult(Frozen):
    """Options in order of rank: those that can be deployed by cost (or GPUs, where no price is given), then the others."""

    schema_version: int = 1
    title: str
    summary: tuple[str, ...]
    """The answer in words, a sentence each."""
    scenario: dict[str, Any]
    target_rate_per_s: float
    slo: dict[str, float]
    min_goodput_frac: float | None = None
    min_quality_frac: float | None = None
    currency: str | None = None
    options: tuple[Option, ...]
    num_draws: int = 0
    seeds: tuple[int, ...]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
