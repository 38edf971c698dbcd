"""Charts of a run: latency CDFs, batch and memory over time, time by Op, GPU memory, gains over the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from kvsim.reports.compare import GAIN_LABELS, gains_over_baseline
from kvsim.reports.figures.bars import ledger_bars, op_bars, row_labels
from kvsim.reports.figures.chart import BASELINE_COLOUR, DASHES, PALETTE, SOFT, Chart, Entry, Panel
from kvsim.reports.files import request_columns
from kvsim.reports.formats import factor
from kvsim.reports.saved import SavedRun
from kvsim.reports.verdict import is_overloaded
from kvsim.result import PolicyResult, Result
from kvsim.units import PS_PER_S, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}
OVER_TIME = {
    "decoding_sequences": ("Decoding sequences", 1.0),
    "waiting_requests": ("Waiting requests", 1.0),
    "kv_pool_frac": ("KV pool in use, %", 100.0),
}
MAX_CDF_POINTS = 300
LOG_SPREAD, MANY_DECADES = 20, 300


def run_charts(run: SavedRun) -> dict[str, Chart]:
    """By name; only those that the run has matter for."""
    drawn = {name: draw(run) for name, draw in CHARTS.items()}
    return {name: chart for name, chart in drawn.items() if chart is not None}


def latency_cdf(run: SavedRun) -> Chart | None:
    """Share of counted requests that are at least as fast; the SLO's limits as thin lines."""
    if not run.has_requests:
        return None
    result, entries = run.result, legend(run.result)
    policies = {name: (policy, result.warmup_requests) for name, policy in result.policies.items()}
    panels = tuple(cdf_panel(metric, label, policies, result.slo, entries) for metric, label in LATENCIES.items())
    caption = "The share of counted requests that took at most so long. Thin lines: limits of the SLO."
    return Chart("latency_cdf", f"{result.title}: latency", panels, tuple(entries.values()), caption)


def cdf_panel(
    metric: str, label: str, policies: Mapping[str, tuple[PolicyResult, int]], slo: Mapping[str, float], entries: Mapping[str, Entry]
) -> Panel:
    """policies: by the label of their line, with the number of warm-up requests that do not count."""
    values_s = {}
    for name, (policy, warmup_requests) in policies.items():
        table = request_columns(policy.log, warmup_requests)
        kept = table[metric][(table["is_warmup"] == 0) & (table[metric] >= 0)]
        if len(kept):
            values_s[name] = np.sort(kept) / PS_PER_S
    limits_s = {key.split("_")[1]: limit for key, limit in slo.items() if key.split("_")[0] == metric}
    medians = "; ".join(f"{name} median {format_seconds(float(v[(len(v) - 1) // 2]))}" for name, v in values_s.items())
    alt = f"Share of requests by {label}, a line for each policy. {medians}."
    return Panel(label, alt, _cdf(values_s, limits_s, entries))


def _cdf(values_s: Mapping[str, np.ndarray], limits_s: Mapping[str, float], entries: Mapping[str, Entry]) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        extremes: list[float] = []
        for name, values in values_s.items():
            shown = np.unique(_cdf_places(len(values)))
            axis.step(
                values[shown], 100 * (shown + 1) / len(values), where="post", color=entries[name].colour,
                linestyle=entries[name].dashes,
            )  # fmt: skip
            extremes += [values[0], values[-1]]
        for statistic, limit in limits_s.items():
            axis.axvline(limit, color=SOFT, linewidth=0.9)
            axis.text(limit, 3, f" SLO {statistic}", color=SOFT, fontsize=8, rotation=90, va="bottom")
            extremes.append(limit)
        if extremes and min(extremes) > 0 and max(extremes) > LOG_SPREAD * min(extremes):
            log_ticks(axis, max(extremes) / min(extremes))
        axis.set_xlabel("seconds")
        axis.set_ylabel("% of requests")
        axis.set_ylim(0, 101)

    return draw


def log_ticks(axis: Axes, spread: float) -> None:
    """A logarithmic x axis with plain numbers, at 1, 2 and 5 where there is room for them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < MANY_DECADES else (1,)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _cdf_places(num_values: int) -> np.ndarray:
    """Ranks to draw: the first and last, evenly in between, and every one of the slowest."""
    tail = np.arange(max(num_values - MAX_CDF_POINTS // 6, 0), num_values)
    return np.concatenate([np.linspace(0, num_values - 1, MAX_CDF_POINTS).astype(int), tail])


def over_time(run: SavedRun) -> Chart | None:
    """Decoding sequences, waiting requests and use of the KV pool, averaged over bins of time."""
    if run.bins is None:
        return None
    entries, bins = legend(run.result), run.bins

    def panel(value: str, label: str, scale: float) -> Panel:
        def draw(axis: Axes) -> None:
            for name, found in bins.items():
                entry = entries[name]
                axis.plot(found.time_s, scale * found.values[value], color=entry.colour, linestyle=entry.dashes, linewidth=1.2)
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.set_xlabel("simulated time, seconds")

        peaks = (f"{name} at most {scale * found.values[value].max():.3g}" for name, found in bins.items() if len(found.time_s))
        return Panel(label, f"{label} over simulated time, a line for each policy: {'; '.join(peaks)}.", draw)

    panels = tuple(panel(value, *shown) for value, shown in OVER_TIME.items())
    caption = "Averages over 400 bins of simulated time, warm-up included."
    return Chart("over_time", f"{run.result.title}: over time", panels, tuple(entries.values()), caption)


def time_by_op(run: SavedRun) -> Chart | None:
    """Device seconds of the whole run by Op kind: all policies serve the same requests, so lengths compare."""
    op_s = {name: policy.summary.op_s for name, policy in run.result.policies.items()}
    caption = "Device seconds over the whole run; every policy serves the same requests, so lengths compare."
    return op_bars(op_s, run.result.title, "device time, seconds", caption)


def memory(run: SavedRun) -> Chart | None:
    """GPU memory line by line."""
    ledgers = {name: policy.ledger for name, policy in run.result.policies.items()}
    return ledger_bars(ledgers, run.result.title)


def gain_chart(run: SavedRun) -> Chart | None:
    """A panel for each gain, a bar for each rival of the baseline; above 1 is better."""
    result = run.result
    table = {name: row for name, row in gains_over_baseline(result).items() if name != result.baseline}
    if result.baseline is None or not table:
        return None
    waits = any(is_overloaded(result.policies[name].summary) for name in (result.baseline, *table))
    panels = []
    for key, label in GAIN_LABELS.items():
        values = {name: row[key] for name, row in table.items()}
        doubtful = waits and key in ("ttft_x", "e2e_x")
        shown = ", ".join(f"{name} {factor(value)}" for name, value in values.items())
        height_in = 0.55 + 0.36 * len(values)
        alt = f"{label}, factors over {result.baseline}: {shown}."
        panels.append(Panel(label + (" *" if doubtful else ""), alt, _gain_bars(values), height_in))
    caption = f"Factors over {result.baseline}; above 1 is better. The line marks 1."
    if waits:
        caption += " * A policy is overloaded: the figure grows with the length of the run."
    return Chart("gains", f"{result.title}: gain over {result.baseline}, above 1 is better", tuple(panels), (), caption)


def _gain_bars(values: Mapping[str, float]) -> Callable[[Axes], None]:
    """Bars from 1, to the right where the policy is better."""

    def draw(axis: Axes) -> None:
        lengths = np.array([value - 1 if np.isfinite(value) else 0.0 for value in values.values()])
        axis.barh(np.arange(len(lengths)), lengths, left=1, height=0.34, color=PALETTE[0])
        row_labels(axis, values, [factor(value) for value in values.values()])
        axis.axvline(1, color=BASELINE_COLOUR, linewidth=0.9)
        margin = max(0.05 * float(np.ptp(np.append(lengths, 0.0))), 0.02)
        axis.set_xlim(1 + min(float(lengths.min()), 0) - margin, 1 + max(float(lengths.max()), 0) + margin)
        axis.locator_params(axis="x", nbins=5)

    return draw


CHARTS: dict[str, Callable[[SavedRun], Chart | None]] = {
    "latency_cdf": latency_cdf,
    "over_time": over_time,
    "time_by_op": time_by_op,
    "memory": memory,
    "gains": gain_chart,
}


def legend(result: Result) -> dict[str, Entry]:
    """Black for the baseline; colours for the others, then the same colours with dashes."""
    return legend_of(list(result.policies), result.baseline)


def legend_of(names: list[str], baseline: str | None = None) -> dict[str, Entry]:
    rivals = iter(range(len(names)))
    entries = {}
    for name in names:
        i = -1 if name == baseline else next(rivals)
        colour = BASELINE_COLOUR if i < 0 else PALETTE[i % len(PALETTE)]
        entries[name] = Entry(name, colour, DASHES[max(i, 0) // len(PALETTE) % len(DASHES)])
    return entries


