"""A results folder read back: what `kvsim run --out` and `kvsim plan --out` wrote, as the objects they wrote it from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from kvsim.errors import InputError
from kvsim.metrics import SLO_KEYS, Summary
from kvsim.planning.result import PlanResult, PublishedQuality
from kvsim.recording import RunLog
from kvsim.reports.names import PLAN_FILE, REQUEST_FILES, RUN_FILE, TIMELINE_FILE
from kvsim.reports.requests_file import read_requests
from kvsim.reports.timeline_file import Bins, bins_of, read_timeline
from kvsim.result import Bands, Basis, LedgerLine, PolicyResult, ReplicaResult, Result

SCHEMA_VERSION = 1
"""Of summary.json; plan.json has that of PlanResult."""
NAN = float("nan")


@dataclass(frozen=True)
class SavedRun:
    """A run as its folder holds it. The logs of `result` hold requests alone, and none where `has_requests` is false."""

    result: Result
    has_requests: bool
    bins: Mapping[str, Bins] | None
    """Over time, by policy; None where the folder has no timeline.csv."""


def saved_run(result: Result, summary_json: str) -> SavedRun:
    """What `read_results` would read from the folder that `result` is written to; summary_json: its summary."""
    logs = {name: RunLog(requests=policy.log.requests) for name, policy in result.policies.items()}
    bins = {name: bins_of(policy) for name, policy in result.policies.items()}
    return SavedRun(_result(json.loads(summary_json), logs), True, bins)


def read_results(folder: str | os.PathLike[str]) -> SavedRun | PlanResult:
    """Raises InputError for a folder without results, and for files that are broken, newer or of another run."""
    place = Path(folder)
    if not place.is_dir():
        rule = "is a file, not a folder of results" if place.exists() else "does not exist"
        raise InputError("DIR", os.fspath(folder), rule, "give a folder that `kvsim run --out` or `kvsim plan --out` wrote")
    plan, run = ((place / name).exists() for name in (PLAN_FILE, RUN_FILE))
    if plan and run:
        raise InputError(
            "DIR", os.fspath(folder), f"holds a plan and a run ({PLAN_FILE}, {RUN_FILE})", "move one to a folder of its own"
        )
    if not plan and not run:
        raise InputError(
            "DIR", os.fspath(folder), f"holds no results: neither {RUN_FILE} nor {PLAN_FILE}",
            "give a folder that `kvsim run --out` or `kvsim plan --out` wrote",
        )  # fmt: skip
    try:
        return _read_plan(place / PLAN_FILE) if plan else _read_run(place)
    except OSError as error:
        raise InputError(error.filename or "DIR", None, f"cannot be read ({error.strerror})", "check its permissions") from error


def read_run(folder: str | os.PathLike[str]) -> SavedRun:
    """As `read_results`, but refuses a plan."""
    found = read_results(folder)
    if isinstance(found, PlanResult):
        raise InputError("DIR", os.fspath(folder), "holds a plan, not a run", "give two folders of `kvsim run --out`")
    return found


def _read_plan(path: Path) -> PlanResult:
    data = _object(path, PlanResult.model_fields["schema_version"].default)
    try:
        return PlanResult.model_validate(data)
    except ValidationError as error:
        raise _misshapen(path, error, "run `kvsim plan --out` again") from None


def _read_run(place: Path) -> SavedRun:
    path = place / RUN_FILE
    data = _object(path, SCHEMA_VERSION)
    names = data.get("policy_order")
    policies = data.get("policies")
    known = policies.keys() if isinstance(policies, dict) else ()
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names) or set(names) != set(known):
        raise InputError(f"{path}: policy_order", names, "must list the policies of the run", "run `kvsim run --out` again")
    order = tuple(names)
    requests = next((place / name for name in REQUEST_FILES if (place / name).exists()), None)
    logs = {name: RunLog() for name in order} if requests is None else read_requests(requests, order)
    try:
        result = _result(data, logs)
    except ValidationError as error:
        raise _misshapen(path, error, "run `kvsim run --out` again") from None
    for name, policy in result.policies.items() if requests is not None else ():
        expected = policy.summary.num_requests + policy.summary.num_warmup_requests
        found = len(policy.log.request_columns()["index"])
        if found != expected:
            rule = f"holds {found:,} requests of {name}, but {RUN_FILE} counts {expected:,}: files of two runs"
            raise InputError(str(requests), None, rule, "run `kvsim run --out` again")
    bins = read_timeline(place / TIMELINE_FILE, order) if (place / TIMELINE_FILE).exists() else None
    return SavedRun(result, requests is not None, bins)


def _object(path: Path, newest: int) -> dict[str, Any]:
    """The JSON object in a file, of a schema_version that this kvsim reads."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no number")

    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError too
        where = f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InputError(str(path), None, f"is not valid JSON ({where})", "make it again, or restore it") from None
    if not isinstance(data, dict):
        raise InputError(str(path), None, "must hold a JSON object", "make it again, or restore it")
    version = data.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(f"{path}: schema_version", version, "must be a whole number from 1", "this is no file of kvsim's")
    if version > newest:
        rule = f"is newer than {newest}, the newest that this kvsim reads"
        raise InputError(f"{path}: schema_version", version, rule, "upgrade kvsim, or make the results again with this one")
    return data


class _Loose(BaseModel):
    """What is derived from the rest (gains, verdict) is not read but made again."""

    model_config = ConfigDict(extra="ignore")


class _Replica(_Loose):
    group: str
    description: str
    ledger: tuple[LedgerLine, ...]
    pool_units: int
    unit_bytes: int
    num_requests: int
    share_frac: float
    output_tokens_per_s: float
    utilisation_frac: float
    mean_decode_batch_sequences: float
    peak_held_units: int
    num_preemptions: int
    mean_ttft_s: float
    mean_e2e_s: float

    @field_validator("mean_ttft_s", "mean_e2e_s", mode="before")
    @classmethod
    def _nan(cls, value: Any) -> Any:
        return NAN if value is None else value

    def result(self) -> ReplicaResult:
        """Without its log."""
        return ReplicaResult(log=RunLog(), **{name: getattr(self, name) for name in type(self).model_fields})


class _Policy(_Loose):
    description: str
    summary: Summary
    ledger: tuple[LedgerLine, ...]
    pool_units: int
    unit_bytes: int
    kv_bytes_per_sequence: float
    basis: tuple[Basis, ...]
    notes: tuple[str, ...]
    error_bands: Bands | None
    published_quality: PublishedQuality | None = None
    replicas: tuple[_Replica, ...] = ()

    @field_validator("summary", mode="before")
    @classmethod
    def _summary_nan(cls, value: Any) -> Any:
        return _nan_for_null(Summary, value)

    @field_validator("kv_bytes_per_sequence", mode="before")
    @classmethod
    def _nan(cls, value: Any) -> Any:
        return NAN if value is None else value


class _Run(_Loose):
    title: str
    scenario: dict[str, Any]
    seed: int
    versions: dict[str, str]
    slo: dict[str, float]
    warmup_requests: int
    policies: dict[str, _Policy]


def _result(data: dict[str, Any], logs: Mapping[str, RunLog]) -> Result:
    """Raises ValidationError. Mappings are in order of their keys, as the file has them; the SLO as kvsim lists its limits."""
    run = _Run.model_validate(data | {"policies": {name: data["policies"][name] for name in logs}})
    results = {
        name: PolicyResult(
            name, policy.description, policy.summary, logs[name], policy.ledger, policy.pool_units, policy.unit_bytes,
            policy.kv_bytes_per_sequence, policy.basis, policy.notes, policy.published_quality,
            replicas=tuple(replica.result() for replica in policy.replicas),
        )
        for name, policy in run.policies.items()
    }  # fmt: skip
    slo = dict(sorted(run.slo.items(), key=lambda item: SLO_KEYS.index(item[0]) if item[0] in SLO_KEYS else len(SLO_KEYS)))
    bands = {name: policy.error_bands for name, policy in run.policies.items() if policy.error_bands is not None}
    return Result(
        scenario=run.scenario, title=run.title, policies=results, versions=run.versions, seed=run.seed, slo=slo,
        warmup_requests=run.warmup_requests, bands=bands,
    )  # fmt: skip


def _nan_for_null(kind: Any, value: Any) -> Any:
    """The files write null for a number that is none; a field that may be None keeps it."""
    if kind is float:
        return NAN if value is None else value
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        known = {field.name for field in fields(kind)}
        return {name: _nan_for_null(hints[name], item) if name in known else item for name, item in value.items()}
    parts = get_args(kind)
    if len(parts) == 2 and parts[0] is str and isinstance(value, dict):
        return {name: _nan_for_null(parts[1], item) for name, item in value.items()}
    if value is not None and type(None) in parts:
        return _nan_for_null(next(part for part in parts if part is not type(None)), value)
    return value


def _misshapen(path: Path, error: ValidationError, fix: str) -> InputError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return InputError(f"{path}: {where or 'content'}", None, f"is not as kvsim writes it ({first['msg']})", fix)
