"""``kvsim calibrate import``: other people's measurements become a profile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from kvsim.calibrate.build import build, write_profile
from kvsim.calibrate.rows import Import
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.profile_file import ProfileFile

SHOWN_REASONS, SHOWN_ROWS = 5, 3


def split_engine(text: str) -> tuple[str, str | None]:
    """(engine, version or None) of "vllm==0.24.0" or "vllm"."""
    engine, _, version = text.partition("==")
    if not engine.strip() or ("==" in text and not version.strip()):
        raise InputError("--engine", text, "must be NAME or NAME==VERSION", "try vllm==0.24.0")
    return engine.strip(), version.strip() or None


def default_path(gpu: Gpu, found: Import) -> Path:
    return Path(f"{gpu.name}-{found.engine}-{found.engine_version}.json")


def make_profile(gpu: Gpu, found: Import, command: str, out: Path | None) -> tuple[ProfileFile, Path, list[str]]:
    """Fits, writes and tells: (profile, where it was written, lines for the terminal)."""
    path = out or default_path(gpu, found)
    if path.suffix != ".json":
        raise InputError("--out", str(path), "must end in .json")
    if not found.rows:
        raise InputError("rows", found.source, f"must hold rows that are possible on {gpu.name}; all {len(found.rejected)} were not")
    lines = [f"{len(found.rows):,} rows of {found.engine} {found.engine_version} on {gpu.name}, {len(found.rejected):,} left out"]
    lines += rejected_lines(found)
    profile, _, suspect = build(gpu, found, command)
    lines += [f"left out as a whole, too many impossible rows: {text}" for text in suspect]
    for (kind, variant, size), table in profile.tables.items():
        name = " ".join(str(part) for part in (kind, variant, size) if part)
        lines.append(
            f"  {name:<36} {table.num_rows:>7,} rows {table.num_shapes:>5} shapes   error on shapes held out: "
            f"mean {table.mape:.1%}, 90 % below {table.p90:.1%}"
        )
    try:
        write_profile(profile, path)
    except OSError as error:
        raise InputError("--out", str(path), f"cannot be written ({error.strerror})") from error
    return profile, path, lines


def rejected_lines(found: Import) -> list[str]:
    """What was left out: reasons by count, without their numbers, and the first rows of each."""
    reasons: Counter[str] = Counter()
    rows: dict[str, list[str]] = {}
    for row in found.rejected:
        kind = "".join("#" if letter.isdigit() else letter for letter in row.reason)
        reasons[kind] += 1
        rows.setdefault(kind, []).append(f"{row.where} {row.reason}")
    lines = []
    for kind, count in reasons.most_common(SHOWN_REASONS):
        lines.append(f"  {count} like {'; '.join(rows[kind][:SHOWN_ROWS])}")
    return lines


