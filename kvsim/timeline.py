"""The rows of a run laid end to end in time: what was running, waiting and held, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from kvsim.recording import RunLog


@dataclass(frozen=True, slots=True)
class Timeline:
    """Runs of steps in order of time, int64 arrays of shape [runs]; rows that share a start are one run.

    Between end_ps and the next start_ps the engine is idle: nothing runs, waits or holds memory.
    """

    start_ps: np.ndarray
    end_ps: np.ndarray
    num_steps: np.ndarray
    num_decodes: np.ndarray
    prefill_tokens: np.ndarray
    """Prompt tokens computed over the whole run."""
    num_first_tokens: np.ndarray
    held_units: np.ndarray
    """At the end of the run."""
    num_waiting: np.ndarray
    """At its start."""

    def overlap_ps(self, from_ps: int, until_ps: int) -> np.ndarray:
        """Time that each run spends inside [from_ps, until_ps]."""
        return np.clip(self.end_ps, from_ps, until_ps) - np.clip(self.start_ps, from_ps, until_ps)

    def binned(self, values: np.ndarray, edges_ps: np.ndarray) -> np.ndarray:
        """Time average of a value in each bin between edges_ps (sorted); idle time counts as zero."""
        edge = np.concatenate([[0.0], np.cumsum((self.end_ps - self.start_ps) * values.astype(float))])
        times = np.stack([self.start_ps, self.end_ps], 1).ravel()
        integral = np.stack([edge[:-1], edge[1:]], 1).ravel()
        area = np.interp(edges_ps, times, integral) if len(times) else np.zeros(len(edges_ps))
        return np.diff(area) / np.maximum(np.diff(edges_ps), 1)


def joined(runs: Sequence[Timeline]) -> Timeline:
    """Those of several replicas, one after the other: no longer in order of time, which sums and averages do not need."""
    if len(runs) == 1:
        return runs[0]
    columns = (np.concatenate([getattr(each, field.name) for each in runs]) for field in fields(Timeline))
    return Timeline(*columns)


def most_at_once(runs: Timeline, values: np.ndarray, from_ps: int, until_ps: int) -> int:
    """The greatest sum, at any instant inside [from_ps, until_ps), of the values of the runs under way."""
    start, end = np.clip(runs.start_ps, from_ps, until_ps), np.clip(runs.end_ps, from_ps, until_ps)
    times, changes = np.concatenate([end, start]), np.concatenate([-values, values])
    order = np.argsort(times, kind="stable")  # what ends in an instant goes before what begins
    return int(np.cumsum(changes[order]).max(initial=0))


def timeline(log: RunLog) -> Timeline:
    """Of one replica: ask for each one's where there are several."""
    assert log.num_replicas == 1
    steps = log.step_columns()
    start, num = steps["start_ps"], steps["num_steps"]
    duration = num * steps["first_step_ps"] + steps["step_growth_ps"] * (num * (num - 1) // 2)
    heads = np.flatnonzero(np.diff(start, prepend=start[:1] - 1)) if len(start) else np.empty(0, np.intp)

    def total(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, heads) if len(heads) else np.empty(0, np.int64)

    return Timeline(
        start_ps=start[heads],
        end_ps=start[heads] + total(duration),
        num_steps=total(num),
        num_decodes=steps["num_decodes"][heads],
        prefill_tokens=total(steps["prefill_tokens"] * num),
        num_first_tokens=total(steps["num_first_tokens"]),
        held_units=steps["held_units"][np.append(heads[1:], len(start)) - 1] if len(heads) else steps["held_units"],
        num_waiting=steps["num_waiting"][heads],
    )
