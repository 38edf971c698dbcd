"""``kvsim calibrate import``: other people's measurements become a profile."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvsim.calibrate.build import build, write_profile
from kvsim.calibrate.importers import plain_csv
from kvsim.calibrate.importers.cells import LeftOut
from kvsim.calibrate.rows import Import, Rejected
from kvsim.datasheet import DatasheetProfile
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.profile_file import ProfileFile

SHOWN_REASONS, SHOWN_ROWS = 8, 3
ENGINE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
"""Of engines and versions: they become the name of a file."""
MOST_ABOVE_DATASHEET = 30.0
"""Medians of a kind lie within 0.5 to 1.5 of the datasheet's answers in all data at hand; a wrong unit is a factor of 1,000."""
TABLE_HEADS = ("table", "rows", "shapes", "mean error", "90 % below")
TABLE_TITLE = "Errors on shapes held out"


@dataclass(frozen=True)
class Imported:
    """A profile that was written, and what there is to tell about it."""

    profile: ProfileFile
    path: Path
    lines: list[str]
    tables: list[tuple[str, ...]]  # cells under TABLE_HEADS


def split_engine(text: str) -> tuple[str, str | None]:
    """(engine, version or None) of "vllm==0.24.0" or "vllm"."""
    engine, equals, version = (part.strip() for part in text.partition("=="))
    if not ENGINE_NAME.fullmatch(engine) or (equals and not ENGINE_NAME.fullmatch(version)):
        raise InputError("--engine", text, "must be NAME or NAME==VERSION of letters, digits and . _ + -", "try vllm==0.24.0")
    return engine, version or None


def named_engine(text: str) -> tuple[str, str]:
    """(engine, version) of "vllm==0.24.0": rows of a file do not say which version ran."""
    engine, version = split_engine(text)
    if version is None:
        raise InputError("--engine", text, "must name a version for rows of a file", f"try {engine}==1.0")
    return engine, version


def mixture_lines(path: Path, only_engine: str | None, only_gpu: str | None) -> list[str]:
    """What the rows of a plain CSV are a mixture of: they are fitted as one, which may be meant, or not."""
    chosen = {"engine": only_engine, "gpu": only_gpu}
    wanted = {column: text for column, text in chosen.items() if text is not None}
    lines = []
    for column in chosen.keys() - wanted.keys():
        there = plain_csv.texts(path, column, wanted)
        if len(there) > 1:
            lines.append(f"note: one profile is made of {len(there)} {column}s, {', '.join(there)}; --only-{column} picks one")
    return sorted(lines)


def default_path(gpu: Gpu, found: Import) -> Path:
    return Path(f"{gpu.name}-{found.engine}-{found.engine_version}.json")


def make_profile(gpu: Gpu, found: Import, command: str, out: Path | None) -> Imported:
    """Fits, writes and tells. out None: `default_path`, in the current folder.

    Raises InputError, having written nothing, where no row is left, where times have a wrong unit, and where `out` cannot be
    written.
    """
    path = out or default_path(gpu, found)
    if path.suffix != ".json":
        raise InputError("--out", str(path), "must end in .json")
    if path.is_dir():
        raise InputError("--out", str(path), "must be a file, not a folder")
    if not found.rows:
        first = f"{found.rejected[0].where} {found.rejected[0].reason}" if found.rejected else "there are none"
        raise InputError("rows", found.source, f"must hold rows that are possible on {gpu.name} ({first})")
    check_unit(gpu, found)
    count = len(found.rows) + len(found.rejected)
    lines = [f"{count:,} measurements read of {found.engine} {found.engine_version} on {gpu.name}, {len(found.rejected):,} left out"]
    lines += rejected_lines(found.rejected)
    impossible = [row for row in found.rejected if not isinstance(row, LeftOut)]
    profile, _, suspect = build(gpu, replace(found, rejected=impossible), command)
    if not profile.tables:
        raise InputError("rows", found.source, "must be at least two of a kind, outside tables that are left out as a whole")
    lines += [f"left out as a whole, too many impossible rows: {text}" for text in suspect]
    try:
        write_profile(profile, path)
    except OSError as error:
        with suppress(OSError):
            path.with_suffix(".tmp").unlink()
        raise InputError("--out", str(path), f"cannot be written ({error.strerror})") from error
    return Imported(profile, path, lines, table_cells(profile))


def check_unit(gpu: Gpu, found: Import) -> None:
    """InputError where all times of a kind are far from what the datasheet says: too slow is not impossible, only absurd."""
    physics = DatasheetProfile(gpu)
    ratios: dict[str, list[float]] = {}
    for row in found.rows:
        ratios.setdefault(row.op.kind, []).append(row.seconds / physics.answer(row.op).seconds)
    for kind, values in ratios.items():
        median = float(np.median(values))
        if not 1 / MOST_ABOVE_DATASHEET < median < MOST_ABOVE_DATASHEET:
            rule = f"must take about as long as {gpu.name}'s datasheet says; times of {kind} are {median:.3g} times that"
            raise InputError("rows", found.source, rule, "is their unit right, and the GPU?")


def rejected_lines(rejected: Iterable[Rejected]) -> list[str]:
    """What was left out: by reason, whatever its numbers, with the first rows of each; the most frequent first."""
    reasons: dict[str, list[Rejected]] = {}
    for row in rejected:
        reasons.setdefault(re.sub(r"\d[\d.,]*(e[-+]?\d+)?", "#", row.reason), []).append(row)
    by_count = sorted(reasons.values(), key=len, reverse=True)
    lines = []
    for rows in by_count[:SHOWN_REASONS]:
        where = ", ".join(row.where for row in rows[:SHOWN_ROWS])
        more = ", ..." if len(rows) > SHOWN_ROWS else ""
        lines.append(f"  {len(rows):,} left out ({where}{more}): {rows[0].reason}")
    if len(by_count) > SHOWN_REASONS:
        count = sum(map(len, by_count[SHOWN_REASONS:]))
        lines.append(f"  {count:,} left out for {len(by_count) - SHOWN_REASONS} other reasons")
    return lines


def table_cells(profile: ProfileFile) -> list[tuple[str, ...]]:
    """Every table of the profile under TABLE_HEADS."""
    return [
        (
            " ".join(str(part) for part in key if part), f"{table.num_rows:,}", f"{table.num_shapes:,}", f"{table.mape:.1%}",
            f"{table.p90:.1%}",
        )
        for key, table in profile.tables.items()
    ]  # fmt: skip
