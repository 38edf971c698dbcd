"""One case simulated: its numbers in flat columns, or why there are none."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from kvsim.api import build_plan, deploy, run_policy
from kvsim.errors import DoesNotFitError, KvsimError
from kvsim.metrics import SLO_METRICS, SLO_STATISTICS
from kvsim.result import PolicyResult
from kvsim.scenario import parse_scenario
from kvsim.sweeping.cases import Work

OK, DOES_NOT_FIT, INVALID, BUG, CRASHED, PENDING = "ok", "does_not_fit", "invalid", "bug", "crashed", "pending"
STATUSES = (OK, DOES_NOT_FIT, INVALID, BUG, CRASHED, PENDING)
"""invalid: the fields contradict each other. bug: kvsim raised what it should not. crashed: the worker process died. pending: not
simulated yet."""
FAULTS = (BUG, CRASHED)
"""Not the user's doing; `retry` simulates these again."""

TEXTS = ("id", "status", "error", "composition")
FLAGS = ("meets_slo", "overloaded")
COUNTS = (
    "num_requests", "num_preemptions", "max_decode_batch_sequences", "max_running_requests", "max_waiting_requests", "kv_pool_bytes",
    "peak_kv_bytes", "peak_memory_bytes",
)  # fmt: skip
LATENCIES = tuple(f"{metric}_{statistic}_s" for metric in SLO_METRICS for statistic in SLO_STATISTICS)
RATES = (
    "duration_s", "output_tokens_per_s", "total_tokens_per_s", "requests_per_s", "goodput_frac", "goodput_requests_per_s",
    "mean_decode_batch_sequences", "mean_running_requests", "mean_waiting_requests", "utilisation_frac", "mean_kv_bytes",
    "peak_kv_frac", "kv_bytes_per_sequence", "measured_frac",
)  # fmt: skip
NUMBERS = (*LATENCIES, *RATES)
COLUMNS = (*TEXTS, *FLAGS, *COUNTS, *NUMBERS)
"""Of one case, in the journal. Null where a number is not defined (no second token, no SLO) or the case failed."""

GAINS: Mapping[str, tuple[str, bool]] = {
    "gain_output_tokens_x": ("output_tokens_per_s", True),
    "gain_ttft_x": ("ttft_mean_s", False),
    "gain_tpot_x": ("tpot_mean_s", False),
    "gain_e2e_x": ("e2e_mean_s", False),
    "gain_kv_per_sequence_x": ("kv_bytes_per_sequence", False),
}
"""Factor over the baseline: the column that is compared, and whether more of it is better. As `kvsim.metrics.gains`."""
_OUTSIDE_USE = ("GPU memory", "engine's share", "KV pool")
"""Lines of the ledger that are limits, or counted by what is held of them."""


def simulate_case(work: Work) -> dict[str, Any]:
    """The row of one case. Never raises: what goes wrong is the row's status and error, in one line."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row["id"] = work.id
    try:
        row |= _metrics(_simulate(work))
        row["status"] = OK
    except DoesNotFitError as error:
        row["status"], row["error"] = DOES_NOT_FIT, _line(error)
    except KvsimError as error:
        row["status"], row["error"] = INVALID, _line(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        row["status"], row["error"] = BUG, f"{type(error).__name__}: {_line(error)} ({Path(place.filename).name}:{place.lineno})"
    return row


def crashed(work: Work, how: str) -> dict[str, Any]:
    """The row of a case whose worker process died."""
    return dict.fromkeys(COLUMNS) | {"id": work.id, "status": CRASHED, "error": how}


def add_gains(row: dict[str, Any], baseline: Mapping[str, Any] | None) -> None:
    """Factors over a baseline's row; null without one, or where either failed."""
    for gain, (column, more_is_better) in GAINS.items():
        ours, theirs = row.get(column), baseline.get(column) if baseline else None
        if ours is None or theirs is None:
            row[gain] = None
            continue
        above, below = (ours, theirs) if more_is_better else (theirs, ours)
        row[gain] = above / below if below > 0 else None


def _simulate(work: Work) -> PolicyResult:
    scenario = parse_scenario(work.scenario, Path(work.base_dir))
    deployment = deploy(scenario)
    ((name, policies),) = scenario.policies.items()
    return run_policy(scenario, deployment, name, build_plan(deployment, policies, f"policies.{name}"))


def _metrics(result: PolicyResult) -> dict[str, Any]:
    summary = result.summary
    peak_kv_bytes = summary.peak_held_units * result.unit_bytes
    fixed_bytes = sum(line.num_bytes for line in result.ledger if line.name not in _OUTSIDE_USE)
    growth = summary.queue_growth
    derived = {
        "composition": result.description,
        "meets_slo": all(check.met for check in summary.slo.values()) if summary.slo else None,
        "overloaded": None if growth is None else growth.overloaded,
        "kv_pool_bytes": result.pool_units * result.unit_bytes,
        "peak_kv_bytes": peak_kv_bytes,
        "peak_memory_bytes": fixed_bytes + peak_kv_bytes,
        "mean_kv_bytes": summary.mean_held_units * result.unit_bytes,
        "peak_kv_frac": summary.peak_held_units / result.pool_units,
        "kv_bytes_per_sequence": result.kv_bytes_per_sequence,
        "measured_frac": sum(basis.share_frac for basis in result.basis if basis.source.startswith("measured")),
    }
    latencies = {
        f"{metric}_{statistic}_s": getattr(getattr(summary, metric), f"{statistic}_s")
        for metric in SLO_METRICS for statistic in SLO_STATISTICS
    }  # fmt: skip
    plain = {name: getattr(summary, name) for name in (*COUNTS, *RATES) if name not in derived}
    return {name: _plain(value) for name, value in {**derived, **latencies, **plain}.items()}


def _plain(value: Any) -> Any:
    """Python's own numbers, and null for what is not finite."""
    if isinstance(value, bool | str) or value is None:
        return value
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not isfinite(value) else value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
