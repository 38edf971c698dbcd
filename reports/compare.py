"""Policies against the baseline, and what all of a result's numbers rest on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvsim.metrics import gains
from kvsim.result import PolicyResult, Result

GAIN_LABELS = {
    "output_tokens_x": "output tok/s",
    "ttft_x": "TTFT",
    "tpot_x": "TPOT",
    "e2e_x": "E2E",
    "kv_per_sequence_x": "KV/seq",
}


def gains_over_baseline(result: Result) -> dict[str, dict[str, float]]:
    """Factors by policy, keys of GAIN_LABELS, above 1 where the policy is better; empty without a baseline."""
    if result.baseline is None:
        return {}
    base = result.policies[result.baseline]
    table = {}
    for name, policy in result.policies.items():
        found = gains(policy.summary, base.summary)
        kv_x = (
            base.kv_bytes_per_sequence / policy.kv_bytes_per_sequence if policy.kv_bytes_per_sequence else float("nan")
        )
        table[name] = {
            "output_tokens_x": found.output_tokens_x,
            "ttft_x": found.ttft_x,
            "tpot_x": found.tpot_x,
            "e2e_x": found.e2e_x,
            "kv_per_sequence_x": kv_x,
        }
    return table


def op_shares(policy: PolicyResult) -> Mapping[str, float]:
    """Share of device time by Op kind, largest first."""
    total_s = sum(policy.summary.op_s.values())
    ranked = sorted(policy.summary.op_s.items(), key=lambda item: (-item[1], item[0]))
    return {op: op_s / total_s for op, op_s in ranked} if total_s else {}


@dataclass(frozen=True, slots=True)
class BasisRow:
    """One Op's basis, merged over the policies that share it; share_frac from the least to the largest of them."""

    op: str
    source: str
    bias_low: float
    bias_high: float
    least_share_frac: float
    largest_share_frac: float
    policies: tuple[str, ...]


def merged_basis(result: Result) -> list[BasisRow]:
    """Largest share first."""
    shares: dict[tuple[str, str, float, float], dict[str, float]] = {}
    for name, policy in result.policies.items():
        for basis in policy.basis:
            key = (basis.op, basis.source, basis.bias_low, basis.bias_high)
            by_policy = shares.setdefault(key, {})
            by_policy[name] = by_policy.get(name, 0.0) + basis.share_frac
    rows = [BasisRow(*key, min(by.values()), max(by.values()), tuple(by)) for key, by in shares.items()]
    return sorted(rows, key=lambda row: (-row.largest_share_frac, row.op, row.source))


def shares_by_kind_of_source(policy: PolicyResult) -> dict[str, float]:
    """How much of a policy's simulated time is "measured", "fitted", ...: the first word of each source."""
    shares: dict[str, float] = {}
    for basis in policy.basis:
        kind = basis.source.split()[0].strip(":,;") if basis.source else "unknown"
        shares[kind] = shares.get(kind, 0.0) + basis.share_frac
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def merged_notes(result: Result) -> list[tuple[str, tuple[str, ...]]]:
    """Each note once, with the policies it is about."""
    notes: dict[str, list[str]] = {}
    for name, policy in result.policies.items():
        for note in dict.fromkeys(policy.notes):
            notes.setdefault(note, []).append(name)
    return [(note, tuple(names)) for note, names in notes.items()]
