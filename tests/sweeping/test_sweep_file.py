"""Sweep files: ranges against closed forms, combinations against itertools, draws that stay as they were."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest
import sweeps
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import InputError
from kvsim.sweeping.cases import Plan
from kvsim.sweeping.cases import points as points_of
from kvsim.sweeping.spec import MAX_CASES, Range, load_sweep


def values(**fields: Any) -> list[float]:
    return Range.model_validate({"from": fields.pop("start"), **fields}).values()


def points(vary: dict[str, Any], **more: Any) -> list[tuple[Any, ...]]:
    return list(points_of(load_sweep({"scenario": sweeps.scenario(), "vary": vary, **more})))


def test_ranges_are_what_they_say() -> None:
    assert values(start=1, to=2, num=5) == [1, 1.25, 1.5, 1.75, 2]
    assert values(start=16, to=256, num=5, spacing="log") == [16, 32, 64, 128, 256]
    assert all(isinstance(value, int) for value in values(start=16, to=256, num=5, spacing="log"))
    assert values(start=0.1, to=0.5, step=0.1) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert values(start=1, to=10, step=4) == [1, 5, 9]
    assert values(start=1, to=4, num=7, whole=True) == [1, 2, 3, 4]
    assert all(isinstance(value, int) for value in values(start=1.0, to=4.0, num=7, whole=True))
    assert values(start=-2, to=2, num=3) == [-2, 0, 2]


@given(
    start=st.floats(1e-3, 1e6), ratio=st.floats(1.01, 1e3), num=st.integers(2, 50), spacing=st.sampled_from(["linear", "log"])
)
def test_a_range_ascends_evenly_between_its_ends(start: float, ratio: float, num: int, spacing: str) -> None:
    found = values(start=start, to=start * ratio, num=num, spacing=spacing)
    assert len(found) == num and found == sorted(set(found))
    assert math.isclose(found[0], start, rel_tol=1e-11) and math.isclose(found[-1], start * ratio, rel_tol=1e-11)
    steps = [math.log(b / a) if spacing == "log" else b - a for a, b in pairwise(found)]
    # Values are rounded to 12 digits: a step is off by that much of the largest value at most.
    assert max(steps) - min(steps) <= 4e-11 * (1 if spacing == "log" else start * ratio)


@given(start=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6), share=st.floats(0, 1, exclude_max=True), whole=st.booleans())
def test_draws_stay_inside(start: float, width: float, share: float, whole: bool) -> None:
    to = start + width
    if whole and math.ceil(start) > math.floor(to):
        return
    found = Range.model_validate({"from": start, "to": to, "whole": whole}).drawn(share)
    assert start <= found <= to and (not whole or isinstance(found, int))


def test_random_draws_have_the_distribution_they_name() -> None:
    """Kolmogorov-Smirnov at the 0.1 % level: a fixed seed, so it never is a matter of luck."""
    from scipy.stats import kstest, loguniform, uniform

    vary = {"workload.arrivals.rate_per_s": {"from": 1, "to": 100, "spacing": "log"}, "slo.ttft_p99_s": {"from": 1, "to": 3}}
    drawn = points(vary, mode="random", num_points=2000, seed=5)
    assert kstest([a for a, _ in drawn], loguniform(1, 100).cdf).pvalue > 1e-3
    assert kstest([b for _, b in drawn], uniform(1, 2).cdf).pvalue > 1e-3
    whole = [n for (n,) in points({"engine.max_num_seqs": {"from": 1, "to": 4, "whole": True}}, mode="random", num_points=2000)]
    assert all(abs(whole.count(n) - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75) for n in (1, 2, 3, 4))


def test_cartesian_and_zipped_are_product_and_zip() -> None:
    vary = {"workload.seed": [3, 1, 2], "engine.max_num_seqs": {"from": 1, "to": 4, "step": 1}, "weight_dtype": ["bf16"]}
    assert points(vary) == list(product([3, 1, 2], [1, 2, 3, 4], ["bf16"]))
    zipped = {"workload.seed": [3, 1, 2], "engine.max_num_seqs": {"from": 8, "to": 16, "num": 3}}
    assert points(zipped, mode="zipped") == list(zip([3, 1, 2], [8, 12, 16], strict=True))


def test_fields_that_belong_together_vary_together() -> None:
    vary = {"workload.num_requests, workload.warmup_requests": [[50, 5], [100, 10]], "workload.seed": [0, 1]}
    assert points(vary) == [(50, 5, 0), (50, 5, 1), (100, 10, 0), (100, 10, 1)]
    assert set(points(vary, mode="random", num_points=40)) == set(points(vary))


def test_more_points_or_another_field_leave_the_draws_as_they_were() -> None:
    rate = {"workload.arrivals.rate_per_s": {"from": 1, "to": 9}}
    ten, twenty = (points(rate, mode="random", num_points=num, seed=3) for num in (10, 20))
    assert ten == twenty[:10] and len(set(twenty)) == 20
    both = points({"engine.max_num_seqs": [16, 32], **rate}, mode="random", num_points=10, seed=3)
    assert [(b,) for _, b in both] == ten
    assert points(rate, mode="random", num_points=10, seed=4) != ten


def test_a_mapping_from_python_is_left_alone() -> None:
    base = sweeps.scenario()
    Plan(load_sweep({"scenario": base, "vary": {"engine.max_num_seqs": [4]}}, {"workload.seed": 7}))
    assert base == sweeps.scenario()


SEED = {"workload.seed": [0, 1]}
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"vary": {"engine.max_num_seq": [1, 2]}}, ["engine.max_num_seq is not a known field", "did you mean max_num_seqs?"]),
    ({"vary": {"gpu.x": [1]}}, ["vary gpu.x=1 must name a field of a mapping; gpu is none"]),
    ({"vary": {"policies.snapkv[3].budget_tokens": [64]}}, ["vary policies.snapkv[3].budget_tokens", "is a list of 1"]),
    ({"vary": {"policies.snap[0].budget_tokens": [64]}}, ["policies.snap"]),
    ({"vary": {"workload.seed": []}}, ["vary.workload.seed must not be an empty list"]),
    ({"vary": {}}, ["vary must name at least one field", "try vary:"]),
    ({"vary": [1]}, ["vary=[1] must be a mapping"]),
    ({"vary": {"workload.seed": 3}}, ["vary.workload.seed=3 must be a list or a range", "try [3]"]),
    ({"vary": {"engine": {"max_num_seqs": [1]}}}, ["vary.engine", "must be a list or a range", "named with dots"]),
    ({"vary": {"a,": [[1]]}}, ["must be dotted fields separated by commas"]),
    ({"vary": {"workload.seed, name": [[1]]}}, ["vary.workload.seed, name[0]=[1] must be a list of 2 values"]),
    ({"vary": {"workload.seed": [1], "workload.seed, name": [[1, "a"]]}}, ["vary='workload.seed' is given twice"]),
    ({"vary": {"workload.seed": [1, 2], "engine.max_num_seqs": [4]}, "mode": "zipped"},
     ["vary.engine.max_num_seqs has 1 values, but workload.seed has 2", "mode: cartesian"]),
    ({"vary": SEED, "mode": "grid"}, ["mode='grid' must be cartesian", "zipped", "random"]),
    ({"vary": SEED, "mode": "random"}, ["must have num_points with mode: random", "try num_points: 100"]),
    ({"vary": SEED, "num_points": 3}, ["must have mode: random with num_points"]),
    ({"vary": SEED, "num_points": 0, "mode": "random"}, ["num_points=0 must be >= 1"]),
    ({"vary": SEED, "modes": "zipped"}, ["modes is not a known field", "did you mean mode?"]),
    ({"vary": {"slo.ttft_p99_s": {"from": 1, "to": 2}}}, ["must have num or step with mode: cartesian"]),
    ({"vary": {"slo.ttft_p99_s": {"from": 2, "to": 1, "num": 3}}}, ["must have from=2 below to=1", "swap them"]),
    ({"vary": {"slo.ttft_p99_s": {"from": 0, "to": 1, "num": 3, "spacing": "log"}}}, ["from=0 above 0 with spacing: log"]),
    ({"vary": {"slo.ttft_p99_s": {"from": 1, "to": 2, "num": 3, "step": 1}}}, ["must have num or step, not both"]),
    ({"vary": {"slo.ttft_p99_s": {"from": 1, "to": 2, "nun": 3}}}, ["vary.slo.ttft_p99_s.nun is not a known field"]),
    ({"vary": {"slo.ttft_p99_s": {"from": "x", "to": 2, "num": 3}}}, ["vary.slo.ttft_p99_s.from='x' must be a number"]),
    ({"vary": {"slo.ttft_p99_s": {"to": 2, "num": 3}}}, ["vary.slo.ttft_p99_s.from is missing"]),
    ({"vary": {"workload.seed": {"from": 0, "to": 1e9, "step": 1}}}, [f"at most {MAX_CASES:,} values"]),
    ({"vary": {"workload.seed": list(range(400)), "engine.max_num_seqs": list(range(1, 400))}},
     ["vary='159,600 points' must make at most 100,000 cases"]),
    ({"vary": {"workload.seed": {"from": 0, "to": 60000, "step": 1}}},
     ["vary='60,001 points with 2 policies' must make at most 100,000 cases (points x policies)"]),
    ({"vary": {"model": ["llama-3.1-8", "llama3"]}}, ["model='llama-3.1-8' is not in the catalogue", "did you mean"]),
    ({"vary": {"engine.max_num_seqs": {"from": 1.5, "to": 3.5, "num": 3}}}, ["engine.max_num_seqs=1.5 must be a whole number"]),
    ({"vary": SEED, "scenario": 3}, ["scenario=3 must be the path of a scenario or a mapping"]),
    ({"vary": SEED, "scenario": "nope.yaml"}, ["scenario='nope.yaml' does not exist", "folder of the sweep file"]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "says"), WRONG, ids=lambda value: str(value)[:60])
def test_one_line_says_what_is_wrong(data: dict[str, Any], says: list[str]) -> None:
    from kvsim.sweeping.cases import check_deployable

    with pytest.raises(InputError) as caught:
        check_deployable(Plan(load_sweep({"scenario": sweeps.scenario(), **data})))
    line = str(caught.value)
    assert len(line) < 350 and "\n" not in line and "from_" not in line
    assert all(part in line for part in says), line
