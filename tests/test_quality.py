"""Published quality: the figures are those of the papers, and `nearest` never makes one look closer or better than it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from kvsim.cli import main
from kvsim.errors import InputError
from kvsim.model import Model, load_model
from kvsim.planning.result import PublishedQuality
from kvsim.policies import POLICIES
from kvsim.policies.base import Policy
from kvsim.quality import MEASURES, Figure, figures, nearest, read_figures
from kvsim.scenario import AnyPolicy

NOTES = Path(__file__).parent.parent / ".." / "shared" / "domain" / "published_quality.md"
ADAPTER: TypeAdapter[Any] = TypeAdapter(list[AnyPolicy])
LLAMA, MPT = load_model("llama-3.1-8b"), load_model("mpt-7b")


def policies(*blocks: dict[str, Any]) -> list[Policy]:
    return ADAPTER.validate_python(list(blocks))


def found(model: Model, *blocks: dict[str, Any], prompt_tokens: float = 4000) -> PublishedQuality:
    answer = nearest(policies(*blocks), model, prompt_tokens)
    assert answer is not None
    return answer


def scores(policy: str, model: str, metric: str, measure: str) -> dict[float, Figure]:
    chosen = [f for f in figures() if (f.policies, f.model, f.metric) == (policy, model, metric)]
    return {figure.budget[measure]: figure for figure in chosen if measure in figure.budget}


# -- the data ---------------------------------------------------------------------------------------------------------


def test_every_figure_says_where_it_comes_from() -> None:
    kinds = {str(policy.model_fields["kind"].default) for policy in POLICIES}
    assert len(figures()) > 150
    for figure in figures():
        assert set(figure.policies.split(" + ")) <= kinds and set(figure.budget) <= set(MEASURES)
        assert re.search(r"arXiv \d{4}\.\d{5}", figure.source) and figure.read in ("text", "plot")
        assert figure.task and figure.metric and figure.score > 0


def test_the_tables_agree_with_the_notes_they_were_taken_from() -> None:
    """Parsed from the Markdown tables by other code than the data's own reader."""
    if not NOTES.exists():
        pytest.skip("the collection of published figures is not beside this repository")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in NOTES.read_text(encoding="utf-8").splitlines()]
    names = {"MPT-7B": "mpt-7b", "GPT-J-6B": "gpt-j-6b", "Cerebras-6.7B": "cerebras-gpt-6.7b"}
    labels = {"H2O": "h2o", "SnapKV": "snapkv", "PyramidKV": "pyramid_kv", "Ada-SnapKV": "ada_kv", "KV-Compress": "kv_compress"}
    model, checked = "", 0
    for row in rows:
        if len(row) == 10 and row[1] in ("keyformer", "h2o", "window"):
            model = next((name for start, name in names.items() if row[0].startswith(start)), model)
            table = scores(row[1], model, "ROUGE-2", "kept_frac")
            for place, cell in enumerate(row[2:]):
                if match := re.match(r"[\d.]+", cell):
                    figure = table[(place + 2) / 10]
                    assert figure.score == float(match[0]) and (figure.read == "text") == ("text" in cell)
                    checked += 1
        label = next((kind for start, kind in labels.items() if row[0].startswith(start)), None)
        if len(row) == 5 and label and re.fullmatch(r"\d\d\.\d\d", row[1]):
            table = scores(label, "mistral-7b-v0.2", "LongBench score", "kept_tokens")
            for budget, cell in zip((128, 256, 512, 1024), row[1:], strict=True):
                same = [
                    f
                    for f in figures()
                    if f.policies == label and f.model == "mistral-7b-v0.2" and f.budget == {"kept_tokens": budget}
                ]
                assert float(cell) in {figure.score for figure in same}
                checked += 1
    assert checked == 49 + 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paper": None}, "paper"),
        ({"tables": []}, "must be a list that is not empty"),
        ({"oops": 1}, "oops is not a known key"),
    ],
)
def test_a_wrong_file_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {
        "where": "text",
        "task": "t",
        "metric": "m",
        "models": {"a": {"full": None, "scores": {"h2o": [{"bits": 2, "score": 1, "read": "text"}]}}},
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"paper": "p", "tables": [good]}))
    assert len(read_figures(path)) == 1
    path.write_text(yaml.safe_dump({"paper": "p", "tables": [good], **change}))
    with pytest.raises(InputError, match=message):
        read_figures(path)


@pytest.mark.parametrize(
    ("row", "policy", "message"),
    [({"score": 1, "read": "text"}, "h2o", "kept_frac is missing"),
     ({"kept_frac": 1.5, "score": 1, "read": "text"}, "h2o", "must be at most 1"),
     ({"kept_frac": 0.5, "score": 1, "read": "guess"}, "h2o", "must be one of text, plot"),
     ({"kept_frac": 0.5, "score": -1, "read": "text"}, "h2o", "must be a finite number > 0"),
     ({"kept_frac": 0.5, "score": 1, "read": "text"}, "h3o", "is not a policy"),
     ({"bits": 2, "kept_frac": 0.5, "score": 1, "read": "text"}, "snapkv + kivi", "alphabetical")],
)  # fmt: skip
def test_a_wrong_row_is_one_line(row: dict[str, Any], policy: str, message: str, tmp_path: Path) -> None:
    table = {
        "where": "text",
        "task": "t",
        "metric": "m",
        "models": {"a": {"full": {"score": 2, "read": "text"}, "scores": {policy: [row]}}},
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"paper": "p", "tables": [table]}))
    with pytest.raises(InputError, match=message):
        read_figures(path)


# -- the nearest figure -----------------------------------------------------------------------------------------------


def test_the_models_own_figure_at_the_budget_itself() -> None:
    answer = found(MPT, {"kind": "keyformer", "kept_frac": 0.6})
    assert (answer.score, answer.full_score, answer.metric) == (17.6, 17.63, "ROUGE-2")
    assert answer.retained_frac == pytest.approx(17.6 / 17.63)
    assert answer.same_model and answer.same_budget and answer.note == ""


def test_between_two_budgets_the_smaller_is_taken_and_nothing_is_interpolated() -> None:
    answer = found(MPT, {"kind": "h2o", "kept_frac": 0.58})
    assert answer.score == 15.5 and answer.budget == "50% of prompt" and not answer.same_budget
    assert "published for another budget" in answer.note and "optimistic" not in answer.note


def test_a_figure_on_the_optimistic_side_says_so() -> None:
    answer = found(MPT, {"kind": "h2o", "kept_frac": 0.1})
    assert answer.budget == "20% of prompt, more than asked" and "optimistic" in answer.note
    ratio = found(LLAMA, {"kind": "kv_compress", "compression_ratio": 100})
    assert ratio.budget == "64x, more than asked" and ratio.retained_frac == 0.69


def test_another_model_is_named_and_the_lowest_of_equals_taken() -> None:
    answer = found(LLAMA, {"kind": "keyformer", "kept_frac": 0.5})
    assert not answer.same_model and answer.same_budget and answer.model == "cerebras-gpt-6.7b"
    assert answer.retained_frac == pytest.approx(14.2 / 15.5)
    assert "another model" in answer.note and "91.6% to 99.2%" in answer.note


def test_scores_without_a_full_score_are_told_but_not_divided() -> None:
    answer = found(LLAMA, {"kind": "snapkv", "budget_tokens": 1024})
    assert answer.model == "mistral-7b-v0.2" and "llama-3.1-8b itself scored 47.9 at 1,024 tokens" in answer.note


def test_a_budget_in_other_terms_is_never_called_the_same() -> None:
    """2000 of 4000 tokens is half of the prompt, which was published; of what prompts is another question."""
    answer = found(MPT, {"kind": "window", "window_tokens": 2000})
    assert answer.budget == "50% of prompt" and not answer.same_budget and "prompts of 4,000 tokens" in answer.note
    assert "is kept whole" in found(MPT, {"kind": "window", "window_tokens": 5000}).note


def test_compositions_have_only_what_was_published_of_them() -> None:
    snapkv, kivi = {"kind": "snapkv", "budget_tokens": 1024}, {"kind": "kivi", "bits": 2}
    assert nearest(policies(snapkv, kivi), LLAMA, 4000) is None
    assert nearest(policies({"kind": "think"}), LLAMA, 4000) is None
    assert nearest(policies(), LLAMA, 4000) is None and nearest(policies({"kind": "full"}), LLAMA, 4000) is None
    both = [{"kind": "kv_quant", "dtype": "int4"}, {"kind": "scissorhands", "budget_tokens": 1024}]
    published = found(load_model("opt-6.7b"), *both, prompt_tokens=2048)
    assert published == found(load_model("opt-6.7b"), *reversed(both), prompt_tokens=2048)
    assert (published.score, published.budget) == (0.704, "50% of prompt, 4 bits")


BY_TOKENS = ["h2o", "snapkv", "pyramid_kv", "ada_kv"]
BLOCKS = st.one_of(
    st.builds(lambda f: {"kind": "keyformer", "kept_frac": f}, st.floats(0.01, 1)),
    st.builds(lambda f: {"kind": "h2o", "kept_frac": f}, st.floats(0.01, 1)),
    st.builds(lambda n, kind: {"kind": kind, "budget_tokens": n}, st.integers(64, 9000), st.sampled_from(BY_TOKENS)),
    st.builds(lambda r: {"kind": "kv_compress", "compression_ratio": r}, st.floats(1, 200)),
    st.builds(lambda b: {"kind": "kivi", "bits": b}, st.sampled_from([2, 4])),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(BLOCKS, st.sampled_from(["llama-3.1-8b", "llama-3.1-70b", "mpt-7b", "llama-2-7b"]), st.floats(10, 1e5))
def test_every_answer_is_a_published_figure_and_marks_its_distance(
    block: dict[str, Any], name: str, prompt_tokens: float
) -> None:
    answer = found(load_model(name), block, prompt_tokens=prompt_tokens)
    printed = [
        f
        for f in figures()
        if f.policies == block["kind"] and (f.score, f.full_score, f.model) == (answer.score, answer.full_score, answer.model)
    ]
    budgets = [f for f in printed if f.budget_text == answer.budget.removesuffix(", more than asked")]
    assert budgets and answer.same_model == (answer.model == name)
    assert ("another model" in answer.note) != answer.same_model
    assert ("another budget" in answer.note) != answer.same_budget
    (measure,) = budgets[0].budget
    stated = block.get({"kept_tokens": "budget_tokens"}.get(measure, measure))
    if stated is not None:
        ratio = budgets[0].budget[measure] / stated
        more = 1 / ratio if measure == "compression_ratio" else ratio
        assert (more > 1.01) == ("more than asked" in answer.budget) and (abs(ratio - 1) <= 0.01) == answer.same_budget
    worse = [
        f.retained_frac
        for f in figures()
        if f.policies == block["kind"] and f.model == answer.model and f.budget == budgets[0].budget and f.full_score
    ]
    assert answer.retained_frac == pytest.approx(min(worse))


# -- where it is shown ------------------------------------------------------------------------------------------------


def test_report_summary_and_list_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    command = ["run", "scenarios/a100_llama8b.yaml", "--set", "workload.num_requests=110"]
    command += [part for name in ("full", "kv-compress-4x", "snapkv+think") for part in ("--policy", name)]
    assert main([*command, "--sections", "quality,full_quality"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"kv-compress-4x +90\.0 +4x +llama-3\.1-8b +LongBench, summarisation", text)
    assert re.search(r"snapkv\+think +-", text) and "arXiv 2410.00161" in text and "\nfull" not in text
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["policies"]
    assert data["kv-compress-4x"]["published_quality"]["score"] == 90
    assert data["full"]["published_quality"] is None and data["snapkv+think"]["published_quality"] is None
    assert main(["list", "quality"]) == 0
    listing = capsys.readouterr().out
    assert "0.018" in listing and all(str(policy) in listing for policy in {figure.policies for figure in figures()})
    assert max(len(line) for line in listing.splitlines()) <= 100
