"""plan.json, plan.csv and plan.md: all of them or nothing. Equal inputs give equal bytes."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from kvsim.planning.result import Option, PlanResult
from kvsim.reports.folder import all_or_nothing
from kvsim.reports.formats import number
from kvsim.reports.plan_terminal import Columns, cost_columns, rate_columns

PLAN_FILES = ("plan.json", "plan.csv", "plan.md")
CSV_FIELDS = (
    "name", "gpu", "tensor_parallel", "policy", "policy_description", "reason", "rate_per_s", "failing_rate_per_s",
    "robust_rate_per_s", "share_met_frac", "capacity_per_s", "binds", "replicas", "robust_replicas", "num_gpus", "headroom_frac",
    "output_tokens_per_s", "cost_per_hour", "cost_per_million_output_tokens", "gpu_hours_per_million_output_tokens", "watts",
    "kwh_per_million_output_tokens",
)  # fmt: skip


def write_plan(result: PlanResult, out_dir: str | os.PathLike[str]) -> list[Path]:
    """Writes the files and returns their paths. Raises InputError if out_dir cannot be written."""
    with all_or_nothing(out_dir, PLAN_FILES) as folder:
        (folder / "plan.json").write_text(plan_json(result), encoding="utf-8", newline="\n")
        (folder / "plan.md").write_text(plan_markdown(result), encoding="utf-8", newline="\n")
        with (folder / "plan.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("rank", *CSV_FIELDS))
            for rank, option in enumerate(result.options, 1):
                writer.writerow((rank, *("" if (v := getattr(option, name)) is None else v for name in CSV_FIELDS)))
    return [Path(out_dir) / name for name in PLAN_FILES]


def plan_json(result: PlanResult) -> str:
    """`kvsim.planning.result.PlanResult.model_validate_json` reads it back."""
    return result.model_dump_json(indent=2) + "\n"


def plan_markdown(result: PlanResult) -> str:
    usable = [option for option in result.options if option.reason is None]
    out = [option for option in result.options if option.reason is not None]
    lines = [f"# {_cell(result.title)}", "", *(f"- {_cell(sentence)}" for sentence in result.summary), ""]
    if usable:
        lines += ["## Options, best first", "", *_table(usable, cost_columns(result)), ""]
        lines += ["## One replica at its highest rate within the SLO", "", *_table(usable, rate_columns(result)), ""]
    for option in usable:
        if option.sensitivity:
            lines += [f"## What the rate of {_cell(option.name)} rests on", "", *_sensitivity(option), ""]
    if out:
        rows = [f"| {_cell(option.name)} | {_cell(option.reason or '')} |" for option in out]
        lines += ["## Cannot be deployed", "", "| option | reason |", "| --- | --- |", *rows, ""]
    lines += ["## Notes", "", *(f"- {_cell(note)}" for note in result.notes)]
    for option in usable:
        lines += [f"- {_cell(option.name)}: {_cell(note)}" for note in option.notes]
    return "\n".join(lines) + "\n"


def _table(options: list[Option], columns: Columns) -> list[str]:
    heads = ["option", *(head.replace("-\n", "").replace("\n", " ") for head, _ in columns)]
    rows = [[option.name, *(cell(option).replace("\n", " ") for _, cell in columns)] for option in options]
    return [_row(heads), _row(["---", *("---:" for _ in columns)]), *(_row(row) for row in rows)]


def _sensitivity(option: Option) -> list[str]:
    rows = [
        _row([row.name, row.low_input, number(row.rate_at_low_per_s), row.high_input, number(row.rate_at_high_per_s)])
        for row in option.sensitivity
    ]
    return [_row(["input", "low", "requests/s", "high", "requests/s"]), _row(["---", "---:", "---:", "---:", "---:"]), *rows]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
