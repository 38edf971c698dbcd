"""A plan's report says what the plan says."""

from __future__ import annotations

import csv
import io
import random

import pytest
from plan_fakes import SLO, TARGET_PER_S, make_plan

from kvsim.planning.result import Option, PlanResult
from kvsim.reports import plan_tables
from kvsim.reports.cells import Table
from kvsim.reports.figures.plan_charts import CHARTS, plan_charts
from kvsim.reports.names import PLAN_NAMES
from kvsim.reports.plan_report import NONE_DEPLOYABLE, command_line, plan_report
from kvsim.reports.plan_values import BINDS, deployable, latency_at_load, price_label, undominated
from kvsim.reports.report import Code


@pytest.fixture(scope="module")
def plan() -> PlanResult:
    return make_plan()


def column(table: Table, head: str) -> list[str]:
    (place,) = [i for i, found in enumerate(table.columns) if found.head == head]
    return [row[place].text for row in table.rows]


def test_ranks_follow_the_plan_and_refused_options_stand_apart(plan: PlanResult) -> None:
    table = plan_tables.ranking(plan)
    assert table is not None
    names = [option.name for option in plan.options if option.reason is None]
    assert [row[0].text for row in table.rows] == [f"{i}. {name}" for i, name in enumerate(names, start=1)]
    out = plan_tables.not_deployable(plan)
    assert out is not None and column(out, "reason") == ["does not fit: weights of 131.42 GiB, GPU memory of 44.40 GiB; use 4 GPUs or more"]


def test_columns_that_no_option_fills_are_left_out(plan: PlanResult) -> None:
    bare = make_plan(prices=False)
    heads = {head.head for head in plan_tables.ranking(bare).columns}  # type: ignore[union-attr]
    assert "cost" not in heads and "GPUs" in heads
    assert price_label(bare) == "GPUs" and price_label(plan) == "USD per hour"


def test_latency_at_the_target_load_is_that_of_the_queue(plan: PlanResult) -> None:
    """Against the toy's closed form: exact at the probes, within the bend of 1 / (1 - load) between them."""
    for option in deployable(plan):
        for probe in option.probes:
            there = option.model_copy(update={"replicas": 1})
            at = latency_at_load(plan.model_copy(update={"target_rate_per_s": probe.rate_per_s}), there, "tpot_p99_s")
            assert at == pytest.approx(probe.latency_s["tpot_p99_s"])
        found = latency_at_load(plan, option, "tpot_p99_s")
        assert option.rate_per_s is not None and option.replicas is not None and found is not None
        capacity = option.probes[2].rate_per_s / option.probes[2].utilisation_frac
        truth = 0.02 / (1 - TARGET_PER_S / option.replicas / capacity)
        assert truth <= found * (1 + 1e-9) and found < 1.1 * truth
        assert found <= SLO["tpot_p99_s"]


def test_no_latency_is_made_up_beyond_what_was_simulated(plan: PlanResult) -> None:
    first = plan.options[0]
    assert latency_at_load(plan.model_copy(update={"target_rate_per_s": 1e6}), first, "ttft_p99_s") is None
    assert latency_at_load(plan, first.model_copy(update={"probes": ()}), "ttft_p99_s") is None
    assert latency_at_load(plan, first.model_copy(update={"replicas": None}), "ttft_p99_s") is None
    lightest = min(first.probes, key=lambda probe: probe.rate_per_s)
    idle = latency_at_load(plan.model_copy(update={"target_rate_per_s": 1e-3}), first, "ttft_p99_s")
    assert idle == lightest.latency_s["ttft_p99_s"]


def test_the_front_is_what_brute_force_finds() -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randrange(1, 12))]
        worse = {
            i for i, p in enumerate(points) for q in points
            if (q[0] <= p[0] and q[1] < p[1]) or (q[0] < p[0] and q[1] <= p[1])
        }  # fmt: skip
        assert undominated(points) == [i for i in range(len(points)) if i not in worse]


def test_charts_have_names_that_are_cleared_and_say_who_is_drawn(plan: PlanResult) -> None:
    charts = plan_charts(plan)
    assert set(charts) == set(CHARTS) == {name.removesuffix(".png") for name in PLAN_NAMES if name.endswith(".png")}
    assert [panel.title for panel in charts["load"].panels] == ["TTFT p99", "TPOT p99"]
    assert "10 more are in the tables" in charts["load"].caption
    for rank, option in enumerate(deployable(plan), start=1):
        assert f"{rank}, {option.name}:" in charts["pareto"].panels[0].alt


def test_points_of_the_pareto_plot_are_the_tables_numbers(plan: PlanResult) -> None:
    from kvsim.reports.figures.chart import figure_of

    axis = figure_of(plan_charts(plan)["pareto"]).axes[0]
    drawn = {(x, y) for line in axis.get_lines()[1:3] for x, y in zip(*line.get_data(), strict=True)}
    told = {(option.cost_per_hour, latency_at_load(plan, option, "ttft_p99_s")) for option in deployable(plan)}
    assert drawn == told


def test_csv_holds_every_option_and_probe(plan: PlanResult) -> None:
    files = plan_report(plan, charts=False).csv_files
    rows = list(csv.DictReader(io.StringIO(files["options.csv"])))
    assert [row["name"] for row in rows] == [option.name for option in plan.options]
    assert [row["rank"] for row in rows] == [*(str(i) for i in range(1, len(plan.options))), ""]
    assert float(rows[0]["cost_per_hour"]) == plan.options[0].cost_per_hour and rows[-1]["reason"].startswith("does not fit")
    probes = list(csv.DictReader(io.StringIO(files["probes.csv"])))
    assert len(probes) == sum(len(option.probes) for option in plan.options)
    assert {"rate_per_s", "ttft_p99_s", "decided"} <= set(probes[0])


def test_flags_are_one_command_with_a_line_for_each_option(plan: PlanResult) -> None:
    assert command_line(("vllm", "serve", "m", "--a", "1", "--b")) == "vllm serve m \\\n  --a 1 \\\n  --b"
    assert command_line(("vllm serve m", "# h2o: needs a fork", "--a 1")) == "vllm serve m \\\n  --a 1\n# h2o: needs a fork"
    report = plan_report(plan, charts=False)
    (deploy,) = [found for found in report.sections if found.slug == "deploy"]
    codes = [part for part in deploy.parts if isinstance(part, Code)]
    assert len(codes) == len(deployable(plan)) and not codes[0].folded and all(code.folded for code in codes[1:])
    assert "--tensor-parallel-size 2" in codes[0].text and codes[0].title.endswith("on each of 8 replicas")


def test_engine_settings_stand_in_where_no_command_line_is_known(plan: PlanResult) -> None:
    bare = plan.model_copy(update={"options": (plan.options[0].model_copy(update={"flags": ()}),)})
    (deploy,) = [found for found in plan_report(bare, charts=False).sections if found.slug == "deploy"]
    (code,) = deploy.parts
    assert isinstance(code, Code) and "no command line is known" in code.title and '"max_num_seqs": 256' in code.text


def test_a_plan_that_nobody_meets_still_reports(plan: PlanResult) -> None:
    out = [Option(**{**plan.options[-1].model_dump(), "name": f"o{i}", "reason": "the SLO is missed at any rate"}) for i in range(2)]
    hopeless = plan.model_copy(update={"options": tuple(out), "summary": ("No option meets the SLO.",)})
    report = plan_report(hopeless)
    assert report.warnings == (NONE_DEPLOYABLE,) and not list(report.charts())
    assert [found.slug for found in report.sections] == ["refused", "basis", "provenance"]
    empty = plan_report(plan.model_copy(update={"options": ()}))
    assert empty.csv_files == {} and empty.warnings


def test_quality_is_told_once_for_each_policy_with_what_it_was_measured_on(plan: PlanResult) -> None:
    table = plan_tables.quality(plan)
    assert table is not None and sorted(column(table, "policy")) == ["full", "kivi-4bit", "snapkv+think", "snapkv-1024"]
    assert set(column(table, "measured on")) == {"llama-3.1-8b (another model)"}
    assert dict(zip(column(table, "policy"), column(table, "at budget"), strict=True))["kivi-4bit"] == "1024 tokens (another budget)"
    bare = tuple(option.model_copy(update={"quality": None}) for option in plan.options)
    assert plan_tables.quality(plan.model_copy(update={"options": bare})) is None
    mixed = plan_tables.quality(plan.model_copy(update={"options": (bare[0], plan.options[-2])}))
    assert mixed is not None and column(mixed, "source")[0] == "none published"


def test_every_resource_that_binds_has_words() -> None:
    from typing import get_args

    from kvsim.planning.result import Binding

    assert set(BINDS) == set(get_args(Binding))
