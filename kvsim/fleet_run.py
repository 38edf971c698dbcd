"""One policy on a fleet: its replicas made, run behind their router, and their logs put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import NamedTuple, TypeVar

import simpy

from kvsim.fleet import Fleet, Member
from kvsim.fleet_log import ReplicaRun, merged, replica_results
from kvsim.metrics import summarize
from kvsim.planning.result import PublishedQuality
from kvsim.quality import nearest
from kvsim.recording import RunLog
from kvsim.requests import OpenLoop, RequestSource, Split
from kvsim.result import PolicyResult
from kvsim.scenario import Scenario
from kvsim.schema import first_sentence
from kvsim.serving import Parts, basis, check_number, kv_bytes_per_sequence, run, side_note
from kvsim.simulation import Progress, Replica

R = TypeVar("R", bound=Replica)


class PartsOf(NamedTuple):
    """A group's replicas and what each of them is made of. name: "" where all of the fleet are alike."""

    name: str
    replicas: int
    weight: float
    parts: Parts


def run_fleet(
    scenario: Scenario, name: str, source: RequestSource, groups: Sequence[PartsOf], progress: Progress | None
) -> PolicyResult:
    """Raises InputError for requests that some replica cannot serve, and for traffic that leaves nothing to measure."""
    groups_of = [group for group in groups for _ in range(group.replicas)]
    for group in groups:
        group.parts.check.of = f" ({group.name})" if group.name else ""
    env = simpy.Environment(initial_time=0)
    replicas = serve(env, scenario, source, groups_of, None if progress is None else _Total(progress))
    run(env, scenario)
    check_number(scenario, sum(replica.num_finished for replica in replicas))
    unit_bytes = gcd(*(group.parts.plan.unit_bytes for group in groups))
    runs = [
        ReplicaRun(
            group.name, group.parts.plan.composition.describe(), replica.log, tuple(group.parts.ledger.lines),
            group.parts.ledger.pool_units, group.parts.plan.unit_bytes,
        )
        for replica, group in zip(replicas, groups_of, strict=True)
    ]  # fmt: skip
    logs, factors = [one.log for one in runs], [one.unit_bytes // unit_bytes for one in runs]
    log, workload = merged(logs, factors), scenario.workload
    pool_units = sum(one.pool_units * factor for one, factor in zip(runs, factors, strict=True))
    on_gpu = sum(
        one.pool_units * factor * group.parts.deployment.engine.cache_fracs[0]
        for one, factor, group in zip(runs, factors, groups_of, strict=True)
    )
    return PolicyResult(
        name=name, description=" / ".join(dict.fromkeys(one.description for one in runs)),
        summary=summarize(log, warmup_requests=workload.warmup_requests, slo=scenario.slo, replicas=logs),
        log=log, ledger=runs[0].ledger,
        pool_units=pool_units, unit_bytes=unit_bytes, pool_gpu_frac=on_gpu / pool_units,
        kv_bytes_per_sequence=kv_bytes_per_sequence(log, unit_bytes), basis=basis(replicas),
        notes=tuple(dict.fromkeys(_notes(scenario, source, groups, groups_of, replicas))),
        quality=_quality(groups, log), replicas=replica_results(runs, workload.warmup_requests),
    )  # fmt: skip


def serve(
    env: simpy.Environment, scenario: Scenario, source: RequestSource, groups_of: Sequence[PartsOf], total: _Total | None = None
) -> list[Replica]:
    """Replicas whose processes wait in `env` to serve the source; groups_of: the group of each."""
    weights = [group.weight for group in groups_of]
    if scenario.router.looks or not isinstance(source, OpenLoop):
        members = [_made(Member, env, source, group, total) for group in groups_of]
        for number, member in enumerate(members):
            member.number = number
        env.process(Fleet(env, source, members, scenario.router.chooser(weights, members)).serve())
        return list(members)
    # What a replica will be sent is known beforehand, so each serves its part of the traffic as if it were alone.
    lanes = Split(source, scenario.router.chooser(weights), len(weights)).lanes
    replicas = [_made(Replica, env, lane, group, total) for lane, group in zip(lanes, groups_of, strict=True)]
    for replica in replicas:
        env.process(replica.serve())
    return replicas


def _made(kind: type[R], env: simpy.Environment, source: RequestSource, group: PartsOf, total: _Total | None) -> R:
    parts = group.parts
    contended = None if parts.contended is None else parts.contended.twin()
    tell = None if total is None else total.part()
    return kind(env, source, parts.scheduler(), parts.costs.twin(), contended, parts.check, tell)


def _quality(groups: Sequence[PartsOf], log: RunLog) -> PublishedQuality | None:
    """None where groups run unlike policies: no paper has measured such a mixture."""
    first, *others = (group.parts.plan.composition for group in groups)
    if any(other.policies != first.policies for other in others):
        return None
    return nearest(first.policies, groups[0].parts.deployment.model, float(log.request_columns()["prompt_tokens"].mean()))


def _notes(
    scenario: Scenario, source: RequestSource, groups: Sequence[PartsOf], groups_of: Sequence[PartsOf],
    replicas: Sequence[Replica],
) -> list[str]:  # fmt: skip
    notes = []
    for group in groups:
        side_ps = sum(replica.log.side_ps for replica, own in zip(replicas, groups_of, strict=True) if own is group)
        of = f"{group.name}: " if group.name else ""
        notes += [of + note for note in (*group.parts.notes, *side_note(side_ps, group.parts.deployment.engine))]
    notes += source.notes()
    notes.append(f"{len(replicas)} replicas; router {scenario.router.kind}: {first_sentence(type(scenario.router))}")
    return notes


class _Total:
    """Progress of several replicas, told as one number."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell, self.done = tell, 0

    def part(self) -> Callable[[int], None]:
        last = 0

        def tell(done: int) -> None:
            nonlocal last
            self.done += done - last
            last = done
            self.tell(self.done)

        return tell
