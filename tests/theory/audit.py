"""Runs a scenario's policies while every move of a sequence is written down, for laws to be checked against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kvsim.api
from kvsim.api import build_plan, deploy, run_policy
from kvsim.batch import Sequence
from kvsim.recording import RunLog
from kvsim.result import PolicyResult
from kvsim.scenario import Scenario, parse_scenario
from kvsim.simulation import Replica

HERE = Path(__file__).parent
TINY = "./tiny.yaml"


@dataclass
class Account:
    """Prefill tokens that were computed, by admission: from where (cached) to where (end of prefill, or preemption)."""

    computed_tokens: int = 0
    num_finished: int = 0
    num_picks: int = 0
    admitted_at: dict[Sequence, int] = field(default_factory=dict)

    def close(self, sequence: Sequence, computed_tokens: int) -> None:
        self.computed_tokens += computed_tokens - self.admitted_at.pop(sequence)


class AuditedReplica(Replica):
    """A replica that recounts its blocks before every step."""

    account: Account

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.account = AuditedReplica.account = Account()
        scheduler = self.scheduler
        pick, admit, preempt_last, finish = scheduler.pick, scheduler.admit, scheduler.preempt_last, scheduler.finish

        def audited_pick() -> Any:
            self.account.num_picks += 1
            recount(self)
            return pick()

        def audited_admit(sequence: Sequence, cached_tokens: int) -> None:
            admit(sequence, cached_tokens)
            self.account.admitted_at[sequence] = cached_tokens

        def audited_preempt() -> Sequence:
            victim = next(reversed(scheduler.running))
            self.account.close(victim, victim.computed_tokens)
            return preempt_last()

        def audited_finish(sequence: Sequence) -> None:
            if not sequence.is_beam:
                self.account.close(sequence, sequence.prefill_tokens)
                self.account.num_finished += 1
            finish(sequence)

        scheduler.pick, scheduler.admit = audited_pick, audited_admit  # type: ignore[method-assign]
        scheduler.preempt_last, scheduler.finish = audited_preempt, audited_finish  # type: ignore[method-assign]


def recount(replica: Replica) -> None:
    """What the sequences hold, one by one, is what the pool says it has given away; nothing is owned twice."""
    scheduler, pool = replica.scheduler, replica.scheduler.pool
    assert set(scheduler.batch.members) <= set(scheduler.running)
    assert len(scheduler.batch.members) == scheduler.batch.size
    held, shared, keys = 0, 0, set()
    for sequence in scheduler.running:
        held += scheduler.batch.held(sequence) if sequence in scheduler.batch.members else sequence.held_units
        known = [key for key in sequence.shared_blocks if key is not None]  # None: a copy of its own
        shared += len(known)
        keys.update(known)
    assert all(sequence.held_units == 0 and not sequence.shared_blocks for sequence in scheduler.waiting)
    assert held - shared + len(keys) == pool.capacity_units - pool.free_units
    assert 0 <= pool.free_units <= pool.capacity_units


@contextmanager
def audits() -> Iterator[None]:
    plain = kvsim.api.Replica
    kvsim.api.Replica = AuditedReplica  # type: ignore[misc]
    try:
        yield
    finally:
        kvsim.api.Replica = plain  # type: ignore[misc]


def run(scenario: Scenario, audited: bool = False) -> PolicyResult:
    """The scenario's first policy, simulated."""
    deployment = deploy(scenario)
    name, policies = next(iter(scenario.policies.items()))
    plan = build_plan(deployment, policies, f"policies.{name}")
    if not audited:
        return run_policy(scenario, deployment, name, plan)
    with audits():
        return run_policy(scenario, deployment, name, plan)


def make(base_dir: Path = HERE, **fields: Any) -> Scenario:
    """A scenario of the tiny model on an L4 unless told otherwise; `policy` is one composition."""
    policy = fields.pop("policy", [])
    fields["engine"] = {"front_end_s": 0, **fields.get("engine", {"kind": "vllm_v1"})}
    return parse_scenario({"gpu": "l4", "model": str(HERE / TINY), "policies": {"policy": policy}, **fields}, base_dir)


# -- laws that hold on every run -----------------------------------------------------------------------------------------


def durations_ps(log: RunLog) -> np.ndarray:
    rows = log.step_columns()
    steps = rows["num_steps"]
    return steps * rows["first_step_ps"] + rows["step_growth_ps"] * (steps * (steps - 1) // 2)


def check_littles_law(log: RunLog, from_column: str = "arrival_ps", until_column: str = "finish_ps") -> None:
    """Integral over time of the number inside = sum of the times inside, both in whole picoseconds."""
    requests = log.request_columns()
    changes: dict[int, int] = defaultdict(int)
    for start, end in zip(requests[from_column].tolist(), requests[until_column].tolist(), strict=True):
        changes[start] += 1
        changes[end] -= 1
    integral = inside = last = 0
    for time in sorted(changes):
        integral += inside * (time - last)
        inside, last = inside + changes[time], time
        assert inside >= 0
    assert inside == 0
    assert integral == sum(requests[until_column].tolist()) - sum(requests[from_column].tolist())


def check_time(log: RunLog) -> None:
    """Steps follow one another, requests pass through their stations in order, and time by Op adds up to busy time."""
    rows, requests = log.step_columns(), log.request_columns()
    busy = durations_ps(log)
    starts, first_row = np.unique(rows["start_ps"], return_index=True)
    assert (np.diff(rows["start_ps"]) >= 0).all() and (rows["num_steps"] > 0).all() and (busy > 0).all()
    ends = starts + np.add.reduceat(busy, first_row)
    assert (ends[:-1] <= starts[1:]).all() and ends[-1] == log.end_ps == requests["finish_ps"].max()
    arrival, scheduled, first, finish = (requests[f"{name}_ps"] for name in ("arrival", "scheduled", "first_token", "finish"))
    assert (arrival <= scheduled).all() and (scheduled < first).all() and (first <= finish).all()
    assert (np.diff(finish) >= 0).all()  # rows are in order of completion
    assert set(scheduled.tolist()) <= set(starts.tolist())
    assert set(first.tolist()) <= set(ends.tolist())
    assert sum(log.op_ps.values()) == int(busy.sum())
    assert min(log.op_ps.values()) >= 0


def check_blocks(result: PolicyResult) -> None:
    log, held = result.log, result.log.step_columns()["held_units"]
    assert log.units_allocated == log.units_freed > 0
    assert held.min() >= 0 and held.max() <= log.peak_held_units <= result.pool_units


def check_tokens(log: RunLog, account: Account, num_requests: int) -> None:
    """vLLM's engines: every token is counted once, however often its sequence was preempted."""
    rows, requests = log.step_columns(), log.request_columns()
    steps = rows["num_steps"]
    assert sorted(requests["index"].tolist()) == list(range(num_requests)) and account.num_finished == num_requests
    assert ((rows["num_decodes"] + rows["num_first_tokens"]) * steps).sum() == requests["output_tokens"].sum()
    computed = int((rows["prefill_tokens"] * steps).sum())
    assert computed == account.computed_tokens and not account.admitted_at
    uncached = int((requests["prompt_tokens"] - requests["cached_tokens"]).sum())
    assert computed >= uncached if log.num_preemptions else computed == uncached
    # Each prefill ends with a token; a prefill more follows each preemption that loses a cache.
    prefills = int((rows["num_first_tokens"] * steps).sum())
    assert num_requests <= prefills <= num_requests + log.num_preemptions
    assert log.num_preemptions == requests["num_preemptions"].sum()
    assert (requests["cached_tokens"] >= 0).all() and (requests["cached_tokens"] < requests["prompt_tokens"]).all()


def check_gaps(log: RunLog) -> None:
    """vLLM's engines: the token gaps of all requests telescope to the time from first to last token."""
    rows, stalls, requests = log.step_columns(), log.stall_columns(), log.request_columns()
    in_steps = int((rows["num_decodes"] * durations_ps(log)).sum())
    stalled = int((stalls["extra_ps"] * stalls["num_sequences"]).sum())
    decoding = int((requests["finish_ps"] - requests["first_token_ps"]).sum())
    assert in_steps + stalled + sum(log.resumed_gaps_ps) == decoding
    num_gaps = int((rows["num_decodes"] * rows["num_steps"]).sum()) + len(log.resumed_gaps_ps)
    assert num_gaps == (requests["output_tokens"] - 1).sum()


def check_static_batches(log: RunLog, num_beams: int, num_requests: int) -> None:
    """The Hugging Face engine: a batch's members are padded alike, beam by beam, and leave together."""
    rows, requests = log.step_columns(), log.request_columns()
    assert sorted(requests["index"].tolist()) == list(range(num_requests))
    tokens = prompts = 0
    for scheduled in np.unique(requests["scheduled_ps"]):
        batch = requests["scheduled_ps"] == scheduled
        size = int(batch.sum()) * num_beams
        tokens += size * int(requests["output_tokens"][batch].max())
        prompts += size * int(requests["prompt_tokens"][batch].max())
        assert len(set(requests["finish_ps"][batch].tolist())) == len(set(requests["first_token_ps"][batch].tolist())) == 1
    assert ((rows["num_decodes"] + rows["num_first_tokens"]) * rows["num_steps"]).sum() == tokens
    assert (rows["prefill_tokens"] * rows["num_steps"]).sum() == prompts


def check_first_come_first_served(log: RunLog) -> None:
    requests = log.request_columns()
    order = np.argsort(requests["index"])
    assert (np.diff(requests["arrival_ps"][order]) >= 0).all()
    assert (np.diff(requests["scheduled_ps"][order]) >= 0).all()
