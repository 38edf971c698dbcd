"""What `simulate` returns: one `PolicyResult` for each policy of the scenario, and the means to compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

    from kvsim.metrics import Summary
    from kvsim.planning.result import PublishedQuality
    from kvsim.recording import RunLog


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One line of the GPU memory ledger, in bytes per GPU; `note` says where the number comes from."""

    name: str
    num_bytes: int
    note: str


@dataclass(frozen=True, slots=True)
class Basis:
    """What the time of one Op kind rests on.

    share_frac: its share of simulated time. source: "measured", "fitted", "datasheet" or "assumed", then the reference.
    bias_low, bias_high: the 16 % and 84 % quantiles of measured/predicted that are believed to hold for it.
    """

    op: str
    seconds: float
    share_frac: float
    source: str
    bias_low: float
    bias_high: float


@dataclass(frozen=True, slots=True)
class Band:
    """Quantiles of a metric over draws of the calibration's errors."""

    p2_5: float
    p16: float
    p50: float
    p84: float
    p97_5: float


@dataclass(frozen=True, slots=True)
class Bands:
    """Bands by metric (`kvsim.uncertainty`), gains over the baseline among them."""

    num_draws: int
    by_metric: Mapping[str, Band]


@dataclass(frozen=True, slots=True)
class ReplicaResult:
    """One replica's part in a fleet. Rates and averages are over the fleet's measured window, requests those counted there."""

    group: str
    description: str
    """Of the policies that it runs."""
    log: RunLog
    ledger: tuple[LedgerLine, ...]
    pool_units: int
    unit_bytes: int
    """Of its own units: groups may differ."""
    num_requests: int
    share_frac: float
    """Of the fleet's requests."""
    output_tokens_per_s: float
    """Of the requests that it answered."""
    utilisation_frac: float
    mean_decode_batch_sequences: float
    peak_held_units: int
    num_preemptions: int
    mean_ttft_s: float
    mean_e2e_s: float


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy's simulation. Of a fleet: `log` is its replicas' logs merged, in units of `unit_bytes`; the pool is theirs together,
    of one GPU each; the ledger is the first replica's."""

    name: str
    description: str
    summary: Summary
    log: RunLog
    ledger: tuple[LedgerLine, ...]
    pool_units: int
    unit_bytes: int
    kv_bytes_per_sequence: float
    """Mean KV bytes, per GPU, held by a sequence in decode, over time."""
    basis: tuple[Basis, ...]
    notes: tuple[str, ...] = ()
    """What a reader must know beside the numbers: features turned off and why, physics left out."""
    quality: PublishedQuality | None = None
    """The published figure nearest to the policy, budget and model (`kvsim.quality`); None where there is none."""
    pool_gpu_frac: float = 1.0
    """Share of the cache that lies in GPU memory."""
    replicas: tuple[ReplicaResult, ...] = ()
    """Empty where there is one."""

    @property
    def logs(self) -> tuple[RunLog, ...]:
        """Of each replica."""
        return tuple(replica.log for replica in self.replicas) or (self.log,)

    @property
    def imbalance_x(self) -> float:
        """Busy time of the busiest replica over the mean; 1 is even, and with nothing to compare."""
        busy = [replica.utilisation_frac for replica in self.replicas]
        return max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0


@dataclass(frozen=True, slots=True)
class Result:
    """A scenario's results by policy name, in the scenario's order. `scenario` is the validated input as plain data."""

    scenario: Mapping[str, Any]
    title: str
    policies: Mapping[str, PolicyResult]
    versions: Mapping[str, str]
    seed: int
    slo: Mapping[str, float] = field(default_factory=dict)
    """Limits in seconds by name: ttft_p99_s, tpot_p99_s, e2e_p99_s, ..."""
    warmup_requests: int = 0
    bands: Mapping[str, Bands] = field(default_factory=dict)
    """By policy; empty unless they were asked for."""

    def to_frame(self) -> DataFrame:
        """A row for each policy: `kvsim.frames.summary`. Raises InputError without pandas."""
        from kvsim.frames import summary

        return summary(self)

    @property
    def baseline(self) -> str | None:
        """The policy gains are quoted against: the first whose cache is left whole, else None."""
        return next((name for name, p in self.policies.items() if p.description == "full"), None)
