"""The suite `hardware`: transcriptions against the sources' own totals, predictions against single Ops, bars, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

import pytest

from kvsim.cli import main
from kvsim.hardware import list_gpus, load_gpu
from kvsim.model import load_model
from kvsim.ops import Copy, Gemm
from kvsim.profiles import load_profile
from kvsim.scenario import parse_scenario
from kvsim.validation import hardware, hardware_serving
from kvsim.validation.cases import Row
from kvsim.validation.naive import ROOFLINE
from kvsim.validation.published_rates import BESTS, COPIES, SIZES, SWEEPS
from kvsim.validation.run import run_cases, validate

SUMMARIES = {
    "L4": (15.38, 68.83, 70.89), "A10G": (23.37, 69.47, 69.47), "A40": (23.73, 119.18, 122.29), "H100 PCIe": (36.95, 458.03, 495.93),
    "H800 PCIe": (37.77, 478.23, 503.83), "A100-PCIE-40GB": (17.56, 241.49, 234.14), "H100 80GB HBM3": (51.88, 760.04, 797.51),
    "RTX PRO 6000 Blackwell Server Edition": (78.99, 406.97, 417.34),
}  # fmt: skip
"""Best fp32, fp16 and bf16 rates, from the line that each issue opens with."""
NUM_PARAMS = {
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-4b": 4_022_468_096, "qwen3-14b": 14_768_307_200, "qwen2.5-72b": 72_706_203_648, "llama-33b": 32_528_943_616,
    "qwen2.5-7b-1m": 7_615_616_512,
}  # fmt: skip
"""Of the Hugging Face repositories' safetensors, tied matrices once."""


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return hardware.rows()


def test_each_sweep_has_the_best_rates_that_its_issue_sums_up() -> None:
    assert {sweep.card for sweep in SWEEPS} == set(SUMMARIES)
    for sweep in SWEEPS:
        assert tuple(max(sweep.tflops[dtype]) for dtype in ("fp32", "fp16", "bf16")) == SUMMARIES[sweep.card], sweep.card


def test_published_rates_name_gpus_of_the_catalogue_and_are_possible() -> None:
    """Half-rate cards exceed their datasheet's peak by 3 to 13 per cent, by boosting beyond the stated clock."""
    for entry in (*SWEEPS, *BESTS, *COPIES):
        assert entry.gpu in list_gpus() and entry.source
    for sweep in SWEEPS:
        assert all(0 < rate <= load_gpu(sweep.gpu).peak_flops(dtype) / 1e12 for dtype, rates in sweep.tflops.items() for rate in rates)
    for best in BESTS:
        assert all(0 < rate <= 1.15 * load_gpu(best.gpu).peak_flops(dtype) / 1e12 for dtype, rate in best.tflops.items()), best.gpu
    for copy in COPIES:
        assert copy.num_bytes > 2 * load_gpu(copy.gpu).l2_bytes
        assert 0 < copy.gb_per_s * 1e9 < load_gpu(copy.gpu).hbm_bandwidth_bytes_per_s


def test_a_rate_is_the_answer_of_the_profile(rows: list[Row]) -> None:
    (row,) = [row for row in rows if row.case == "A40 bf16 4096"]
    seconds = load_profile("auto", load_gpu("a40"), "vllm").answer(Gemm(4096, 4096, 4096, "bf16")).seconds
    assert row.predicted == pytest.approx(2 * 4096**3 / seconds / 1e12) and row.truth == 115.16
    assert row.naive[hardware.PEAK] == row.naive[ROOFLINE] == pytest.approx(149.7)
    (row,) = [row for row in rows if row.case == "L4 bf16 1024"]  # three matrices of 2 MiB at 300 GB/s take longer than the products
    assert row.naive[ROOFLINE] == pytest.approx(2 * 1024**3 / (3 * 2 * 1024**2 / 300e9) / 1e12)
    (row,) = [row for row in rows if row.case == "L4 bf16 1 x 4096"]
    assert row.naive[ROOFLINE] == pytest.approx((2 * 4096**2 + 4 * 4096) / 300e9 * 1e6)


def test_the_best_of_sizes_is_the_largest_rate_of_them(rows: list[Row]) -> None:
    profile = load_profile("auto", load_gpu("rtx-a6000"), "vllm")
    rates = [2 * n**3 / profile.answer(Gemm(n, n, n, "bf16")).seconds / 1e12 for n in SIZES]
    (row,) = [row for row in rows if row.case == "rtx-a6000-48gb bf16, best of sizes"]
    assert row.predicted == pytest.approx(max(rates)) and row.truth == 123.34


def test_a_card_that_differs_is_priced_with_what_differs(rows: list[Row]) -> None:
    (row,) = [row for row in rows if row.case == "A100-PCIE-40GB bf16 8192"]
    same = load_profile("auto", load_gpu("a100-pcie"), "vllm").answer(Gemm(8192, 8192, 8192, "bf16")).seconds
    assert row.predicted < 2 * 8192**3 / same / 1e12  # 250 W in place of 300
    copies = [row for row in rows if row.group == "device copy" and row.case.startswith("a100-pcie")]
    assert {row.naive[ROOFLINE] for row in copies} == {1555.0, 1935.0}
    seconds = load_profile("auto", load_gpu("t4"), "vllm").answer(Copy("hbm", 32_000_000)).seconds
    (row,) = [row for row in rows if row.case == "t4-16gb, 32 MB"]
    assert row.predicted == pytest.approx(2 * 32e6 / seconds / 1e9)


def test_groups_tell_carried_gpus_from_measured_ones(rows: list[Row]) -> None:
    carried = {row.group.partition(": ")[2] for row in rows if row.group.startswith("GEMM: ")}
    own = {row.group.partition(": ")[2] for row in rows if row.group.startswith(hardware.OWN)}
    assert carried == {
        "l4-24gb", "a10g-24gb", "a40-48gb", "h100-pcie-80gb", "a100-pcie-80gb", "t4-16gb", "rtx-a6000-48gb", "rtx-pro-6000-96gb",
        "rtx-5090-32gb",
    }  # fmt: skip
    assert len(own) == 7 and not carried & own
    assert all(not hardware.has_table(load_gpu(name)) for name in carried)
    assert all(row.confidence for row in rows if row.case.startswith(("H800", "A100-PCIE", "t4-16gb fp16")))


def test_16_bit_products_meet_their_bar_and_beat_the_naive_models(rows: list[Row]) -> None:
    (bar,) = hardware.bars(rows)
    assert bar.met and bar.limit == 0.10, bar
    carried = [row for row in rows if row.group.startswith("GEMM: ")]
    assert len(carried) == 70
    for name, factor in ((ROOFLINE, 0.25), (hardware.PEAK, 0.25), (hardware.DATASHEET, 0.7)):
        assert bar.value < factor * median(abs(row.naive[name] / row.truth - 1) for row in carried), name


def test_the_bar_is_over_gpus_without_a_table_alone(rows: list[Row]) -> None:
    wrong = [Row("hardware", f"{hardware.OWN}: h100-sxm-80gb", "x", "TFLOP/s", 1.0, 9.0, "a source")] * 200
    assert hardware.bars([*rows, *wrong]) == hardware.bars(rows)
    wrong = [Row("hardware", f"{hardware.CARRIED}: t4-16gb", "x", "TFLOP/s", 1.0, 9.0, "a source")] * 200
    assert not hardware.bars([*rows, *wrong])[0].met
    stated = Row("hardware", f"{hardware_serving.STATED}: l4-24gb", "x", "tpot_ms", 10.0, 12.0, "a source")
    partly = Row("hardware", f"{hardware_serving.PARTLY}: l4-24gb", "x", "tpot_ms", 10.0, 90.0, "a source")
    (bar,) = hardware.bars([stated, partly])
    assert bar.value == pytest.approx(0.2) and not bar.met


def test_claimed_bands_hold_what_they_say(rows: list[Row]) -> None:
    shares = {row.case: row.predicted for row in rows if row.metric == "share"}
    assert shares["measurements within 16-84 %"] >= 0.68 and shares["measurements within 2.5-97.5 %"] >= 0.95


def test_models_that_the_catalogue_lacks_have_their_published_sizes() -> None:
    with hardware.model_folder() as folder:
        for name, num_params in NUM_PARAMS.items():
            model = load_model(Path(folder) / f"{name}.json")
            assert model.num_params == num_params, name
        assert {path.stem for path in Path(folder).glob("*.json")} == set(NUM_PARAMS)


def test_serving_cases_are_plain_scenarios() -> None:
    with hardware.model_folder() as folder:
        cases = hardware.cases(Path(folder), quick=False)
        for case in cases:
            assert "profile" not in case.scenario and len(case.scenario["policies"]) == 1
            parse_scenario(case.scenario)
            assert case.source and case.truths and ROOFLINE in case.naive
            if case.group.startswith(hardware_serving.BY_SETTING):
                assert bool(case.confidence) == ("partly stated" in case.group), case.name
                continue
            assert case.confidence or not case.group.startswith(hardware_serving.PARTLY), case.name
            assert not hardware.has_table(load_gpu(case.scenario["gpu"]))
    assert len({(case.group, case.name) for case in cases}) == len(cases)


def test_decode_rates_of_an_l4() -> None:
    """A 1.7B model from 1 to 256 users: within 12 %, where a roofline is 27-61 % too quick."""
    with hardware.model_folder() as folder:
        mine = [case for case in hardware.cases(Path(folder), quick=False) if case.name.startswith("qwen3-1.7b c=")]
        rows = run_cases(mine, 1)
    assert len(rows) == 5 and max(abs(row.error) for row in rows) < 0.12
    assert min(row.naive[ROOFLINE] / row.truth for row in rows) > 1.25


def test_the_suite_needs_no_measured_files(tmp_path: Path) -> None:
    report = validate(("hardware",), tmp_path, quick=True)
    assert not report.skipped and {row.suite for row in report.rows} == {"hardware"}
    assert not [row for row in report.rows if math.isnan(row.predicted)]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["validate", "hardware", "--quick", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert code == (0 if all(bar["met"] for bar in content["bars"]) else 1)
    assert {bar["suite"] for bar in content["bars"]} == {"hardware"}
    assert {row["metric"] for row in content["rows"]} >= {"TFLOP/s", "GB/s", "us", "share", "ttft_ms"}
