"""`kvsim calibrate device`: nothing measured is lost, budgets hold, a known law is found again, and what fails is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvsim import cli, load_scenario, simulate
from kvsim.calibrate.device import report, supervise
from kvsim.calibrate.device.conclude import conclude
from kvsim.calibrate.device.device_file import TORCH_NAMES
from kvsim.calibrate.device.grids import HF_LAUNCHES_PER_LAYER, Scope, all_points, skewed_lengths
from kvsim.calibrate.device.op_json import op_from_json, op_to_json
from kvsim.calibrate.device.planner import Planner
from kvsim.calibrate.device.points import Point
from kvsim.calibrate.device.rows_file import RowFile
from kvsim.calibrate.device.session import TRYING, measure, open_rows
from kvsim.calibrate.device.timing import Skipped, Timing
from kvsim.datasheet import DatasheetProfile
from kvsim.efficiencies import load_efficiencies
from kvsim.engines import huggingface
from kvsim.errors import InputError
from kvsim.hardware import list_gpus, load_gpu
from kvsim.ops import Copy, DecodeAttention, Gemm, HostWork, PolicyKernel
from kvsim.profile_file import load_profile_file
from kvsim.profiles import load_profile

A100 = load_gpu("a100")
SMALL = all_points(Scope("cuda", "small"))
LAW = {
    "gemm.16bit.launch_s": 9e-6, "gemm.16bit.memory_frac": 0.6, "gemm.16bit.compute_frac": 0.5, "elementwise.memory_frac": 0.45,
    "decode_attention.launch_s": 2e-5, "decode_attention.memory_frac.16bit": 0.55, "prefill_attention.compute_frac": 0.35,
    "policy.memory_frac": 0.2, "copy.host_frac": 0.6, "host.huggingface.launch.per_sequence_s": 7e-6,
}  # fmt: skip


class Law:
    """A timer whose device follows the datasheet's physics under other constants, with 1 % of noise; its clock is its own."""

    def __init__(self, point_s: float = 0.1, fails=lambda point: None) -> None:
        self.truth = DatasheetProfile(A100, load_efficiencies().replaced(LAW))
        self.rng, self.now_s, self.point_s, self.fails = np.random.default_rng(0), 0.0, point_s, fails
        self.timed: list[Point] = []

    def clock(self) -> float:
        return self.now_s

    def identity(self):
        return {
            "device_type": "cuda", "device_name": "NVIDIA A100-SXM4-80GB", "plan": "full", "torch": "2.9.0+cu128",
            "cache_bytes": A100.l2_bytes, "cold_bytes": 2 * A100.l2_bytes,
        }  # fmt: skip

    def notes(self):
        return {
            "facts": {"multiprocessors": 108, "memory_bytes": A100.usable_bytes, "host_cpus": 8},
            "peak_flops_per_s": {"bf16": 3e14, "fp16": 3e14, "fp32": 1.9e13}, "copy_bytes_per_s": 1.8e12, "host_copy_bytes_per_s": 2.5e10,
        }  # fmt: skip

    def probe_s(self) -> float:
        return 1e-3

    def time(self, point: Point) -> Timing:
        self.now_s += self.point_s
        self.timed.append(point)
        error = self.fails(point)
        if error is not None:
            raise error
        seconds = self.truth.answer(point.op).seconds * float(np.exp(self.rng.normal(0.0, 0.01)))
        more = {"kernel_bytes": 1e6, "kernel_flops": 0.0, "kernel_s": seconds} if point.work.startswith("kernel") else {}
        return Timing(seconds, 0.99 * seconds, 1.01 * seconds, 10, "graph", True, more)


def calibrated(folder: Path, points, timer: Law, budget_s: float = 1e6):
    return measure(points, open_rows(folder, timer), timer, budget_s, clock=timer.clock)


# --- the whole command, on this machine -------------------------------------------------------------------------------
def command(out: Path, *more: str) -> list[str]:
    return ["calibrate", "device", "--device", "cpu", "--plan", "small", "--out", str(out), *more]


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def test_a_killed_run_goes_on_and_its_profile_drops_into_a_scenario(tmp_path, monkeypatch, capsys):
    """Killed half-way; run again: no row lost, none twice, all five files, and a scenario under both of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "laptop"
    options = ["--device", "cpu", "--plan", "small", "--out", str(out), "--budget-s", "60"]
    child = subprocess.Popen(
        [sys.executable, "-m", "kvsim.calibrate.device.worker", *options],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    end_s = time.monotonic() + 60
    enough = 75  # every group has had two turns by then, however slow the machine
    while len(lines_of(out / "rows.jsonl")) < enough and time.monotonic() < end_s:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = lines_of(out / "rows.jsonl")
    assert len(before) >= enough
    assert cli.main(command(out, "--budget-s", "8")) == 0
    after = lines_of(out / "rows.jsonl")
    assert after[: len(before)] == before
    rows = [json.loads(line) for line in after[1:]]
    keys = [row["key"] for row in rows if row["status"] != "probe"]
    assert len(keys) == len(set(keys)) > len(before) - 3 and set(keys) <= {point.key for point in all_points(Scope("cpu", "small"))}
    assert {row["op"]["kind"] for row in rows if row["status"] == "ok"} == {
        "gemm", "prefill_attention", "decode_attention", "mixed_attention", "elementwise", "sampling", "copy", "policy", "host"
    }  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["device.yaml", "kernels.json", "profile.json", "report.md", "rows.jsonl"]
    assert {row["kernel"] for row in json.loads((out / "kernels.json").read_text())["rows"]} >= {"compact", "select", "kv_quantize"}
    printed = capsys.readouterr().out
    assert "gemm fp32" in printed and "policy compact" in printed and "Errors on points" in printed
    assert "# Calibration of" in (out / "report.md").read_text()
    gpu = load_gpu(out / "device.yaml")
    assert gpu.vendor == "cpu" and gpu.peak_flops("fp32") > 1e9 and gpu.hbm_bandwidth_bytes_per_s > 1e8
    assert all(source.startswith(("measured", "reported", "assumed")) for source in gpu.sources.values())
    assert_scenario_rests_on(out, tmp_path)


def assert_scenario_rests_on(out: Path, folder: Path) -> None:
    model = {
        "name": "toy", "num_layers": 2, "hidden_size": 128, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32, "vocab_size": 256,
        "intermediate_size": 64, "max_context_tokens": 512,
    }  # fmt: skip
    (folder / "toy.yaml").write_text("\n".join(f"{name}: {value}" for name, value in model.items()))
    (folder / "s.yaml").write_text(
        f"gpu: {out.name}/device.yaml\nprofile: {out.name}/profile.json\nmodel: toy.yaml\nweight_dtype: fp32\n"
        "engine: {kind: huggingface}\n"
        "workload: {arrivals: {kind: constant, rate_per_s: 1}, num_requests: 3, seed: 0,"
        " lengths: {kind: fixed, prompt_tokens: 64, output_tokens: 8}}\n"
        "policies: {full: [], snap: [{kind: snapkv, budget_tokens: 40, window_tokens: 8}]}\n"
    )
    result = simulate(load_scenario(folder / "s.yaml"))
    basis = {row.op: row.source for row in result.policies["snap"].basis}
    for kind in ("gemm", "decode_attention", "elementwise", "policy:compact", "policy:select", "engine:cat_token"):
        assert f"on {load_gpu(out / 'device.yaml').name}" in basis[kind], (kind, basis)
    full, snap = (result.policies[name].summary for name in ("full", "snap"))
    assert full.output_tokens_per_s > 0 and snap.output_tokens_per_s > 0


def test_it_refuses_in_one_line(tmp_path, capsys):
    assert cli.main(command(tmp_path / "o", "--budget-s", "0")) == 2
    assert cli.main(command(tmp_path / "o", "--model", "no-such-model")) == 2
    assert cli.main(command(tmp_path / "o", "--fit-only")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition("=")[0] for line in errors] == ["kvsim: error: --budget-s", "kvsim: error: model", "kvsim: error: --out"]
    assert not (tmp_path / "o").exists()


# --- a law that is known ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def law(tmp_path_factory):
    """(folder, points measured, truth) of a calibration of 700 points of the full plan."""
    folder, timer = tmp_path_factory.mktemp("law"), Law()
    calibrated(folder, all_points(Scope("cuda", "full")), timer, budget_s=70.0)
    return folder, timer, conclude(folder, "test")


def test_the_fit_finds_the_law_on_points_that_it_has_not_seen(law):
    folder, timer, found = law
    profile = load_profile(str(folder / "profile.json"), A100, "torch")
    seen = set(timer.timed)
    unseen = [point for point in all_points(Scope("cuda", "full")) if point not in seen and point.fitted]
    errors: dict[str, list[float]] = {}
    for point in unseen[:: max(1, len(unseen) // 1500)]:
        name = f"{point.op.kind} {point.dtype}"
        errors.setdefault(name, []).append(abs(profile.answer(point.op).seconds / timer.truth.answer(point.op).seconds - 1.0))
    for name, most in (("gemm bfloat16", 0.05), ("decode_attention bfloat16", 0.06), ("prefill_attention bfloat16", 0.05)):
        assert np.median(errors[name]) < most, (name, np.median(errors[name]))
    for name in ("gemm.16bit.compute_frac", "prefill_attention.compute_frac", "elementwise.memory_frac", "copy.host_frac"):
        assert found.profile.efficiencies[name] == pytest.approx(LAW[name], rel=0.1), name


def test_kernels_links_and_host_work_are_answered_by_what_was_measured(law):
    folder, timer, _ = law
    profile, sheet = load_profile(str(folder / "profile.json"), A100, "torch"), DatasheetProfile(A100)
    for op in (
        PolicyKernel("compact", 32 * 3e7, 0.0, 32), PolicyKernel("select", 32 * 2e7, num_launches=32), Copy("host", 10_000_000),
        HostWork("huggingface", "launch", 700), PolicyKernel("cat_token", 8e7, 0.0, 1, "engine"),
    ):  # fmt: skip
        answer, truth = profile.answer(op), timer.truth.answer(op).seconds
        assert answer.seconds == pytest.approx(truth, rel=0.1), op
        assert abs(sheet.answer(op).seconds / truth - 1.0) > 0.2, "the datasheet alone would have been wrong"
        assert answer.source.startswith("measured: torch 2.9.0 on a100-sxm-80gb"), answer.source
        assert profile.log_biases[op.kind, answer.size_class] == answer.log_bias
        assert answer.log_bias[2] < 0.2
    absent = PolicyKernel("nobody_measured_this", 1e6)
    assert profile.answer(absent) == sheet.answer(absent)
    assert load_profile("auto", A100, "vllm").answer(PolicyKernel("compact", 1e8)).source.startswith("assumed")


def test_the_profile_is_a_file_like_the_shipped_ones(law):
    folder, _, found = law
    read = load_profile_file(folder / "profile.json")
    assert read.tables.keys() == found.profile.tables.keys() and ("policy", "compact", 0) in read.tables
    assert found.gpu.name == "a100-sxm-80gb", "a GPU of the catalogue keeps its name and datasheet"
    assert all(table.mape < 0.25 for key, table in read.tables.items() if key[0] in ("gemm", "prefill_attention", "copy"))
    assert found.skew and all(error.num_rows for error in found.skew)
    assert any(line[0].startswith("policy compact") for line in report.error_lines(found))


# --- the plan ---------------------------------------------------------------------------------------------------------
def test_every_group_has_its_turn_before_any_is_refined(tmp_path):
    points, timer = all_points(Scope("cuda", "full")), Law()
    groups = {point.group(108) for point in points}
    calibrated(tmp_path, points, timer, budget_s=0.1 * len(groups) + 1.0)
    assert {point.group(108) for point in timer.timed[: len(groups)]} == groups
    kinds = [point.op.kind for point in timer.timed]
    assert {point.op.kind for point in points} == set(kinds[: len(groups)])


def test_refinement_goes_where_the_error_is():
    """Of two groups alike but for noise, the one that cannot be predicted gets more of the points."""
    points = [Point(Gemm(m, n, 4096, dtype), "gemm", dtype) for dtype in ("bf16", "fp32") for m in range(1, 40) for n in (512, 4096, 8192)]
    planner, rng, counts = Planner(points, A100, 0.1, 100.0), np.random.default_rng(1), {"bf16": 0, "fp32": 0}
    physics = DatasheetProfile(A100)
    for turn in range(70):
        point, _ = planner.next(1e9)
        noise = rng.normal(0, 0.5) if point.dtype == "fp32" else 0.0
        planner.seen(point, physics.answer(point.op).seconds * float(np.exp(noise)), 0.1)
        if turn >= 20:
            counts[point.dtype] += 1
    assert counts["fp32"] > 2 * counts["bf16"], counts


@pytest.mark.parametrize("budget_s", [20.0, 60.0])
def test_the_budget_is_kept(tmp_path, budget_s):
    """Points of very different and unforeseen length; the last one may not run over by more than a fifth."""
    timer = Law()
    timer.time = lambda point, time=timer.time: (_spend(timer, point), time(point))[1]
    session = calibrated(tmp_path, all_points(Scope("cuda", "full")), timer, budget_s)
    assert 0.8 * budget_s <= timer.now_s <= 1.2 * budget_s and session.took_s == pytest.approx(timer.now_s)
    assert session.left > 0


def _spend(timer: Law, point: Point) -> None:
    timer.now_s += 0.02 + 200 * timer.truth.answer(point.op).seconds


# --- what goes wrong --------------------------------------------------------------------------------------------------
def test_failures_are_told_and_the_rest_goes_on(tmp_path):
    def fails(point: Point):
        if isinstance(point.op, Gemm) and point.op.weight_dtype == "fp8":
            return NotImplementedError("no kernel for Float8_e4m3fn")
        if isinstance(point.op, DecodeAttention) and point.op.kv_slots > 2000:
            return RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\nmore lines")
        return Skipped("needs 90 GiB of memory") if point.work == "mixed" else None

    points = [*SMALL, *(Point(Gemm(m, 64, 64, "fp8"), "gemm_fp8", "bfloat16") for m in range(1, 30))]
    timer = Law(fails=fails)
    calibrated(tmp_path, points, timer)
    statuses = {row["key"]: row["status"] for row in RowFile(tmp_path).rows}
    fp8 = [status for key, status in statuses.items() if "gemm_fp8" in key]
    assert fp8 == ["failed: NotImplementedError: no kernel for Float8_e4m3fn"] * 3, "a group that never succeeds is given up"
    assert sum(status == "failed: RuntimeError: CUDA out of memory. Tried to allocate 9 GiB" for status in statuses.values()) > 3
    found = conclude(tmp_path, "test")
    assert ("gemm", "16bit", 0) in found.profile.tables and ("gemm", "fp8", 0) not in found.profile.tables
    told = "\n".join(report.reasons(found.file.rows))
    for text in ("no kernel for Float8_e4m3fn", "CUDA out of memory", "needs 90 GiB of memory"):
        assert text in told
    report.write_report(tmp_path, found, "test")
    assert "out of memory" in (tmp_path / "report.md").read_text()
    again = Law()
    calibrated(tmp_path, points, again)
    assert not again.timed, "what failed is not tried again, unless that is asked for"
    RowFile(tmp_path).drop_failed()
    assert {row["status"] for row in RowFile(tmp_path).rows} == {"ok", "probe"}
    calibrated(tmp_path, points, again)
    assert {point.work for point in again.timed} >= {"gemm_fp8", "mixed", "decode"}


def test_a_slow_probe_and_shaky_points_are_noted(tmp_path):
    timer = Law(point_s=30.0)
    probes = iter([1e-3, 1e-3, *[1.5e-3] * 1000])
    timer.probe_s = lambda: next(probes)
    steady = timer.time
    timer.time = lambda point: replace(steady(point), p20_s=0.0)
    calibrated(tmp_path, SMALL, timer)
    notes = report.warnings(conclude(tmp_path, "test"))
    assert any("spread by more than 10%" in note for note in notes) and any("50% slower" in note for note in notes)


def test_a_torn_line_is_dropped_and_measured_again(tmp_path):
    timer = Law()
    calibrated(tmp_path, SMALL[:12], timer)
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-25])
    again = Law()
    calibrated(tmp_path, SMALL[:12], again)
    assert len(again.timed) == 1
    kept = whole[: whole[:-1].rindex(b"\n") + 1]
    assert path.read_bytes().startswith(kept) and RowFile(tmp_path).keys == {point.key for point in SMALL[:12]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"schema":1', '"schema":9'),
        lambda text: text.replace("A100-SXM4", "A100-SXM5", 1),
        lambda text: text.replace('"status":"ok"', '"status":7', 1),
        lambda text: text.replace('"kind":"gemm"', '"kind":"germ"', 1).replace('"kind":"copy"', '"kind":"cop"'),
        lambda text: text.replace("\n", "\nhalf a line\n", 1),
    ],
)
def test_rows_that_cannot_be_continued_stay_untouched(tmp_path, damage):
    calibrated(tmp_path, SMALL, Law())
    path = tmp_path / "rows.jsonl"
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    with pytest.raises(InputError, match="must be") as error:
        open_rows(tmp_path, Law())
    assert "\n" not in str(error.value) and path.read_bytes() == before


def test_a_point_that_ends_the_process_becomes_a_row_and_a_new_one_goes_on(tmp_path, monkeypatch):
    calibrated(tmp_path, SMALL[:3], Law())
    deaths = iter([(-signal.SIGILL, SMALL[3]), (supervise.TOO_SLOW, SMALL[4]), (supervise.DEVICE_LOST, SMALL[5]), (0, None)])
    asked = []

    def worker(options, folder, most_s):
        asked.append(list(options))
        code, point = next(deaths)
        if point is not None:
            row = {"key": point.key, "work": point.work, "group": point.group(108), "dtype": point.dtype, "op": op_to_json(point.op)}
            (folder / TRYING).write_text(json.dumps({**row, "details": {}}))
        return code, ""

    monkeypatch.setattr(supervise, "_run", worker)
    supervise.supervise(tmp_path, ["--device", "cpu", "--retry-failed"], 100.0)
    assert len(asked) == 4 and "--retry-failed" in asked[0] and "--retry-failed" not in asked[1]
    found = [row["status"] for row in RowFile(tmp_path).rows if row["status"].startswith("failed")]
    assert found == [
        "failed: the process died of SIGILL", "failed: took too long and was stopped", "failed: the device stopped answering"
    ]  # fmt: skip
    assert not (tmp_path / TRYING).exists()


def test_a_worker_that_hangs_in_a_point_is_stopped(tmp_path, monkeypatch):
    tmp_path.joinpath(TRYING).write_text("{}")
    os.utime(tmp_path / TRYING, (time.time() - 100, time.time() - 100))
    monkeypatch.setattr(supervise, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(supervise.sys, "executable", "/bin/sleep")
    real = subprocess.Popen
    monkeypatch.setattr(supervise.subprocess, "Popen", lambda command, **options: real(["sleep", "60"], **options))
    assert supervise._run([], tmp_path, 10.0) == (supervise.TOO_SLOW, "")


# --- data -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_points_are_what_the_cost_model_asks(device_type):
    points = all_points(Scope(device_type, "full", 8))
    assert len({point.key for point in points}) == len(points)
    assert {point.op.kind for point in points} == {
        "gemm", "prefill_attention", "decode_attention", "mixed_attention", "elementwise", "sampling", "collective", "copy", "policy",
        "host",
    }  # fmt: skip
    for point in points[:: max(1, len(points) // 400)]:
        assert op_from_json(json.loads(json.dumps(op_to_json(point.op)))) == point.op
        assert np.isfinite(point.coordinates(108)).all()
    assert huggingface._LAUNCHES_PER_LAYER == HF_LAUNCHES_PER_LAYER


def test_unlike_lengths_have_the_mean_and_the_skew_they_are_named_for():
    for pattern, amount in (("one_long", 4.0), ("lognormal", 1.0)):
        lengths = skewed_lengths(pattern, amount, 32, 512)
        assert sum(lengths) == pytest.approx(32 * 512, rel=0.01) and len(lengths) == 32 and min(lengths) >= 1
    assert max(skewed_lengths("one_long", 4.0, 32, 512)) == 4 * 512


def test_every_gpu_of_the_catalogue_is_known_by_what_torch_calls_it() -> None:
    assert sorted([*TORCH_NAMES.values(), "rtx-5090-32gb"]) == list_gpus()
