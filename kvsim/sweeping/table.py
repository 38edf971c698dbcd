"""Rows as Arrow tables: finished cases, and the result, where varied fields, numbers and gains over the baseline stand together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsim.sweeping.cases import Plan
from kvsim.sweeping.rows import COLUMNS, COUNTS, FLAGS, GAINS, INVALID, NUMBERS, PENDING, TEXTS, add_gains

if TYPE_CHECKING:
    import pyarrow as pa

HEAD = ("case", "point", "case_id", "policy")
"""case: its number, from 0. point: that of the combination of values. case_id: as `id` in the journal."""
OUTCOME = ("status", "error", "composition")
METRICS = tuple(name for name in COLUMNS if name not in TEXTS)
BASELINE = "full"
"""The composition that leaves the cache whole: a point's first policy of it is what gains are over, as `kvsim run` has it."""


def result_rows(plan: Plan, done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each case of the plan, in order."""
    rows = []
    for case in plan.cases:
        row = dict(zip(HEAD, (case.number, case.point, case.id, case.policy), strict=True))
        row |= zip(plan.sweep.fields, case.values, strict=True)
        row |= {"status": INVALID if case.error else PENDING, "error": case.error or None}
        rows.append(row)
    return with_results(rows, done)


def with_results(rows: Sequence[dict[str, Any]], done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of cases with their numbers, where they are done, and with gains."""
    joined = []
    baselines: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        found = done.get(row["case_id"])
        if found is not None:
            row = row | {name: found[name] for name in (*OUTCOME, *METRICS)}
        joined.append(row)
        if row.get("composition") == BASELINE:
            baselines.setdefault(row["point"], row)
    for row in joined:
        add_gains(row, baselines.get(row["point"]))
    return joined


def journal_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return _table(rows, {name: [row[name] for row in rows] for name in COLUMNS})


def result_table(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> pa.Table:
    """fields: the varied ones; each is a column of its own, as JSON text where its values are lists, mappings or of mixed types."""
    names = (*HEAD, *fields, *OUTCOME, *GAINS, *METRICS)
    return _table(rows, {name: [row.get(name) for row in rows] for name in names})


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, list[Any]]) -> pa.Table:
    import pyarrow as pa

    arrays = {}
    for name, values in columns.items():
        if name in _TYPES:
            arrays[name] = pa.array(values, _TYPES[name])
        else:
            arrays[name] = _varied(values)
    return pa.table(arrays)


_TYPES: Mapping[str, str] = {
    "case": "int64", "point": "int64", "case_id": "string", "policy": "string",
    **dict.fromkeys(TEXTS, "string"), **dict.fromkeys(FLAGS, "bool"), **dict.fromkeys(COUNTS, "int64"),
    **dict.fromkeys((*NUMBERS, *GAINS), "float64"),
}  # fmt: skip
"""By name; a varied field's name never is one of these, having a dot or being one of a scenario's own."""


def _varied(values: list[Any]) -> pa.Array:
    """The narrowest type that holds all values of a varied field; null where it was varied over null."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pa.array(values, "int64" if kinds else "string")
    for allowed, kind in (({bool}, "bool"), ({int, float}, "float64"), ({str}, "string")):
        if kinds <= allowed:
            return pa.array(values, kind)
    return pa.array([None if value is None else json.dumps(value, sort_keys=True, default=str) for value in values], "string")
