"""Pictures of a run as PNG: latency CDFs, batch and memory over time, time by Op, gains over the baseline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim.reports.compare import GAIN_LABELS, gains_over_baseline
from kvsim.reports.files import request_columns
from kvsim.reports.formats import factor, percent
from kvsim.reports.verdict import is_overloaded
from kvsim.result import Result
from kvsim.timeline import timeline
from kvsim.units import PS_PER_S

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), "Color Universal Design": told apart with any colour vision; yellow left out as too pale.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
BASELINE_COLOUR = "#000000"
DASHES = ("-", "--", ":", "-.")
OP_COLOURS = (*PALETTE, "#999999", "#882255", "#DDCC77", "#332288")
NUM_TIME_BINS = 400
MAX_CDF_POINTS = 2000
LOG_SPREAD = 20
MAX_LEGEND_COLUMNS = 4
DPI = 130


def save_plots(result: Result, out_dir: Path) -> list[Path]:
    """Write every plot that the result has matter for (no gains without a baseline and a rival)."""
    made = []
    for name, draw in PLOTS.items():
        figure = draw(result)
        if figure is not None:
            figure.savefig(out_dir / name, dpi=DPI, metadata={"Software": None})
            made.append(out_dir / name)
    return made


def latency_cdf(result: Result) -> Figure:
    """Share of counted requests that are at least as fast, for TTFT, TPOT and E2E; the SLO's limits as thin lines."""
    figure, axes = _figure(11, 4.2, 1, 3)
    styles = _styles(result)
    columns = {name: request_columns(p.log, result.warmup_requests) for name, p in result.policies.items()}
    for axis, (metric, label) in zip(axes, (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E")), strict=True):
        extremes = []
        for name, table in columns.items():
            values_s = np.sort(table[metric][(table["is_warmup"] == 0) & (table[metric] >= 0)]) / PS_PER_S
            if not len(values_s):
                continue
            shown = np.unique(np.linspace(0, len(values_s) - 1, MAX_CDF_POINTS).astype(int))
            axis.step(values_s[shown], (shown + 1) / len(values_s), where="post", label=_literal(name), **styles[name])
            extremes += [values_s[0], values_s[-1]]
        for key, limit_s in result.slo.items():
            if key.split("_")[0] == metric:
                axis.axvline(limit_s, color="#999999", linewidth=1)
                axis.text(
                    limit_s, 0.02, f" SLO {key.split('_')[1]}", color="#666666", fontsize=8, rotation=90, va="bottom"
                )
                extremes.append(limit_s)
        if extremes and min(extremes) > 0 and max(extremes) > LOG_SPREAD * min(extremes):
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(label, loc="left", fontweight="bold")
        axis.set_xlabel("seconds")
        axis.set_ylim(0, 1.01)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    _finish(figure, axes[0], result.title)
    return figure


def over_time(result: Result) -> Figure:
    """Decoding sequences, waiting requests and use of the KV pool, averaged over bins of time."""
    figure, axes = _figure(11, 7.2, 3, 1, sharex=True)
    styles = _styles(result)
    for name, policy in result.policies.items():
        runs = timeline(policy.log)
        if not len(runs.start_ps):
            continue
        edges_ps = np.linspace(int(runs.start_ps[0]), int(runs.end_ps[-1]), NUM_TIME_BINS + 1)
        middle_s = (edges_ps[1:] + edges_ps[:-1]) / 2 / PS_PER_S
        pool = max(policy.pool_units, 1)
        for axis, values in zip(axes, (runs.num_decodes, runs.num_waiting, 100 * runs.held_units / pool), strict=True):
            axis.plot(middle_s, runs.binned(values, edges_ps), label=_literal(name), **styles[name])
    for axis, label in zip(axes, ("decoding sequences", "waiting requests", "KV pool in use, %"), strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("simulated time, seconds")
    axes[-1].set_xlim(left=0)
    figure.align_ylabels(axes)
    _finish(figure, axes[0], result.title)
    return figure


def time_by_op(result: Result) -> Figure:
    """Device seconds of the whole run by Op kind: all policies serve the same requests, so lengths compare."""
    names = list(result.policies)
    figure, (axis,) = _figure(11, 2.2 + 0.45 * len(names), 1, 1)
    op_s = {name: policy.summary.op_s for name, policy in result.policies.items()}
    largest = {op: max(by.get(op, 0.0) for by in op_s.values()) for by in op_s.values() for op in by}
    ops = sorted((op for op in largest if largest[op] > 0), key=lambda op: (-largest[op], op))
    longest = max((sum(by.values()) for by in op_s.values()), default=0.0)
    left = np.zeros(len(names))
    for i, op in enumerate(ops):
        width = np.array([op_s[name].get(op, 0.0) for name in names])
        hatch = "//" if i >= len(OP_COLOURS) else None
        colour = OP_COLOURS[i % len(OP_COLOURS)]
        axis.barh(range(len(names)), width, left=left, color=colour, label=_literal(op), hatch=hatch, edgecolor="white")
        for row, name in enumerate(names):
            if width[row] > 0.06 * longest:
                text = percent(width[row], sum(op_s[name].values())) + " %"
                axis.text(
                    left[row] + width[row] / 2, row, text, ha="center", va="center", fontsize=8, color=_ink(colour)
                )
        left += width
    axis.set_yticks(range(len(names)), [_literal(name) for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("device time, seconds (labels: share of the policy's own)")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    _finish(figure, axis, result.title)
    return figure


def gain_bars(result: Result) -> Figure | None:
    """A panel for each gain, a bar for each rival of the baseline; above 1 is better."""
    table = {name: row for name, row in gains_over_baseline(result).items() if name != result.baseline}
    if result.baseline is None or not table:
        return None
    names, styles = list(table), _styles(result)
    figure, axes = _figure(13, 2.4 + 0.4 * len(names), 1, len(GAIN_LABELS), sharey=True)
    base_overloaded = is_overloaded(result.policies[result.baseline].summary)
    for axis, (key, label) in zip(axes, GAIN_LABELS.items(), strict=True):
        values = np.array([table[name][key] for name in names])
        finite = np.where(np.isfinite(values), values, 0.0)
        axis.barh(range(len(names)), finite, color=[styles[name]["color"] for name in names], height=0.65)
        for row, value in enumerate(values):
            axis.text(finite[row], row, f" {factor(float(value))}", va="center", fontsize=9)
        axis.axvline(1, color=BASELINE_COLOUR, linewidth=1)
        axis.set_xlim(0, max(1.0, float(finite.max())) * 1.35)
        doubtful = key in ("ttft_x", "e2e_x") and (
            base_overloaded or any(is_overloaded(result.policies[name].summary) for name in names)
        )
        axis.set_title(label + (" *" if doubtful else ""), loc="left", fontweight="bold")
        axis.set_yticks(range(len(names)), [_literal(name) for name in names])
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        if doubtful:
            axis.set_xlabel("* overloaded: grows\nwith the run's length", fontsize=8, color="#666666")
    axes[0].invert_yaxis()
    title = f"{result.title}: gain over {result.baseline}, above 1 is better"
    figure.suptitle(_literal(title), x=0.01, ha="left", fontsize=11)
    return figure


PLOTS: dict[str, Callable[[Result], Figure | None]] = {
    "latency_cdf.png": latency_cdf,
    "over_time.png": over_time,
    "time_by_op.png": time_by_op,
    "gains.png": gain_bars,
}


def _figure(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Figure, list[Axes]]:
    """Without pyplot: no global state, no display, the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).ravel())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _styles(result: Result) -> dict[str, dict[str, Any]]:
    """Black for the baseline; colours for the others, then the same colours with dashes."""
    rivals = [name for name in result.policies if name != result.baseline]
    styles = {
        name: {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i // len(PALETTE) % len(DASHES)]}
        for i, name in enumerate(rivals)
    }
    if result.baseline is not None:
        styles[result.baseline] = {"color": BASELINE_COLOUR, "linestyle": "-"}
    return styles


def _finish(figure: Figure, axis: Axes, title: str) -> None:
    figure.suptitle(_literal(title), x=0.01, ha="left", fontsize=11)
    handles, labels = axis.get_legend_handles_labels()
    columns = min(max(len(labels), 1), MAX_LEGEND_COLUMNS)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _literal(text: str) -> str:
    """Dollar signs as such, not as mathematics."""
    return text.replace("$", r"\$")


def _ink(colour: str) -> str:
    """Black or white, whichever reads better on the colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"
