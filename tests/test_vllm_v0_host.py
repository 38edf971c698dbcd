"""Host work and sampler of vLLM's V0 engine: constants are the fit of committed rows, and bands hold the other witnesses."""

from __future__ import annotations

import csv
from math import exp
from pathlib import Path

import numpy as np
import pytest

from kvsim.datasheet import DatasheetProfile
from kvsim.efficiencies import load_efficiencies
from kvsim.engines import SgLang, VllmV0, VllmV1
from kvsim.forward import num_launches_per_step
from kvsim.hardware import load_gpu
from kvsim.model import load_model
from kvsim.ops import Elementwise, HostWork

ROOT = Path(__file__).parents[1]
VIDUR = ROOT.parent / "shared" / "measured" / "step_cpu_overheads.csv"
MODEL = load_model("llama-3.1-8b")
ENGINES = {"vllm_v1": VllmV1, "sglang": SgLang}
PROFILE = DatasheetProfile(load_gpu("h100-sxm-80gb"))


def step_us(batch: int) -> float:
    before, beside, after = VllmV0().host_ops(batch, 0)
    return 1e6 * sum(PROFILE.answer(op).seconds for op in (*before, *beside, *after))


def test_constants_are_the_fit_of_the_committed_rows(host_rows) -> None:  # type: ignore[no-untyped-def]
    efficiencies, rows = load_efficiencies(), host_rows.read_rows(host_rows.V0)
    batch, times = host_rows.measured(host_rows.V0, rows)
    for part, line in host_rows.fit_lines(batch, times).items():
        for name, us in line._asdict().items():
            packaged = efficiencies[f"host.vllm_v0.{part}.{name.removesuffix('_us')}_s"]
            assert packaged == pytest.approx(1e-6 * us, rel=1e-3), (part, name)
    launch = efficiencies["host.vllm_v0.eager_launch.per_sequence_s"]
    assert launch == pytest.approx(1e-6 * host_rows.eager_launch_us(rows, MODEL), rel=1e-3)


def test_lines_meet_the_rows(host_rows) -> None:  # type: ignore[no-untyped-def]
    """A line over the batch leaves out the context: within a fifth up to 1,324 tokens, a half beyond."""
    rows = host_rows.read_rows(host_rows.V0)
    for longest, bound in ((1400, 0.2), (10**9, 0.5)):
        batch, times = host_rows.measured(host_rows.V0, [row for row in rows if int(row["context_tokens"]) <= longest])
        for size, measured_us in zip(batch, sum(times.values()), strict=True):
            assert step_us(int(size)) == pytest.approx(measured_us, rel=bound)


def test_the_band_holds_what_a_batch_run_leaves_out(host_rows) -> None:  # type: ignore[no-untyped-def]
    batch, times = host_rows.measured(host_rows.V0_OFFLINE, host_rows.read_rows(host_rows.V0))
    low, _, _, high = PROFILE.answer(HostWork("vllm_v0", "process", 1)).log_bias
    for size, measured_us in zip(batch, sum(times.values()), strict=True):
        assert exp(low) < measured_us / step_us(int(size)) < exp(high)


@pytest.mark.skipif(not VIDUR.exists(), reason="vidur's rows are not part of the project")
def test_the_band_holds_vidurs_rows() -> None:
    columns = ("schedule_median_ms", "prepare_inputs_e2e_median_ms", "model_execution_launch_median_ms", "sampler_e2e_median_ms",
               "process_model_outputs_median_ms")  # fmt: skip
    with VIDUR.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(line for line in file if line[0] != "#") if row["tp"] == "1"]
    low, _, _, high = PROFILE.answer(HostWork("vllm_v0", "process", 1)).log_bias
    ratios = np.array([sum(1e3 * float(row[c]) for c in columns) / step_us(int(row["batch"])) for row in rows])
    assert len(ratios) > 50
    assert exp(low) < ratios.min() and ratios.max() < exp(high)


def test_launches_of_an_engine_that_nobody_measured_stay_assumed() -> None:
    own = PROFILE.answer(HostWork("vllm_v0", "eager_launch", 288))
    other = PROFILE.answer(HostWork("torch_decoder", "eager_launch", 288))
    assert (own.size_class, other.size_class) == ("vllm_v0 eager_launch", "eager_launch")
    assert other.seconds == pytest.approx(288 * 10e-6)
    assert own.source.startswith("assumed") and own.log_bias != other.log_bias


def test_eager_launches_are_the_fit_of_whole_steps(host_rows) -> None:  # type: ignore[no-untyped-def]
    """Two models on two hosts agree about a launch of vLLM V1 within 3 %, and the simulated step is the measured one."""
    efficiencies = load_efficiencies()
    for engine in ("vllm_v1", "sglang"):
        launch = efficiencies[f"host.{engine}.eager_launch.per_sequence_s"]
        assert launch == pytest.approx(1e-6 * host_rows.engine_launch_us(engine), rel=1e-3)
    for step in host_rows.EAGER_STEPS:
        engine, model = ENGINES[step.engine](enforce_eager=True), load_model(step.model)
        launches = engine.num_launches(model, 1, "bf16")
        ops = [op for part in engine.host_ops(step.batch or 1, launches) for op in part]
        host_s = sum(PROFILE.answer(op).seconds for op in ops if step.batch or op.part == "eager_launch")
        assert 1e3 * host_s == pytest.approx(step.step_ms, rel=0.03)


def test_code_of_torch_compile_launches_quicker_than_modules() -> None:
    """vLLM V1 runs it wherever no graph was captured, unless enforce_eager is set."""
    parts = {eager: {op.part for ops in VllmV1(enforce_eager=eager).host_ops(8, 400) for op in ops} for eager in (False, True)}
    assert "compiled_launch" in parts[False] and "eager_launch" not in parts[False]
    assert "eager_launch" in parts[True] and "compiled_launch" not in parts[True]
    eager, compiled = (PROFILE.answer(HostWork("vllm_v1", part, 400)) for part in ("eager_launch", "compiled_launch"))
    assert eager.seconds > 5 * compiled.seconds
    assert compiled.source.startswith("assumed")


def test_a_layer_costs_what_was_measured_and_its_kernels_launches(host_rows) -> None:  # type: ignore[no-untyped-def]
    counted = num_launches_per_step(MODEL, 1, "bf16") // MODEL.num_layers
    layer_us = 1e6 * PROFILE.answer(HostWork("vllm_v0", "eager_launch", counted)).seconds
    python_us = [float(row["median_us"]) for row in host_rows.read_rows(host_rows.V0) if row["part"] == "layer"]
    bare = host_rows.KERNELS_PER_LAYER * host_rows.CUDA_LAUNCH_US
    assert min(python_us) < layer_us - bare < max(python_us)


@pytest.mark.parametrize(("engine", "bytes_per_logit"), [(VllmV0(), 58), (VllmV1(), 10)])
def test_passes_of_the_sampler_over_16_bit_logits(engine: VllmV0 | VllmV1, bytes_per_logit: int) -> None:
    """V0: read 2, write 4; division in place 8; softmax and log-softmax 8 each; gather 8; noise 4; division by it 12; argmax 4."""
    sampler = list(engine.sampler_ops(32, MODEL.vocab_size, 2))
    assert sum(op.bytes_moved for op in sampler if isinstance(op, Elementwise)) == 32 * MODEL.vocab_size * bytes_per_logit
    assert len(sampler) == len(engine.sampler_kernels)
