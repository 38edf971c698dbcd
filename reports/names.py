"""The names of the files that reports are made of and written to."""

from __future__ import annotations

PLAN_FILE, RUN_FILE, TIMELINE_FILE = "plan.json", "summary.json", "timeline.csv"
REQUEST_FILES = ("requests.csv", "requests.parquet")


def _figures(*charts: str) -> tuple[str, ...]:
    return tuple(f"{chart}.{kind}" for chart in charts for kind in ("png", "svg"))


RUN_NAMES = (
    "report.html", "report.md", "policies.csv", *_figures("latency_cdf", "over_time", "time_by_op", "memory", "gains")
)  # fmt: skip
PLAN_NAMES = (
    "report.html", "report.md", "options.csv", "probes.csv", *_figures("pareto", "load", "time_by_op", "memory", "sensitivity")
)  # fmt: skip
PAIR_NAMES = ("compare.html", "compare.md", "compare.csv", *_figures("compare_latency", "compare_change"))
"""Every file that a report of a kind may write; those of an earlier one that it does not write are removed."""
