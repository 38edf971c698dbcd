"""Serving by setting in the suite `hardware`: transcriptions against their sources' totals, and what kvsim makes of the runs."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from kvsim.hardware import list_gpus
from kvsim.validation import hardware, hardware_serving
from kvsim.validation.cases import Row
from kvsim.validation.naive import ROOFLINE
from kvsim.validation.run import run_cases
from kvsim.validation.serving_lengths import LENGTHS
from kvsim.validation.serving_runs import runs


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with hardware.model_folder() as folder:
        cases = [case for case in hardware.cases(Path(folder), quick=False) if case.group.startswith(hardware_serving.BY_SETTING)]
        return run_cases(cases, 1)


def of(rows: list[Row], setting: str, part: str = "") -> list[Row]:
    found = [row for row in rows if row.group.endswith(f": {setting}") and part in row.case]
    assert found
    return found


def test_recorded_lengths_have_the_totals_of_their_results() -> None:
    """320 requests: total_input_tokens and total_output_tokens of the file; answers that ended at once count one here."""
    pairs = LENGTHS["mistral-7b, 320"].pairs
    assert len(pairs) == 320 and sum(prompt for prompt, _ in pairs) == 73_671
    assert sum(output for _, output in pairs) == 71_545 + 34
    assert all(len(LENGTHS[name].pairs) == 10 for name in LENGTHS if name.startswith(("mistral-7b, 10", "llama")))


def test_runs_are_on_gpus_of_the_catalogue_and_say_where_they_are_from() -> None:
    assert len({(run.setting, run.name) for run in runs()}) == len(runs()) > 80
    for run in runs():
        assert run.gpu in list_gpus() and run.source and run.truths and all(value > 0 for value in run.truths.values())
        assert isinstance(run.workload, dict) or run.workload in LENGTHS


def test_runs_cover_engines_cards_weights_and_tensor_parallelism() -> None:
    assert {run.engine["kind"] for run in runs()} == {"vllm_v0", "vllm_v1", "sglang", "trtllm", "huggingface"}
    assert {run.weight_dtype for run in runs()} == {"bf16", "fp16", "fp8", "int4"}
    assert {run.tp for run in runs()} == {1, 2, 4, 8} and len({run.gpu for run in runs()}) == 8


def test_half_of_the_runs_are_within_an_eighth_where_a_roofline_errs_by_more_than_half(rows: list[Row]) -> None:
    assert not any(row.predicted != row.predicted for row in rows)
    assert median(abs(row.error) for row in rows) < 0.12
    assert median(abs(row.naive[ROOFLINE] / row.truth - 1) for row in rows if ROOFLINE in row.naive) > 0.6


def test_eight_mi300x_at_most_load_and_in_small_batches(rows: list[Row]) -> None:
    eight = of(rows, "AMD", "tp8")
    assert len(eight) == 30 and median(abs(row.error) for row in eight) < 0.18
    assert all(-0.06 < row.error < 0.45 for row in eight)


def test_one_stream_is_within_6_per_cent_on_two_cards(rows: list[Row]) -> None:
    assert all(abs(row.error) < 0.06 for row in of(rows, "one stream", "tp1 1"))  # 5 % before the host was measured


def test_hugging_face_slows_down_with_its_context_as_measured(rows: list[Row]) -> None:
    seven = of(rows, "Hugging Face", "7b")
    assert len(seven) == 4 and all(abs(row.error) < 0.08 for row in seven)
    assert seven[0].truth / seven[-1].truth == pytest.approx(seven[0].predicted / seven[-1].predicted, rel=0.05)


def test_tensorrt_llm_at_most_load(rows: list[Row]) -> None:
    """All lengths but the one that is bound by host work over 2,048 sequences."""
    found = [row for row in of(rows, "fp8 at most load, TensorRT-LLM") if " 128+128" not in row.case]
    assert len(found) == 19 and all(abs(row.error) < 0.15 for row in found)


def test_weights_of_fewer_bits_under_vllm_on_an_a100_are_no_further_off_than_written(rows: list[Row]) -> None:
    marlin = [*of(rows, "4-bit weights"), *of(rows, "8-bit weights", "at once, vLLM")]
    assert len(marlin) == 4 and all(0 < row.error < 0.25 for row in marlin)
