"""report.md and the console's tables: what was measured, how wrong the profile is on points it had not seen, what went wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from kvsim.calibrate.device.conclude import Conclusion
from kvsim.calibrate.device.rows_file import OK, PROBE, Row
from kvsim.catalogue import DATA
from kvsim.datasheet import sustained_rate
from kvsim.hardware import load_gpu

REPORT_FILE = "report.md"
THROTTLED_FRAC = 0.10
"""Spread of a point's samples, or drift of the probe, beyond which times are in doubt."""
ERROR_HEADS = ("Op", "rows", "held out by", "mean error", "90 % below")
STATE_HEADS = ("measured", "ok", "skipped", "failed", "median spread", f"spread > {THROTTLED_FRAC:.0%}")
SKEW_HEADS = ("unlike lengths (not fitted)", "rows", "mean error", "bias")
Line = tuple[str, ...]


def error_lines(conclusion: Conclusion) -> list[Line]:
    """Every table of the profile, with its errors on rows that it was not fitted to."""
    found: list[Line] = []
    for (kind, variant, size), table in conclusion.profile.tables.items():
        name = " ".join(str(part) for part in (kind, variant, size) if part)
        how = f"{table.num_shapes} shapes" if table.num_shapes < table.num_rows else "single rows"
        found.append((name, f"{table.num_rows:,}", how, f"{table.mape:.1%}", f"{table.p90:.1%}"))
    return found


def state_lines(rows: Iterable[Row]) -> list[Line]:
    """By group: how many points came out how, and how steady they were."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] != PROBE:
            groups.setdefault(row["group"], []).append(row)
    found = []
    for name, members in sorted(groups.items()):
        states = Counter(row["status"].partition(":")[0] for row in members)
        spreads = [spread_frac(row) for row in members if row["status"] == OK]
        shaky = sum(spread > THROTTLED_FRAC for spread in spreads)
        steady = f"{median(spreads):.1%}" if spreads else "-"
        found.append((name, *(str(states[state]) for state in (OK, "skipped", "failed")), steady, str(shaky)))
    return found


def spread_frac(row: Row) -> float:
    """Of the samples: 80 % less 20 %, over the median."""
    return float((row["p80_s"] - row["p20_s"]) / row["seconds"])


def reasons(rows: Iterable[Row]) -> list[str]:
    """What went wrong, by group and reason, the most frequent first."""
    counts = Counter((row["group"], row["status"]) for row in rows if row["status"] not in (OK, PROBE))
    return [f"{group}: {status} ({count} points)" for (group, status), count in counts.most_common()]


def skew_lines(conclusion: Conclusion) -> list[Line]:
    return [(error.name, str(error.num_rows), f"{error.mape:.1%}", f"{error.bias:+.1%}") for error in conclusion.skew]


def drift_frac(rows: Iterable[Row]) -> float:
    """How much slower the probe became than it was at its best: the 90th percentile over the least, less one."""
    probes = sorted(row["seconds"] for row in rows if row["status"] == PROBE)
    return probes[int(0.9 * (len(probes) - 1))] / probes[0] - 1.0 if probes else 0.0


def warnings(conclusion: Conclusion) -> list[str]:
    """What a user should look at before trusting the numbers."""
    rows, header, found = conclusion.file.rows, conclusion.file.header, []
    spreads = [spread_frac(row) for row in rows if row["status"] == OK]
    shaky = sum(spread > THROTTLED_FRAC for spread in spreads)
    if spreads and shaky > 0.2 * len(spreads):
        found.append(f"{shaky} of {len(spreads)} points spread by more than {THROTTLED_FRAC:.0%}: the device is shared, or throttles")
    drift = drift_frac(rows)
    if drift > THROTTLED_FRAC:
        found.append(f"the probe, one fixed product, was up to {drift:.0%} slower than at its best: heat, power or a neighbour")
    found += [f"a product in {dtype} kills the process ({how}): no rows of that dtype" for dtype, how in header.get("deadly", {}).items()]
    if (DATA / "gpus" / f"{conclusion.gpu.name}.yaml").exists():
        sheet = load_gpu(conclusion.gpu.name)
        for name, rate in header["peak_flops_per_s"].items():
            if name in ("fp16", "bf16") and rate < 0.5 * (sustained_rate(sheet, name) or sheet.peak_flops(name)):
                found.append(f"{name} products reach {rate / sheet.peak_flops(name):.0%} of the datasheet's peak: less than a whole GPU?")
    lone = [line[0] for line in error_lines(conclusion) if line[2] == "single rows" and line[0].partition(" ")[0].endswith("attention")]
    if lone:
        found.append(f"one head configuration alone, errors are of other lengths and batches: {', '.join(lone)}")
    return found


def write_report(folder: Path, conclusion: Conclusion, command: str) -> None:
    """report.md, replaced in one step."""
    header, rows = conclusion.file.header, conclusion.file.rows
    peaks = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in header["peak_flops_per_s"].items())
    link = f"host link {header['host_copy_bytes_per_s'] / 1e9:.4g} GB/s"
    parts = [
        f"# Calibration of {header['device_name']}",
        f"`{command}`, torch {header['torch']}, plan {header['plan']}. Copies reach {header['copy_bytes_per_s'] / 1e9:.4g} GB/s, {link}; "
        f"products {peaks}. Inputs take turns over {header['cold_bytes'] / 2**20:.0f} MiB, the cache holds "
        f"{header['cache_bytes'] / 2**20:.0f} MiB. Probe drift {drift_frac(rows):.1%}.",
        _usage(folder, conclusion),
        *(f"**Note:** {text}." for text in warnings(conclusion)),
        "## Errors on points that were not fitted", table(ERROR_HEADS, error_lines(conclusion)),
    ]  # fmt: skip
    if conclusion.skew:
        parts += [table(SKEW_HEADS, skew_lines(conclusion))]
    parts += ["## Points", table(STATE_HEADS, state_lines(rows))]
    if wrong := reasons(rows):
        parts += ["## Not measured", "\n".join(f"- {text}" for text in wrong)]
    if conclusion.rejected:
        parts += ["## Left out as impossible", "\n".join(f"- {text}" for text in conclusion.rejected)]
    partial = folder / f"{REPORT_FILE}.{os.getpid()}.tmp"
    partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    os.replace(partial, folder / REPORT_FILE)


def _usage(folder: Path, conclusion: Conclusion) -> str:
    lines = ["```yaml", f"gpu: {folder.name}/device.yaml", f"profile: {folder.name}/profile.json"]
    if conclusion.file.header["device_type"] == "cpu":
        lines.append("weight_dtype: fp32")
    return "\n".join([*lines, "```"])


def table(heads: Sequence[str], lines: Iterable[Line]) -> str:
    rows = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *lines)]
    return "\n".join(rows)
