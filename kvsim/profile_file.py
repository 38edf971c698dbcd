"""Measured profiles as files: one GPU, one engine version, its tables, and how wrong each is. JSON, one table row a line.

`kvsim.calibrate.build` writes them and `kvsim.measured` answers from them. Numbers of tables are thousandths of
log(measured / physics), so a file can be read, compared and reviewed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite, log2
from pathlib import Path
from typing import Any

from kvsim.catalogue import DATA
from kvsim.coordinates import AXES
from kvsim.correction import PERMILLE, Term
from kvsim.errors import InputError
from kvsim.profile import LogBias

SCHEMA = 1
HEAD = ("gpu", "engine", "engine_version", "source", "licence", "made", "command", "rows_sha256")
PROFILES = DATA / "profiles"
DEVICE_FILE = "device.yaml"
"""Beside a profile of a GPU that is not in the catalogue: that GPU, as its calibration measured it."""
TableKey = tuple[str, str, int]
"""(kind, variant, size) of `kvsim.coordinates.Place`."""


@dataclass(frozen=True)
class ErrorClass:
    """How wrong answers of one (kind, size class) are, on shapes that the fit had not seen."""

    quantiles: LogBias
    num_rows: int
    num_shapes: int
    mape: float


@dataclass(frozen=True)
class TableData:
    """A correction's terms, and what they rest on. mape, p90: of |predicted - measured| / measured, shapes held out."""

    terms: tuple[Term, ...]
    num_rows: int
    num_shapes: int
    mape: float
    p90: float


@dataclass(frozen=True)
class ProfileFile:
    """A measured profile's content."""

    gpu: str
    engine: str
    engine_version: str
    source: str
    licence: str
    made: str
    command: str
    rows_sha256: str
    efficiencies: Mapping[str, float]
    tables: Mapping[TableKey, TableData]
    errors: Mapping[tuple[str, str], ErrorClass]

    @property
    def title(self) -> str:
        return f"{self.engine} {self.engine_version} on {self.gpu}"


def shipped() -> dict[str, Path]:
    """Packaged profiles by name, such as "h100-sxm-80gb/vllm-0.24.0"."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(PROFILES.glob("*/*.json"))}


@cache
def load_profile_file(path: Path) -> ProfileFile:
    """Reads and checks a profile; InputError says what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("profile", str(path), f"must be a file that can be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            "profile", str(path), f"must be JSON ({error})", "the file is damaged: write it again with kvsim calibrate import"
        ) from error
    if not isinstance(content, dict) or "schema" not in content:
        raise InputError("profile", str(path), "must be a kvsim profile with a field schema", "kvsim calibrate import makes one")
    if content["schema"] != SCHEMA:
        raise InputError(
            "profile.schema", content["schema"], f"must be {SCHEMA} for this version of kvsim",
            "make the profile again with kvsim calibrate import",
        )  # fmt: skip
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            "profile", str(path), f"must be complete ({what})", "the file is damaged: write it again with kvsim calibrate import"
        ) from error


def _parse(content: Mapping[str, Any]) -> ProfileFile:
    tables = {}
    for entry in content["tables"]:
        kind = entry["kind"]
        terms = tuple(_term(kind, term) for term in entry["terms"])
        tables[kind, entry["variant"], int(entry["size"])] = TableData(
            terms, int(entry["rows"]), int(entry["shapes"]), float(entry["mape"]), float(entry["p90"])
        )
    errors = {}
    for entry in content["errors"]:
        quantiles = tuple(float(value) for value in entry["quantiles"])
        if len(quantiles) != 4 or list(quantiles) != sorted(quantiles) or not all(map(isfinite, quantiles)):
            raise ValueError(f"quantiles of {entry['kind']} {entry['class']} must be four ascending numbers")
        errors[entry["kind"], entry["class"]] = ErrorClass(
            (quantiles[0], quantiles[1], quantiles[2], quantiles[3]),
            int(entry["rows"]), int(entry["shapes"]), float(entry["mape"]),
        )  # fmt: skip
    text = {name: str(content[name]) for name in HEAD}
    efficiencies = {str(name): float(value) for name, value in content["efficiencies"].items()}
    for name, value in efficiencies.items():
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"efficiencies.{name} must be a finite number >= 0")
    return ProfileFile(efficiencies=efficiencies, tables=tables, errors=errors, **text)


def _term(kind: str, entry: Mapping[str, Any]) -> Term:
    names = AXES[kind]
    axes = entry["axes"]
    where = [names.index(name) for name in axes]
    knots = [[_log2(value) for value in values] for values in axes.values()]
    for name, axis in zip(axes, knots, strict=True):
        if not axis or sorted(set(axis)) != axis:
            raise ValueError(f"axis {name} of {kind} must ascend")
    values = [value * PERMILLE for row in entry["log_permille"] for value in row]
    if len(values) != _size(knots):
        raise ValueError(f"{kind} needs {_size(knots)} numbers, has {len(values)}")
    if not all(map(isfinite, values)):
        raise ValueError(f"{kind} must hold finite numbers")
    return Term(where, knots, values)


def _log2(value: float) -> float:
    if not value > 0:
        raise ValueError(f"axis value {value} must be > 0")
    return log2(value)


def _size(knots: Sequence[Sequence[float]]) -> int:
    size = 1
    for axis in knots:
        size *= len(axis)
    return size


def dump_profile_file(profile: ProfileFile) -> str:
    """The file's text: JSON with one row of numbers a line."""
    head: dict[str, Any] = {"schema": SCHEMA}
    for name in HEAD:
        head[name] = getattr(profile, name)
    head["efficiencies"] = {name: float(f"{value:.4g}") for name, value in sorted(profile.efficiencies.items())}
    lines = ["{"]
    lines += [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}," for name, value in head.items()]
    lines.append('"errors": [')
    lines.append(",\n".join(_error_line(key, error) for key, error in profile.errors.items()))
    lines.append('],\n"tables": [')
    lines.append(",\n".join(_table_text(key, table) for key, table in profile.tables.items()))
    lines.append("]\n}\n")
    return "\n".join(lines)


def _error_line(key: tuple[str, str], error: ErrorClass) -> str:
    return json.dumps({
        "kind": key[0], "class": key[1], "quantiles": [round(q, 4) for q in error.quantiles],
        "rows": error.num_rows, "shapes": error.num_shapes, "mape": round(error.mape, 4),
    })  # fmt: skip


def _table_text(key: TableKey, table: TableData) -> str:
    head = {
        "kind": key[0], "variant": key[1], "size": key[2], "rows": table.num_rows, "shapes": table.num_shapes,
        "mape": round(table.mape, 4), "p90": round(table.p90, 4),
    }  # fmt: skip
    terms = []
    for term in table.terms:
        names = [AXES[key[0]][which] for which in term.where]
        axes = {name: [float(f"{2**knot:.6g}") for knot in knots] for name, knots in zip(names, term.knots, strict=True)}
        width = len(term.knots[-1])
        numbers = [round(value / PERMILLE) for value in term.values]
        rows = ",\n".join(
            json.dumps(numbers[start : start + width], separators=(",", ":")) for start in range(0, len(numbers), width)
        )
        terms.append(f'{{"axes": {json.dumps(axes)}, "log_permille": [\n{rows}]}}')
    return json.dumps(head)[:-1] + ', "terms": [\n' + ",\n".join(terms) + "]}"
