"""A plan's answer in sentences, and what every plan leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsim.planning.result import Option
from kvsim.planning.spec import PlanSpec

BINDS = {
    "compute": "arithmetic binds", "hbm_bandwidth": "HBM bandwidth binds", "kv_capacity": "KV memory binds", "host": "the host binds",
    "interconnect": "the links between GPUs bind", "latency": "the latency target binds, no resource is used up",
}  # fmt: skip


def sentences(options: Sequence[Option], spec: PlanSpec, slo: Mapping[str, float], draws: int) -> tuple[str, ...]:
    """The best option, what it is better than, how sure that is, and how many are out."""
    usable = [option for option in options if option.reason is None]
    limits = ", ".join(f"{key} <= {limit:g}" for key, limit in slo.items())
    if not usable:
        return (f"No candidate can bear {spec.target_rate_per_s:g} requests/s within {limits}: each has its reason.",)
    best = usable[0]
    assert best.rate_per_s is not None and best.binds is not None
    found = [
        f"{spec.target_rate_per_s:g} requests/s within {limits} take {counted(best.replicas, 'replica')} of {best.name}: "
        f"{counted(best.num_gpus, 'GPU')}{_money(best, spec)}; headroom {best.headroom_frac:.0%}.",
        f"One replica of it bears {best.rate_per_s:.3g} requests/s: {BINDS[best.binds]}.",
    ]
    whole = next((option for option in usable if option.policy_description == "full"), None)
    if whole is not None and whole is not best:
        found.append(f"With the whole cache the best is {whole.name}: {counted(whole.num_gpus, 'GPU')}{_money(whole, spec)}.")
    if draws and best.robust_rate_per_s is not None and best.share_met_frac is not None:
        found.append(
            f"Under drawn calibration errors {best.share_met_frac:.0%} of {draws} re-simulations meet the SLO at that rate; 95 % do at "
            f"{best.robust_rate_per_s:.3g} requests/s, which takes {counted(best.robust_replicas, 'replica')}."
        )
    out = len(options) - len(usable)
    if out:
        found.append(f"{out} of {counted(len(options), 'candidate')} cannot be deployed: each has its reason.")
    return tuple(found)


def counted(number: int | None, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _money(option: Option, spec: PlanSpec) -> str:
    if option.cost_per_hour is None or option.cost_per_million_output_tokens is None:
        return ""
    return (
        f", {option.cost_per_hour:,.2f} {spec.currency} an hour, "
        f"{option.cost_per_million_output_tokens:,.3g} {spec.currency} per million output tokens"
    )


def general_notes(spec: PlanSpec) -> tuple[str, ...]:
    """What no plan models."""
    notes = [
        "each replica is simulated alone with its share of the load: a router that balances badly, replicas that fail or restart and "
        "traffic that grows beyond the target are not modelled; headroom has to cover them",
        "watts are board power of all GPUs at their limit, an upper bound; hosts, switches and cooling are not in them",
    ]
    if spec.currency is not None:
        notes.append("cost is GPUs times your price, for whole replicas and every hour, whether busy or not")
    return tuple(notes)
