"""Charts of a run: what is drawn is what was simulated, and both files and pages say it the same way each time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_log, make_policy, make_result

from kvsim.reports.figures.bars import is_part, ledger_bars, op_bars
from kvsim.reports.figures.chart import PALETTE, Chart, Panel, figure_of, printable, save
from kvsim.reports.figures.inline import inline_svg
from kvsim.reports.figures.run_charts import CHARTS, run_charts
from kvsim.reports.files import to_json
from kvsim.reports.names import RUN_NAMES
from kvsim.reports.saved import SavedRun, saved_run
from kvsim.result import LedgerLine, Result
from kvsim.units import GIB


def saved(result: Result) -> SavedRun:
    return saved_run(result, to_json(result))


@pytest.fixture(scope="module")
def result() -> Result:
    return make_result()


@pytest.fixture(scope="module")
def charts(result: Result) -> dict[str, Chart]:
    return run_charts(saved(result))


def axes_of(chart: Chart) -> list[Any]:
    return list(figure_of(chart).axes)


def test_every_chart_has_a_file_name_that_is_cleared() -> None:
    assert {name for name in RUN_NAMES if name.endswith(".png")} == {f"{name}.png" for name in CHARTS}


def test_cdf_reaches_all_and_starts_at_the_fastest_counted_request(result: Result, charts: dict[str, Chart]) -> None:
    axis = axes_of(charts["latency_cdf"])[2]
    for line, policy in zip(axis.get_lines(), result.policies.values(), strict=True):
        assert line.get_ydata()[-1] == 100
        assert line.get_xdata()[-1] == policy.summary.e2e.max_s
        assert line.get_ydata()[0] == pytest.approx(100 / policy.summary.num_requests)
        drawn = dict(zip(line.get_ydata(), line.get_xdata(), strict=True))
        shares = sorted(drawn)
        median = drawn[shares[int(np.searchsorted(shares, 50))]]
        assert median == pytest.approx(policy.summary.e2e.p50_s, rel=0.02)


def test_time_by_op_bars_add_up(result: Result, charts: dict[str, Chart]) -> None:
    (axis,) = axes_of(charts["time_by_op"])
    total_s = sum(bar.get_width() for bar in axis.patches)
    assert total_s == pytest.approx(sum(sum(p.summary.op_s.values()) for p in result.policies.values()))


def test_many_ops_keep_their_sum_in_nine_colours_and_a_rest() -> None:
    op_s = {name: {f"op{i}": float(i + j + 1) for i in range(14)} for j, name in enumerate(("a", "b"))}
    chart = op_bars(op_s, "many", "seconds", "")
    assert chart is not None and len({entry.colour for entry in chart.legend}) == len(chart.legend) == 10
    (axis,) = axes_of(chart)
    assert sum(bar.get_width() for bar in axis.patches) == pytest.approx(sum(sum(by.values()) for by in op_s.values()))
    assert "op0" in chart.caption


def test_memory_bars_hold_what_adds_up_and_an_outline_of_the_whole() -> None:
    lines = (
        LedgerLine("GPU memory", 80 * GIB, ""), LedgerLine("engine's share", 72 * GIB, ""), LedgerLine("weights", 16 * GIB, ""),
        LedgerLine("KV pool", 50 * GIB, ""), LedgerLine("of which policy state", 2 * GIB, ""),
    )  # fmt: skip
    assert [line.name for line in lines if is_part(line.name)] == ["weights", "KV pool"]
    chart = ledger_bars({"a": lines}, "t")
    assert chart is not None
    (axis,) = axes_of(chart)
    assert sorted(bar.get_width() for bar in axis.patches) == [16, 50, 80]


def test_ledger_lines_that_are_no_parts_are_those_of_real_ledgers() -> None:
    from kvsim.api import simulate
    from kvsim.scenario import load_scenario

    root = Path(__file__).parents[2]
    settings = {"workload.num_requests": 110, "policies": {"h2o": [{"kind": "h2o", "kept_frac": 0.5}]}}
    policy = simulate(load_scenario(root / "scenarios" / "a100_llama8b.yaml", settings)).policies["h2o"]
    sizes = {line.name: line.num_bytes for line in policy.ledger}
    assert "of which policy state" in sizes
    used = sum(num_bytes for name, num_bytes in sizes.items() if is_part(name))
    assert used <= sizes["GPU memory"]
    # All but what lies outside the engine's share adds up to that share.
    assert used - sizes["CUDA graphs"] == pytest.approx(sizes["engine's share"], rel=0.001)


def test_over_time_keeps_the_mean(result: Result, charts: dict[str, Chart]) -> None:
    waiting = axes_of(charts["over_time"])[1].get_lines()[0].get_ydata()
    log = result.policies["full"].log
    everything = make_result(logs={"full": log}, warmup=0).policies["full"].summary
    assert waiting.mean() == pytest.approx(everything.mean_waiting_requests, rel=0.01)


def test_gains_are_drawn_against_a_baseline_only(charts: dict[str, Chart], result: Result) -> None:
    from kvsim.reports.compare import gains_over_baseline

    axis = axes_of(charts["gains"])[0]
    drawn = [bar.get_x() + bar.get_width() for bar in axis.patches]
    table = gains_over_baseline(result)
    assert drawn == pytest.approx([row["output_tokens_x"] for name, row in table.items() if name != "full"])
    alone = make_result(logs={"full": make_log(num_requests=30)}, warmup=0)
    assert set(run_charts(saved(alone))) == set(CHARTS) - {"gains"}


def test_awkward_names_and_many_policies_draw(tmp_path: Path) -> None:
    log = make_log(num_requests=20)
    names = ("full", "_hidden", "$x^2$", "<b>&amp;", "ünï\x1bcode\x00", *(f"$_{i}" for i in range(len(PALETTE) + 1)))
    result = replace(make_result(logs=dict.fromkeys(names, log), warmup=0), title="costs $5 a $day")
    for chart in (CHARTS["latency_cdf"](saved(result)), CHARTS["memory"](saved(result))):
        assert chart is not None
        for path in save(chart, tmp_path):
            assert path.stat().st_size > 1000
        for i, panel in enumerate(chart.panels):
            ET.fromstring(inline_svg(panel, f"p{i}"))
    text = "".join(ET.parse(tmp_path / "memory.svg").getroot().itertext())
    for shown in ("_hidden", "$x^2$", "<b>&amp;", printable("ünï\x1bcode\x00"), "costs $5 a $day"):
        assert shown in text, shown


def test_files_are_the_same_each_time_and_name_no_date(charts: dict[str, Chart], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(charts["memory"], tmp_path / folder)
    for name in ("memory.png", "memory.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "dc:date" not in (tmp_path / "a" / "memory.svg").read_text()


def test_a_matplotlibrc_of_the_user_changes_nothing(charts: dict[str, Chart]) -> None:
    import matplotlib

    panel = charts["latency_cdf"].panels[0]
    before = inline_svg(panel, "p")
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path"}):
        assert inline_svg(panel, "p") == before


def test_inline_svg_takes_the_pages_colours_and_keeps_its_text(charts: dict[str, Chart]) -> None:
    for chart in charts.values():
        for panel in chart.panels:
            svg = inline_svg(panel, "p")
            root = ET.fromstring(svg)
            assert root.attrib["viewBox"] and "width" not in root.attrib and root.attrib["role"] == "img"
            assert [child.tag for child in root][:2] == ["title", "desc"] and root[0].text == panel.title
            # Every colour is one of the page's, so that dark mode reaches it.
            assert not re.findall(r"#[0-9a-fA-F]{3,6}\b(?!\))", re.sub(r"url\(#[^)]*\)|href=\"#[^\"]*\"", "", svg)), panel.title
            assert "font-family" not in svg and "http" not in svg and "DejaVu" not in svg
            ids = re.findall(r'\bid="([^"]+)"', svg)
            assert len(ids) == len(set(ids)) and all(name.startswith("p-") for name in ids)
            for target in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg):
                assert "".join(target) in ids
    assert "seconds" in "".join(ET.fromstring(inline_svg(charts["latency_cdf"].panels[0], "p")).itertext())


def test_labels_keep_off_each_other_and_off_points() -> None:
    from kvsim.reports.figures.labels import place_labels

    rng = np.random.default_rng(0)
    points = [tuple(point) for point in rng.uniform(0, 1, (16, 2))]

    def draw(axis: Any) -> None:
        axis.plot(*zip(*points, strict=True), "o")
        place_labels(axis, points, [str(i + 1) for i in range(len(points))])

    figure = figure_of(Chart("c", "c", (Panel("p", "", draw),)))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.padded(-0.5).overlaps(b.padded(-0.5))]
    assert len(boxes) == 16 and not overlaps


def test_a_policy_without_second_tokens_has_no_tpot_line() -> None:
    from array import array

    log = make_log(num_requests=12)
    rows = np.array(log.requests).reshape(-1, 9)
    rows[:, 6] = 1
    log.requests = array("q", rows.ravel().tolist())
    base = make_result(logs={"full": log}, warmup=0)
    policy = make_policy("full", "full", log, {"warmup": 0, "slo": {}})
    chart = run_charts(saved(replace(base, policies={"full": policy})))["latency_cdf"]
    counts = [len([line for line in axis.get_lines() if len(line.get_xdata()) > 2]) for axis in axes_of(chart)]
    assert counts == [1, 0, 1]
