"""What the benchmarks of engines' host work share: rows of a part's times, and the CSV that holds them."""

from __future__ import annotations

import csv
import platform
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("part", "batch", "context_tokens", "num_steps", "median_us", "mean_us", "p16_us", "p84_us", "slowest_us")


def as_row(part: str, batch: int, context_tokens: int, values: list[float]) -> dict[str, Any]:
    low, middle, high = np.percentile(values, (16, 50, 84))
    numbers = {"median_us": middle, "mean_us": np.mean(values), "p16_us": low, "p84_us": high}
    shown = {name: round(float(value), 1) for name, value in numbers.items()}
    return {"part": part, "batch": batch, "context_tokens": context_tokens, "num_steps": len(values), **shown}


def quietest(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the same case and part."""
    medians = [row["median_us"] for row in rounds]
    return {**rounds[medians.index(min(medians))], "slowest_us": max(row.get("slowest_us", row["median_us"]) for row in rounds)}


def read(path: Path) -> list[dict[str, Any]]:
    """Rows that `write` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        counts = ("batch", "context_tokens", "num_steps")
        return [
            {name: text if name == "part" else int(text) if name in counts else float(text) for name, text in row.items()} for row in rows
        ]


def processor() -> str:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']}, {fields['cpu MHz']} MHz)"


def write(path: Path, rows: list[dict[str, Any]], engine: str, script: str) -> None:
    import torch
    import transformers

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {engine}, torch {torch.__version__}, transformers "
                   f"{transformers.__version__}, Python {platform.python_version()}\n# {processor()}; made by "
                   f"benchmarks/{script}: thread processor time of one decode step, microseconds\n")  # fmt: skip
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
