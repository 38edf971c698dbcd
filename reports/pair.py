"""Two runs side by side: which policies are in both, and what changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvsim.reports.saved import SavedRun
from kvsim.reports.verdict import warnings
from kvsim.result import PolicyResult


class Metric(NamedTuple):
    """kind: "s", "bytes" or the unit to show."""

    name: str
    label: str
    kind: str
    pick: Callable[[PolicyResult], float | None]


def _latency(metric: str, statistic: str) -> Metric:
    label = f"{metric.upper()} {statistic}"
    return Metric(f"{metric}_{statistic}_s", label, "s", lambda p: getattr(getattr(p.summary, metric), f"{statistic}_s"))


GROUPS: dict[str, tuple[Metric, ...]] = {
    "Means": tuple(_latency(metric, "mean") for metric in ("ttft", "tpot", "e2e")),
    "Medians": tuple(_latency(metric, "p50") for metric in ("ttft", "tpot", "e2e")),
    "99th percentiles": tuple(_latency(metric, "p99") for metric in ("ttft", "tpot", "e2e")),
    "Throughput": (
        Metric("output_tokens_per_s", "output", "tokens/s", lambda p: p.summary.output_tokens_per_s),
        Metric("requests_per_s", "served", "requests/s", lambda p: p.summary.requests_per_s),
        Metric("goodput_requests_per_s", "goodput", "requests/s", lambda p: p.summary.goodput_requests_per_s),
    ),
    "Batch and memory": (
        Metric("mean_decode_batch_sequences", "batch, mean", "", lambda p: p.summary.mean_decode_batch_sequences),
        Metric("kv_bytes_per_sequence", "KV per sequence", "bytes", lambda p: p.kv_bytes_per_sequence),
        Metric("num_preemptions", "preemptions", "", lambda p: float(p.summary.num_preemptions)),
    ),
}
LED_BY = ("output_tokens_per_s", "ttft_mean_s", "tpot_mean_s", "e2e_mean_s")


class Match(NamedTuple):
    """One policy in both runs, or in one of them."""

    name: str
    a: PolicyResult | None
    b: PolicyResult | None


@dataclass(frozen=True)
class Pair:
    """label_a, label_b: the names of the folders."""

    a: SavedRun
    b: SavedRun
    label_a: str
    label_b: str

    @staticmethod
    def of(a: SavedRun, b: SavedRun, folder_a: str, folder_b: str) -> Pair:
        return Pair(a, b, Path(folder_a).name or folder_a, Path(folder_b).name or folder_b)

    def matches(self) -> list[Match]:
        """By name; two runs of one policy each are of that policy, whatever it is called. Those in both first."""
        a, b = self.a.result.policies, self.b.result.policies
        if len(a) == len(b) == 1 and not a.keys() & b.keys():
            ((name_a, policy_a),), ((name_b, policy_b),) = a.items(), b.items()
            return [Match(f"{name_a} / {name_b}", policy_a, policy_b)]
        names = [*(name for name in a if name in b), *(name for name in a if name not in b), *(name for name in b if name not in a)]
        return [Match(name, a.get(name), b.get(name)) for name in names]

    def both(self) -> list[Match]:
        return [match for match in self.matches() if match.a is not None and match.b is not None]


def change_frac(match: Match, metric: Metric) -> float | None:
    """From A to B, as a share of A; None where either has no such number, or A's is zero."""
    before, after = values(match, metric)
    if before is None or after is None or not before or before != before or after != after:
        return None
    return after / before - 1


def metric_of(name: str) -> Metric:
    return next(metric for group in GROUPS.values() for metric in group if metric.name == name)


def values(match: Match, metric: Metric) -> tuple[float | None, float | None]:
    a, b = (None if side is None else metric.pick(side) for side in (match.a, match.b))
    return a, b


def signed_percent(value_frac: float) -> str:
    return f"{100 * value_frac:+,.{0 if abs(value_frac) >= 10 else 1}f}"


def verdict(pair: Pair) -> list[str]:
    """What changes from A to B, in a sentence or two."""
    both = pair.both()
    if not both:
        return ["The runs have no policy in common, so there is nothing to set side by side."]
    first = next((match for match in both if match.name == pair.a.result.baseline), both[0])
    parts = [
        f"{'output tokens/s' if name == 'output_tokens_per_s' else metric_of(name).label} {signed_percent(change)} %"
        for name in LED_BY
        if (change := change_frac(first, metric_of(name))) is not None
    ]
    lines = [f"From A ({pair.label_a}) to B ({pair.label_b}), {first.name}: {', '.join(parts)}."]
    e2e = metric_of("e2e_mean_s")
    changes = {match.name: change for match in both if (change := change_frac(match, e2e)) is not None}
    if len(changes) > 1:
        most = max(changes, key=lambda name: abs(changes[name]))
        lines.append(f"Of {len(changes)} policies in both, mean E2E changes most for {most}: {signed_percent(changes[most])} %.")
    return lines


def doubts(pair: Pair) -> list[str]:
    """Reasons not to compare, and the runs' own warnings."""
    lines = []
    workloads = [run.result.scenario.get("workload") for run in (pair.a, pair.b)]
    if workloads[0] != workloads[1]:
        lines.append("The runs served different requests (see workload below): their latencies do not compare one to one.")
    versions = [run.result.versions.get("kvsim") for run in (pair.a, pair.b)]
    if versions[0] != versions[1]:
        lines.append(f"The runs were made by different versions of kvsim ({versions[0]} and {versions[1]}).")
    for letter, run in (("A", pair.a), ("B", pair.b)):
        lines += [f"{letter}: {line}" for line in warnings(run.result)]
    return lines
