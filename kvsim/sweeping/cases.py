"""From a sweep to its cases, in order, each with an id that is the same wherever and whenever it is simulated.

A **point** is one combination of values; a **case** is one policy at one point, and a row of the result. Cases, not points, are
what is simulated: one policy that fails takes no other with it, a sweep of few points and many policies keeps all cores busy, and a
policy that the varied fields do not touch (`full` beside another policy's budget) is simulated once for all points. Gains over the
baseline are ratios of rows, so they need no second run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvsim.api import build_plan, deploy
from kvsim.errors import InputError
from kvsim.scenario import override, parse_scenario
from kvsim.sweeping.spec import MAX_CASES, Axis, Range, Sweep

ID_DIGITS = 16
"""Hexadecimal ones: among MAX_CASES cases two share an id once in four billion sweeps."""


class Case(NamedTuple):
    """A row of the result. values: of the varied fields, in the sweep's order. error: why it is no scenario; "" where it is one."""

    number: int
    point: int
    id: str
    policy: str
    values: tuple[Any, ...]
    error: str


class Work(NamedTuple):
    """What a worker needs to simulate a case: plain data, small to send."""

    id: str
    scenario: dict[str, Any]
    """With one policy."""
    base_dir: str


class Plan:
    """A sweep's cases, checked as scenarios. Raises InputError where not one of them is valid, and for more than MAX_CASES."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.points = list(points(sweep))
        self.cases: list[Case] = []
        first_error: InputError | None = None
        ids: dict[str, str | InputError] = {}
        _file_digest.cache_clear()  # files may have changed since the last sweep of this process
        for point in range(len(self.points)):
            names, data, wrong = self._scenarios(point)
            if len(self.cases) + (len(self.points) - point) * len(names) > MAX_CASES:
                raise _too_many(f"{len(self.points):,} points with {len(names)} policies")
            for name, scenario in zip(names, data, strict=True):
                key = _canonical(scenario)
                if wrong is None and key not in ids:
                    ids[key] = _identify(scenario, sweep.base_dir)
                found = wrong or ids[key]
                if isinstance(found, InputError):
                    first_error = first_error or found
                    error, case_id = str(found), _digest(f"{found} {key}")
                else:
                    error, case_id = "", found
                self.cases.append(Case(len(self.cases), point, case_id, name, self.points[point], error))
        if first_error is not None and all(case.error for case in self.cases):
            raise first_error

    def work(self, done: Mapping[str, Any]) -> Iterator[Work]:
        """Every valid case that is not done, once, in order; made as it is asked for."""
        asked = set(done)
        for case in self.cases:
            if not case.error and case.id not in asked:
                asked.add(case.id)
                yield self.work_of(case)

    def work_of(self, case: Case) -> Work:
        names, data, _ = self._scenarios(case.point)
        return Work(case.id, data[names.index(case.policy)], str(self.sweep.base_dir))

    def _scenarios(self, point: int) -> tuple[list[str], list[dict[str, Any]], InputError | None]:
        """Of one point: names of its policies, a scenario with each of them alone, and why none of these can be made."""
        data, wrong = deepcopy(dict(self.sweep.scenario)), None
        try:
            for field, value in zip(self.sweep.fields, self.points[point], strict=True):
                override(data, field, deepcopy(value), "vary")
        except InputError as error:
            wrong = error
        policies = data.get("policies")
        if not isinstance(policies, dict) or not policies:
            return [""], [data], wrong
        return [str(name) for name in policies], [{**data, "policies": {name: policies[name]}} for name in policies], wrong


def check_deployable(plan: Plan) -> None:
    """Raises the first case's error where no case at all can be deployed: a model that there is not, say.

    Then the sweep file is wrong, and a table of nothing but errors would hide it.
    """
    first: InputError | None = None
    for work in plan.work({}):
        try:
            scenario = parse_scenario(work.scenario, Path(work.base_dir))
            deployment = deploy(scenario)
            for name, policies in scenario.policies.items():
                build_plan(deployment, policies, f"policies.{name}")
            return
        except InputError as error:
            first = first or error
    if first is not None:
        raise first


def points(sweep: Sweep) -> Iterator[tuple[Any, ...]]:
    """Values of all varied fields, one combination after the other; in cartesian order the last field varies fastest.

    Raises InputError for zipped fields of unlike lengths, and for more points than MAX_CASES.
    """
    if sweep.mode == "random":
        assert sweep.num_points is not None
        columns = [_draws(axis, sweep.num_points, sweep.seed) for axis in sweep.axes]
        combined: Iterator[Sequence[tuple[Any, ...]]] = zip(*columns, strict=True)
    else:
        lists = [axis.values for axis in sweep.axes if not isinstance(axis.values, Range)]
        assert len(lists) == len(sweep.axes)  # the sweep file was checked for it
        lengths = [len(values) for values in lists]
        if sweep.mode == "zipped":
            for axis, length in zip(sweep.axes, lengths, strict=True):
                if length != lengths[0]:
                    rule = f"has {length} values, but {sweep.axes[0].name} has {lengths[0]}; with mode: zipped all have as many"
                    raise InputError(f"vary.{axis.name}", None, rule, "add or remove values, or use mode: cartesian")
            combined = zip(*lists, strict=True)
        else:
            total = 1
            for length in lengths:
                total *= length
            if total > MAX_CASES:
                raise _too_many(f"{total:,} points")
            combined = product(*lists)
    for combination in combined:
        yield tuple(value for values in combination for value in values)


def _draws(axis: Axis, count: int, seed: int) -> list[tuple[Any, ...]]:
    """A stream for each field, drawn point by point: more points, or another field, leave the earlier draws as they were."""
    stream = int.from_bytes(hashlib.sha256(axis.name.encode()).digest()[:8])
    shares = np.random.default_rng([seed, stream]).random(count).tolist()
    if isinstance(axis.values, Range):
        return [(axis.values.drawn(share),) for share in shares]
    return [axis.values[int(share * len(axis.values))] for share in shares]


def _too_many(what: str) -> InputError:
    return InputError("vary", what, f"must make at most {MAX_CASES:,} cases (points x policies)", "use fewer values, or mode: random")


def _identify(data: Mapping[str, Any], base_dir: Path) -> str | InputError:
    """The id of a scenario with one policy: of its validated content and of the files that it names. Its title is left out."""
    try:
        scenario = parse_scenario(data, base_dir)
    except InputError as error:
        return error
    content = scenario.model_dump(mode="json", exclude={"name"})
    files = {text: digest for text in sorted(_texts(content)) if (digest := _file_digest(text, base_dir))}
    return _digest(_canonical({"scenario": content, "files": files}))


def _texts(value: Any) -> set[str]:
    """Every text in plain data."""
    if isinstance(value, str):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for item in items for text in _texts(item)}


@cache
def _file_digest(text: str, base_dir: Path) -> str:
    """Of the file's content, where the text is the path of one (a trace, a model's config); else "".

    A resumed sweep must not take the results of a trace that was another then.
    """
    for path in (base_dir / text, Path(text).expanduser()):
        try:
            if path.is_file():
                with path.open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError, RuntimeError):  # no path at all, or nobody's home folder
            continue
    return ""


def _canonical(data: Any) -> str:
    """str: of what YAML alone knows, such as dates."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS]
