"""The worked scenarios give the answers that were read and agreed to; `python tests/golden/regenerate.py` writes them anew."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from compare import difference
from regenerate import CASES, ROOT, command, expected_path, printed

SECONDS = 8.0


@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_expected_ones(case: str) -> None:
    began = time.process_time()
    text = printed(command(case))
    took = time.process_time() - began
    first, expected = expected_path(case).read_text(encoding="utf-8").split("\n", 1)
    assert first == f"$ kvsim {' '.join(command(case))}"
    assert not difference(expected, text), f"{difference(expected, text)}: python tests/golden/regenerate.py, if that is meant"
    assert took < SECONDS


def test_every_scenario_has_an_answer_and_every_answer_a_scenario() -> None:
    """Sweeps and plans have tests of their own."""
    worked = {path.name for path in (ROOT / "scenarios").glob("*.yaml") if not path.name.startswith(("sweep_", "plan_"))}
    assert worked == {case[0] for case in CASES.values()}
    assert {path.stem for path in Path(__file__).parent.glob("*.txt")} == set(CASES)


def test_the_comparison_sees_what_differs() -> None:
    assert difference("full 1,234 tok/s ok", "full 1,235 tok/s   ok") == ""
    assert difference("full 100 ok", "full 102 ok") == "expected 100, found 102"
    assert difference("full 100 ok", "full 100 MISSED") == "expected 'ok', found 'MISSED'"
    assert difference("full 100 ok", "full 100 ok ok") == "expected 3 words, found 4"


def test_two_gpus_cannot_bear_what_four_can() -> None:
    """What the 70B scenario is there to show, whatever its numbers."""
    two, four = (expected_path(case).read_text(encoding="utf-8") for case in ("h100_llama70b_2_gpus", "h100_llama70b"))
    assert "No policy meets the SLO" in two and "Every policy meets the SLO" in four
