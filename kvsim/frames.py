"""Results as pandas frames, for notebooks: times in seconds, memory in bytes, one column each, the policy's name beside them.

    >>> import kvsim
    >>> from kvsim import frames
    >>> result = kvsim.simulate(kvsim.load_scenario("scenarios/a100_llama8b.yaml"))
    >>> frames.summary(result)[["ttft_p99_s", "output_tokens_per_s", "gain_tpot_x"]]
    >>> frames.requests(result).groupby("policy").ttft_s.describe()

pandas comes with `pip install 'kvsim[notebook]'`; every function here raises InputError without it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kvsim.errors import InputError
from kvsim.estimators import Distribution
from kvsim.metrics import Summary
from kvsim.reports.compare import gains_over_baseline
from kvsim.reports.files import COUNTS, TIMES, replica_numbers, request_columns
from kvsim.result import PolicyResult, Result
from kvsim.units import PS_PER_S

if TYPE_CHECKING:
    from pandas import DataFrame


def summary(result: Result) -> DataFrame:
    """A row for each policy: latencies as METRIC_STATISTIC_s, throughput, batch, memory, gain_*_x over the baseline, quality."""
    pd = _pandas()
    gains = gains_over_baseline(result)
    rows = {name: _summary_row(policy, gains.get(name, {})) for name, policy in result.policies.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("policy")


def requests(result: Result) -> DataFrame:
    """A row for each policy and request, in order of arrival: the columns of requests.csv. tpot_s is NaN with one token.

    Of a fleet, here and in `steps`, a column `replica` more.
    """
    pd = _pandas()
    parts = []
    for name, policy in result.policies.items():
        columns = request_columns(policy.log, result.warmup_requests)
        data: dict[str, Any] = {"policy": name, "index": columns["index"], "is_warmup": columns["is_warmup"].astype(bool)}
        data |= {f"{time}_s": columns[time] / PS_PER_S for time in TIMES}
        data |= {count: columns[count] for count in COUNTS}
        part = pd.DataFrame(data)
        if policy.replicas:
            part["replica"] = replica_numbers(policy)
        part["tpot_s"] = part["tpot_s"].where(columns["tpot"] >= 0)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def steps(result: Result) -> DataFrame:
    """A row for each policy and run of steps (`recording.STEP_FIELDS`); duration_s is that of the whole run."""
    pd = _pandas()
    parts = []
    logs = ((name, i, log) for name, policy in result.policies.items() for i, log in enumerate(policy.logs))
    for name, replica, log in logs:
        rows = log.step_columns()
        count, first_ps, growth_ps = rows["num_steps"], rows["first_step_ps"], rows["step_growth_ps"]
        times_ps = {"start": rows["start_ps"], "first_step": first_ps, "step_growth": growth_ps}
        times_ps["duration"] = count * first_ps + growth_ps * (count * (count - 1) // 2)
        data: dict[str, Any] = {"policy": name, **{f"{key}_s": value / PS_PER_S for key, value in times_ps.items()}}
        data |= {key: value for key, value in rows.items() if not key.endswith("_ps")}
        if result.policies[name].replicas:
            data["replica"] = replica
        parts.append(pd.DataFrame(data))
    return pd.concat(parts, ignore_index=True)


def ledger(result: Result) -> DataFrame:
    """A row for each policy and line of one GPU's memory."""
    rows = [(name, line.name, line.num_bytes, line.note) for name, policy in result.policies.items() for line in policy.ledger]
    return _pandas().DataFrame(rows, columns=["policy", "line", "num_bytes", "note"])


def ops(result: Result) -> DataFrame:
    """A row for each policy, Op and source of its time: seconds, share_frac, and the band (16 % to 84 %) of real / simulated."""
    rows = [
        (name, row.op, row.seconds, row.share_frac, row.source, row.bias_low, row.bias_high)
        for name, policy in result.policies.items()
        for row in policy.basis
    ]
    heads = ["policy", "op", "seconds", "share_frac", "source", "bias_low", "bias_high"]
    return _pandas().DataFrame(rows, columns=heads)


def _summary_row(policy: PolicyResult, gains: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"description": policy.description}
    for field in fields(Summary):
        value = getattr(policy.summary, field.name)
        if isinstance(value, Distribution):
            row |= {f"{field.name}_{part.name}": getattr(value, part.name) for part in fields(Distribution)}
        elif value is None or isinstance(value, bool | int | float):
            row[field.name] = value
    growth, quality = policy.summary.queue_growth, policy.quality
    return {
        **row,
        "overloaded": None if growth is None else growth.overloaded,
        "slo_met": all(check.met for check in policy.summary.slo.values()) if policy.summary.slo else None,
        "kv_bytes_per_sequence": policy.kv_bytes_per_sequence,
        "pool_bytes": policy.pool_units * policy.unit_bytes,
        **{f"gain_{name}": value for name, value in gains.items()},
        "published_quality_frac": None if quality is None else quality.retained_frac,
    }


def _pandas() -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise InputError("kvsim.frames", None, "needs pandas, which is not installed", "pip install 'kvsim[notebook]'") from error
    return pd
