"""Which point next: first every kind and the corners of every grid, then where knowing more is worth most a second.

A group's points share a table. Once its corners are known, what is left of it is ranked by

    gain = weight x (expected error there) x (distance to the nearest measured point) / expected seconds,

where the expected error is that of the measured neighbours, each predicted from the others (left out one by one) as physics
times an interpolated correction, which is what the fit does, only cheaper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, log

import numpy as np

from kvsim.calibrate.device.points import Point
from kvsim.datasheet import DatasheetProfile
from kvsim.hardware import Gpu

CORNERS_PER_AXIS, MOST_CORNERS = 2, 8
LEAST_ERROR = 0.03
"""Expected error that no neighbour can talk away: timing itself is no better."""
SAMPLES_PER_POINT = 12
"""Warm-up, choice of the sample, and the samples themselves, in calls; corrected by what points really take."""
MOST_OF_BUDGET = 0.04
"""A point expected to take more of the budget than this is left out."""
GIVE_UP = 3
"""Failures of a group without a success, after which the rest of it is left."""
UNKNOWN_ERROR = 0.5
"""Of a group with fewer than three points: physics alone may be that far off."""
RATE_MEMORY = 0.3
"""Weight of the newest point in a group's ratio of real to expected time."""


@dataclass
class Group:
    """Points of one table. places: [points, axes] scaled to 0..1; log_ratios: log(measured / physics), NaN where unknown.

    nearest: distance of each point to the nearest measured one, which is the owner-th of `known`.
    """

    name: str
    points: list[Point]
    places: np.ndarray
    physics_s: np.ndarray
    corners: list[int]
    slowness: float = 1.0  # real over expected time of its points
    failures: int = 0
    known: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.points)
        self.index = {point: i for i, point in enumerate(self.points)}
        self.weights = np.array([point.weight for point in self.points])
        self.todo = np.ones(count, bool)
        self.log_ratios = np.full(count, np.nan)
        self.nearest, self.owner = np.ones(count), np.zeros(count, int)
        self.gains = self.weights.copy()
        self.errors = np.empty(0)

    def learn(self, index: int, log_ratio: float) -> None:
        """Works out again what each point that is left would tell."""
        self.log_ratios[index] = log_ratio
        if index not in self.known:
            distances = np.linalg.norm(self.places - self.places[index], axis=1)
            closer = distances < self.nearest if self.known else np.ones(len(self.points), bool)
            self.nearest[closer], self.owner[closer] = distances[closer], len(self.known)
            self.known.append(index)
        self.errors = np.abs(self._left_out())
        self.gains = self.weights * (LEAST_ERROR + self.errors[self.owner]) * self.nearest

    def _left_out(self) -> np.ndarray:
        """log(measured / predicted) of each known point by the others."""
        if len(self.known) < 3:
            return np.full(len(self.known), UNKNOWN_ERROR)
        places, ratios = self.places[self.known], self.log_ratios[self.known]
        nearness = 1.0 / (np.linalg.norm(places[:, None] - places[None], axis=2) + 1e-3) ** 2
        np.fill_diagonal(nearness, 0.0)
        predicted: np.ndarray = (nearness @ ratios) / nearness.sum(1)
        return ratios - predicted

    def call_s(self) -> np.ndarray:
        """Expected seconds of one call of every point: physics times what has been seen so far."""
        return self.physics_s * (exp(float(np.median(self.log_ratios[self.known]))) if self.known else 1.0)

    @property
    def error(self) -> float:
        """Median left-out error of the log ratio; NaN with fewer than three points."""
        return float(np.median(self.errors)) if len(self.known) >= 3 else float("nan")


class Planner:
    """Chooses points one at a time; it is told what became of each.

    setup_s: what a point takes beside its calls (inputs beyond the cache are made and copied).
    """

    def __init__(self, points: Iterable[Point], gpu: Gpu, setup_s: float, budget_s: float) -> None:
        physics = DatasheetProfile(gpu)
        by_name: dict[str, list[Point]] = {}
        for point in points:
            by_name.setdefault(point.group(gpu.num_sms), []).append(point)
        self.setup_s, self.budget_s, self.num_sms = setup_s, budget_s, gpu.num_sms
        self.groups = {name: _group(name, found, gpu, physics) for name, found in by_name.items()}

    def seen(self, point: Point, seconds: float | None, took_s: float = 0.0) -> None:
        """seconds: what was measured; None: it failed or was skipped. took_s: of the wall clock; 0 where that is not known."""
        group = self.groups.get(point.group(self.num_sms))
        if group is None or point not in group.index:
            return
        index = group.index[point]
        if took_s > 0.0:
            ratio = took_s / (self.expected_s(group)[index] / group.slowness)
            step = RATE_MEMORY if group.known else 1.0
            group.slowness = exp((1 - step) * log(group.slowness) + step * log(min(max(ratio, 0.02), 50.0)))
        group.todo[index] = False
        if seconds is not None:
            group.learn(index, log(seconds / group.physics_s[index]))
            return
        group.failures += 1
        if group.failures >= GIVE_UP and not group.known:
            group.todo[:] = False

    def expected_s(self, group: Group) -> np.ndarray:
        """Of the wall clock, for each point of a group."""
        return group.slowness * (self.setup_s + SAMPLES_PER_POINT * group.call_s())

    def next(self, left_s: float) -> tuple[Point, float] | None:
        """The next point that fits in what is left of the budget, and the seconds it should take."""
        most_s = min(left_s, max(MOST_OF_BUDGET * self.budget_s, 2.0 * self.setup_s))
        return self._next_corner(most_s) or self._next_gain(most_s)

    def _next_corner(self, most_s: float) -> tuple[Point, float] | None:
        """The next corner of the group that has had the fewest turns, cheapest first."""
        best: tuple[int, float, Point] | None = None
        for group in self.groups.values():
            costs = self.expected_s(group)
            still = [i for i in group.corners if group.todo[i] and costs[i] <= most_s]
            if still:
                turns = len(group.corners) - sum(group.todo[i] for i in group.corners)
                rank = (turns, float(costs[still[0]]), group.points[still[0]])
                if best is None or rank[:2] < best[:2]:
                    best = rank
        return None if best is None else (best[2], best[1])

    def _next_gain(self, most_s: float) -> tuple[Point, float] | None:
        best: tuple[float, Point, float] | None = None
        for group in self.groups.values():
            if not group.todo.any():
                continue
            costs = self.expected_s(group)
            worth = np.where(group.todo & (costs <= most_s), group.gains / costs, -1.0)
            index = int(np.argmax(worth))
            if worth[index] >= 0.0 and (best is None or worth[index] > best[0]):
                best = (float(worth[index]), group.points[index], float(costs[index]))
        return None if best is None else best[1:]

    def left(self) -> int:
        """Points that nobody has measured."""
        return int(sum(group.todo.sum() for group in self.groups.values()))


def _group(name: str, points: Sequence[Point], gpu: Gpu, physics: DatasheetProfile) -> Group:
    places = np.array([point.coordinates(gpu.num_sms) for point in points], dtype=float).reshape(len(points), -1)
    width = places.max(0) - places.min(0)
    places = (places - places.min(0)) / np.where(width > 0, width, 1.0)
    seconds = np.array([physics.answer(point.op).seconds for point in points])
    count = min(MOST_CORNERS, CORNERS_PER_AXIS * int((width > 0).sum()) + 2, len(points))
    return Group(name, list(points), places, seconds, corners(places, seconds, count))


def corners(places: np.ndarray, seconds: np.ndarray, count: int) -> list[int]:
    """Points far from each other, from the one nearest the middle on; of equally far ones the cheapest."""
    chosen = [int(np.argmin(np.linalg.norm(places - np.median(places, axis=0), axis=1)))]
    nearest = np.linalg.norm(places - places[chosen[0]], axis=1)
    while len(chosen) < count and nearest.max() > 0.0:
        far = np.flatnonzero(nearest >= 0.9 * nearest.max())
        index = int(far[np.argmin(seconds[far])])
        chosen.append(index)
        nearest = np.minimum(nearest, np.linalg.norm(places - places[index], axis=1))
    return chosen
