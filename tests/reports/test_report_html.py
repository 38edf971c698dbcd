"""The HTML of every kind of report: valid, self-contained, escaped, readable in both schemes, the same each time."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import html5lib
import pytest
from fakes import make_log, make_result
from plan_fakes import make_plan

from kvsim.reports.cells import Cell, Column, Table
from kvsim.reports.files import to_json
from kvsim.reports.html.page import content_policy, page
from kvsim.reports.pair import Pair
from kvsim.reports.pair_report import pair_report
from kvsim.reports.plan_report import plan_report
from kvsim.reports.report import Code, Prose, Report, section
from kvsim.reports.run_report import run_report
from kvsim.reports.saved import SavedRun, saved_run
from kvsim.result import Result

HTML = Path(__file__).parents[2] / "reports" / "html"
STYLE = (HTML / "style.css").read_text(encoding="utf-8")
XHTML = "{http://www.w3.org/1999/xhtml}"
NASTY = "<script>alert(1)</script>\"'&amp;{{ 7*7 }}</style>--><img src=x onerror=alert(2)>"


def saved(result: Result) -> SavedRun:
    return saved_run(result, to_json(result))


def make_pair() -> Pair:
    logs = {"full": make_log(slots=8, num_requests=120), "[kivi]": make_log(slots=40, num_requests=120)}
    return Pair.of(saved(make_result(logs=logs)), saved(make_result(logs=dict(list(logs.items())[:1]))), "out/a", "out/b")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {"run": page(run_report(saved(make_result()))), "plan": page(plan_report(make_plan())), "pair": page(pair_report(make_pair()))}


@pytest.mark.parametrize("kind", ["run", "plan", "pair"])
def test_the_markup_is_valid(pages: dict[str, str], kind: str) -> None:
    parser = html5lib.HTMLParser(strict=True)  # raises at the first parse error
    root = parser.parse(pages[kind])
    elements = list(root.iter())
    ids = [element.get("id") for element in elements if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(element.get(name, "").split()) <= set(ids), element.attrib
        if element.get("href", "").startswith("#"):
            assert element.get("href")[1:] in ids
    assert [element.get("lang") for element in root.iter(f"{XHTML}html")] == ["en"]
    heads = [int(element.tag[-1]) for element in elements if re.fullmatch(rf"{re.escape(XHTML)}h[1-6]", str(element.tag))]
    assert heads[0] == 1 and heads.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(heads))


@pytest.mark.parametrize("kind", ["run", "plan", "pair"])
def test_nothing_is_loaded_from_anywhere(pages: dict[str, str], kind: str) -> None:
    root = html5lib.parse(pages[kind])
    for element in root.iter():
        for name in ("src", "href", "srcset", "data", "action", "poster", "{http://www.w3.org/1999/xlink}href"):
            assert element.get(name, "#").startswith("#"), element.attrib
        assert str(element.tag).rpartition("}")[2] not in ("link", "iframe", "object", "embed", "img", "base")
        assert not [name for name in element.attrib if str(name).startswith("on")]
    assert "@import" not in pages[kind] and not re.search(r"url\((?!#)", pages[kind])


@pytest.mark.parametrize("kind", ["run", "plan", "pair"])
def test_figures_and_tables_say_what_they_are(pages: dict[str, str], kind: str) -> None:
    root = html5lib.parse(pages[kind], namespaceHTMLElements=False)
    pictures = [svg for svg in root.iter("{http://www.w3.org/2000/svg}svg") if svg.get("aria-hidden") != "true"]
    assert pictures
    for svg in pictures:
        title, desc = svg[0], svg[1]
        assert svg.get("role") == "img" and svg.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
        assert title.text and len(desc.text or "") > 20
    tables = list(root.iter("table"))
    assert tables
    for table in tables:
        heads = list(table.find("thead").iter("th"))
        assert all(head.get("scope") == "col" for head in heads)
        for row in table.find("tbody"):
            assert len(row) == len(heads) and row[0].tag == "th" and row[0].get("scope") == "row"
    for region in root.iter("div"):
        if region.get("role") == "region":
            assert region.get("tabindex") == "0" and region.get("aria-labelledby")


def test_numbers_stand_right_and_units_in_heads() -> None:
    columns = (Column("name"), Column("speed", "m/s"), Column("verdict"))
    rows = ((Cell("a", "a"), Cell("1,200", 1200.0), Cell("met", "met")), (Cell("b", "b"), Cell("-"), Cell("-")))
    report = Report("report", "w", "t", (), (), (), tuple(section("s", "S", Table("t", "T", columns, rows))), {})
    root = html5lib.parse(page(report), namespaceHTMLElements=False)
    head = [cell for cell in root.iter("th") if cell.get("scope") == "col"]
    assert [cell.get("class") for cell in head] == [None, "number", None]
    assert ["".join(cell.itertext()) for cell in head] == ["name", "speed m/s", "verdict"]
    cells = [(cell.get("class"), cell.get("data-sort"), cell.text) for cell in root.iter("td")]
    assert cells == [("number", "1200", "1,200"), (None, "met", "met"), ("number", None, "-"), (None, None, "-")]


def nasty_pages() -> dict[str, str]:
    log = make_log(num_requests=40)
    run = replace(make_result(logs={"full": log, NASTY: log}, warmup=0), title=NASTY, versions={NASTY: NASTY})
    scenario = dict(run.scenario) | {"gpu": NASTY, "model": NASTY, NASTY: {NASTY: NASTY}}
    run = replace(run, scenario=scenario)
    plan = make_plan(title=NASTY, names={"4 x h100-sxm-80gb, full": NASTY})
    hostile = plan.options[0].model_copy(update={"flags": (NASTY,), "notes": (NASTY,), "policy": NASTY, "gpu": NASTY})
    plan = plan.model_copy(update={"options": (hostile, *plan.options[1:]), "summary": (NASTY,), "currency": NASTY, "notes": (NASTY,)})
    pair = Pair.of(saved(run), saved(make_result(logs={"full": log}, warmup=0)), f"out/{NASTY}".replace("/", "⁄"), "b")
    return {"run": page(run_report(saved(run))), "plan": page(plan_report(plan)), "pair": page(pair_report(pair))}


@pytest.fixture(scope="module")
def hostile() -> dict[str, str]:
    return nasty_pages()


@pytest.mark.parametrize("kind", ["run", "plan", "pair"])
def test_names_and_titles_of_users_are_text(hostile: dict[str, str], kind: str) -> None:
    html = hostile[kind]
    root = html5lib.HTMLParser(strict=True).parse(html)
    assert len(list(root.iter(f"{XHTML}script"))) == 1 and len(list(root.iter(f"{XHTML}style"))) == 1
    assert not list(root.iter(f"{XHTML}img"))
    assert "<script>alert" not in html and "<img" not in html
    said = "".join(root.itertext())
    assert "alert(1)" in said and "{{ 7*7 }}" in said and "&amp;{{" in said


def test_the_content_policy_lets_kvsims_script_run_and_no_other(pages: dict[str, str]) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", pages["run"], re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in content_policy() and "default-src 'none'" in content_policy()
    root = html5lib.parse(pages["run"], namespaceHTMLElements=False)
    policies = [meta.get("content") for meta in root.iter("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [content_policy()]


def test_equal_reports_give_equal_bytes(pages: dict[str, str]) -> None:
    assert pages["run"] == page(run_report(saved(make_result())))
    assert pages["plan"] == page(plan_report(make_plan()))
    assert pages["pair"] == page(pair_report(make_pair()))


def test_control_characters_do_not_break_the_page() -> None:
    log = make_log(num_requests=20)
    run = make_result(logs={"full": log, "bell\x07\x1b[31m\x00": log}, warmup=0)
    html5lib.HTMLParser(strict=True).parse(page(run_report(saved(run), charts=False)))


def test_code_keeps_its_lines_and_prose_is_a_list() -> None:
    parts = (Code("c", "a \\\n  --b <c>\n"), Prose(("one", "two")), Prose(("alone",)))
    report = Report("report", "w", "t", (), (), (), tuple(section("s", "S", *parts)), {})
    root = html5lib.parse(page(report), namespaceHTMLElements=False)
    assert ["".join(code.itertext()) for code in root.iter("code")] == ["a \\\n  --b <c>"]
    assert [item.text for item in root.iter("li") if not list(item)] == ["one", "two"]


# -- contrast, computed from the style sheet ---------------------------------------------------------------------------


def schemes() -> dict[str, dict[str, str]]:
    light, dark = STYLE.split("@media screen and (prefers-color-scheme: dark)", 1)
    found = [dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-f]{6})", text)) for text in (light, dark)]
    return {"light": found[0], "dark": found[0] | found[1]}


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_wcag_does() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_contrasts_with_what_it_stands_on(scheme: str) -> None:
    colours = schemes()[scheme]
    pairs = [("--ink", "--paper"), ("--soft", "--paper"), ("--link", "--paper"), ("--ink", "--shade"), ("--ink", "--warn-shade"),
             ("--warn", "--warn-shade"), *((f"--on-series-{i}", f"--series-{i}") for i in range(1, 11))]  # fmt: skip
    for text, ground in pairs:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def test_the_dark_scheme_is_dark_and_sets_every_neutral() -> None:
    light, dark = schemes()["light"], schemes()["dark"]
    assert luminance(light["--paper"]) > 0.9 and luminance(dark["--paper"]) < 0.02
    for name in ("--paper", "--shade", "--ink", "--soft", "--rule", "--grid", "--link", "--warn", "--warn-shade"):
        assert light[name] != dark[name]
    for i in range(1, 11):
        assert contrast(dark[f"--series-{i}"], dark["--paper"]) >= 3, i  # WCAG 2.2, 1.4.11: graphics


def test_every_variable_of_the_figures_is_in_the_style_sheet() -> None:
    from kvsim.reports.figures.inline import VARIABLES

    light = schemes()["light"]
    assert set(VARIABLES.values()) <= set(light)
    for colour, name in VARIABLES.items():
        if name.startswith("--series"):
            assert light[name] == colour.lower()
