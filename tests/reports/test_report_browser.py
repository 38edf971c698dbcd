"""Reports in a real browser: no complaint, no request, sorting by mouse and keys, nothing overlaps on a telephone or a desk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from fakes import make_result
from plan_fakes import make_plan
from test_report_html import make_pair, saved

from kvsim.reports.html.page import page
from kvsim.reports.pair_report import pair_report
from kvsim.reports.plan_report import plan_report
from kvsim.reports.run_report import run_report

CHROMIUM = browser.find()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium to test reports in it")

A4_WIDTH_PX = 703
"""186 mm, the paper less its margins, at 96 pixels an inch."""
OVERFLOWS = """(() => {
  const wide = document.documentElement.clientWidth, found = [];
  for (const part of document.querySelectorAll("body *")) {
    if (part.closest(".scroll, pre") && !part.matches(".scroll, pre")) continue;
    const box = part.getBoundingClientRect();
    if (box.width && (box.right > wide + 0.5 || box.left < -0.5)) found.push([part.tagName, String(part.className), box.right]);
  }
  return found;
})()"""
OVERLAPS = """(() => {
  const found = [];
  const check = (what, parts) => {
    const boxes = parts.map((part) => [part, part.getBoundingClientRect()]).filter(([, box]) => box.width && box.height);
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, b] = [boxes[i][1], boxes[j][1]];
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const along = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1.5 && along > 2.5) found.push([what, boxes[i][0].textContent.slice(0, 40), boxes[j][0].textContent.slice(0, 40)]);
    }
  };
  const all = (within, selector) => [...within.querySelectorAll(selector)];
  all(document, ".panel-svg").forEach((svg) => check(svg.querySelector("title").textContent, all(svg, "text")));
  const lists = "header, main, section, .panels, .facts, .legend, nav ul";
  all(document, lists).forEach((list) => check(list.tagName, [...list.children]));
  for (const head of document.querySelectorAll("thead tr, tbody tr:first-child")) check("row", [...head.children].slice(1));
  return found;
})()"""
SMALL = """[...document.querySelectorAll(".panel-svg text")].filter((text) => {
  const matrix = text.getScreenCTM();
  return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(matrix.a, matrix.b) < 8.5;
}).length"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    reports = {"run": run_report(saved(make_result())), "plan": plan_report(make_plan()), "pair": pair_report(make_pair())}
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(page(report), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    assert CHROMIUM is not None
    opened = browser.Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", ["run", "plan", "pair"])
def test_nothing_complains_asks_the_network_or_overlaps(chromium: browser.Browser, files: dict[str, Path], kind: str) -> None:
    for width, scheme in ((400, "light"), (1400, "light"), (700, "dark")):
        chromium.open(files[kind], width=width, scheme=scheme)
        chromium.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        assert chromium.complaints() == []
        assert chromium.requests() == [files[kind].resolve().as_uri()]
        assert chromium.run("document.documentElement.scrollWidth") <= width
        assert chromium.run(OVERFLOWS) == []
        assert chromium.run(OVERLAPS) == []
        assert chromium.run(SMALL) == 0


def test_the_checks_see_what_they_look_for(chromium: browser.Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<!DOCTYPE html><title>t</title><nav><ul style='padding:0'><li>one<li style='margin-top:-1em'>two</ul></nav>"
        "<div style='width:3000px'>x</div><img src='http://127.0.0.1:9/x.png'><script>console.error('no')</script>"
    )
    chromium.open(tmp_path / "bad.html")
    assert chromium.complaints() and len(chromium.requests()) == 2
    assert chromium.run(OVERFLOWS) and chromium.run(OVERLAPS)


def test_scripts_of_others_do_not_run(chromium: browser.Browser, files: dict[str, Path], tmp_path: Path) -> None:
    """Were escaping ever to fail, the content policy still stands in the way."""
    text = files["pair"].read_text(encoding="utf-8").replace("<h1>", "<h1><script>window.hacked = 1</script>", 1)
    (tmp_path / "injected.html").write_text(text, encoding="utf-8")
    chromium.open(tmp_path / "injected.html")
    assert chromium.run("window.hacked === undefined") and any("Content Security Policy" in line for line in chromium.complaints())


def column(chromium: browser.Browser, table: str, place: int) -> list[Any]:
    return chromium.run(f"[...document.querySelectorAll('#table-{table} tbody tr')].map((row) => row.cells[{place}].textContent)")


def state(chromium: browser.Browser, table: str) -> list[str]:
    return chromium.run(f"[...document.querySelectorAll('#table-{table} thead th')].map((head) => head.getAttribute('aria-sort'))")


def test_sorting_by_mouse(chromium: browser.Browser, files: dict[str, Path]) -> None:
    chromium.open(files["plan"])
    before = column(chromium, "ranking", 0)
    click = "document.querySelectorAll('#table-ranking thead th button')[{}].click()"
    chromium.run(click.format(1))
    rates = [float(rate.replace(",", "")) for rate in column(chromium, "ranking", 1)]
    assert rates == sorted(rates) and len(set(rates)) > 5 and state(chromium, "ranking")[:3] == ["none", "ascending", "none"]
    chromium.run(click.format(1))
    rates = [float(rate.replace(",", "")) for rate in column(chromium, "ranking", 1)]
    assert rates == sorted(rates, reverse=True) and state(chromium, "ranking")[1] == "descending"
    chromium.run(click.format(0))
    assert column(chromium, "ranking", 0) == before  # by rank as a number: 2 before 10
    chromium.run(click.format(11))
    words = column(chromium, "ranking", 11)
    assert words == sorted(words) and len(set(words)) == 2


def test_cells_that_say_nothing_sort_last(chromium: browser.Browser, files: dict[str, Path]) -> None:
    chromium.open(files["pair"])
    for order in ("ascending", "descending"):
        chromium.run("document.querySelectorAll('#table-means thead th button')[3].click()")
        assert state(chromium, "means")[3] == order
        assert column(chromium, "means", 3)[-1] == "-"


def test_sorting_by_keys(chromium: browser.Browser, files: dict[str, Path]) -> None:
    chromium.open(files["run"])
    chromium.run("document.querySelectorAll('#table-latency thead th button')[1].focus()")
    chromium.press("Enter", 13, "\r")
    assert state(chromium, "latency")[1] == "ascending"
    chromium.press(" ", 32, " ")
    assert state(chromium, "latency")[1] == "descending"
    chromium.press("Tab", 9)
    assert chromium.run("document.activeElement.closest('th').cellIndex") == 2
    chromium.run("document.querySelectorAll('#table-latency thead th button')[1].focus()")
    assert chromium.run("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_copying_gives_the_command(chromium: browser.Browser, files: dict[str, Path]) -> None:
    chromium.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    chromium.open(files["plan"])
    chromium.click("#deploy .copy")
    told = "new Promise((done) => setTimeout(() => done(document.querySelector('#deploy .copy').textContent), 300))"
    assert chromium.run(told) == "Copied"
    text = chromium.run("navigator.clipboard.readText()")
    assert text.startswith("vllm serve") and "\\\n  --max-num-seqs 256" in text


def test_print_opens_what_is_folded_and_is_light(chromium: browser.Browser, files: dict[str, Path], tmp_path: Path) -> None:
    chromium.open(files["plan"], scheme="dark")
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    chromium.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    chromium.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert chromium.run("[...document.querySelectorAll('details')].every((part) => part.open)")
    chromium.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("kind", ["run", "plan", "pair"])
def test_tables_fit_on_paper(chromium: browser.Browser, files: dict[str, Path], kind: str) -> None:
    chromium.open(files[kind], width=A4_WIDTH_PX)
    chromium.call("Emulation.setEmulatedMedia", media="print")
    chromium.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert chromium.run("document.documentElement.scrollWidth") <= A4_WIDTH_PX
    chromium.call("Emulation.setEmulatedMedia", media="")
