"""Charts of two runs: what changes from one to the other, and both latencies in one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvsim.reports.figures.bars import row_labels
from kvsim.reports.figures.chart import BASELINE_COLOUR, PALETTE, Chart, Entry, Panel
from kvsim.reports.figures.run_charts import LATENCIES, cdf_panel
from kvsim.reports.pair import Pair, change_frac, metric_of, signed_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHANGES = {"output_tokens_per_s": "Output tokens/s", "ttft_mean_s": "TTFT, mean", "tpot_mean_s": "TPOT, mean"}
NUM_SHOWN = 3
"""Policies with two lines each in the pictures of latency: more would cover each other."""


def pair_charts(pair: Pair) -> dict[str, Chart]:
    """By name; only those that the runs have matter for."""
    drawn = {"compare_change": change(pair), "compare_latency": latency(pair)}
    return {name: chart for name, chart in drawn.items() if chart is not None}


def change(pair: Pair) -> Chart | None:
    """From A to B, for each policy in both."""
    panels = []
    for name, title in CHANGES.items():
        metric = metric_of(name)
        values = {match.name: value for match in pair.both() if (value := change_frac(match, metric)) is not None}
        if values:
            shown = ", ".join(f"{policy} {signed_percent(value)} %" for policy, value in values.items())
            alt = f"{title}, change from A to B: {shown}."
            panels.append(Panel(title, alt, _bars(values), 0.75 + 0.36 * len(values)))
    caption = "Change from A to B, % of A. More tokens/s are better, longer times are worse."
    return Chart("compare_change", "Change from A to B, %", tuple(panels), (), caption) if panels else None


def _bars(values: Mapping[str, float]) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        lengths = 100 * np.array(list(values.values()))
        axis.barh(np.arange(len(lengths)), lengths, height=0.34, color=PALETTE[0])
        row_labels(axis, values, [signed_percent(value) for value in values.values()])
        axis.axvline(0, color=BASELINE_COLOUR, linewidth=0.9)
        margin = max(0.05 * float(np.ptp(np.append(lengths, 0.0))), 1.0)
        axis.set_xlim(min(float(lengths.min()), 0) - margin, max(float(lengths.max()), 0) + margin)
        axis.set_xlabel("change, %")
        axis.locator_params(axis="x", nbins=5)

    return draw


def latency(pair: Pair) -> Chart | None:
    """CDFs of both runs: a colour for each policy, A dashed."""
    if not (pair.a.has_requests and pair.b.has_requests) or not pair.both():
        return None
    shown = pair.both()[:NUM_SHOWN]
    policies, entries = {}, {}
    for colour, match in zip((BASELINE_COLOUR, *PALETTE), shown, strict=False):
        assert match.a is not None and match.b is not None
        for letter, policy, dashes in (("A", match.a, "--"), ("B", match.b, "-")):
            label = f"{match.name}, {letter}"
            entries[label] = Entry(label, colour, dashes)
            policies[label] = (replace(policy, name=label), (pair.a if letter == "A" else pair.b).result.warmup_requests)
    panels = tuple(cdf_panel(metric, label, policies, {}, entries) for metric, label in LATENCIES.items())
    caption = "The share of counted requests that took at most so long."
    if len(shown) < len(pair.both()):
        caption += f" The first {len(shown)} policies."
    return Chart("compare_latency", "Latency of A and B", panels, tuple(entries.values()), caption)
