"""The report of `kvsim calibrate decode`: pools filled for real against the simulator's count, and the command as a whole."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the decoder needs torch")
pytest.importorskip("triton", reason="packing is shared with the Triton kernels")

from kvsim.calibrate import decode_command  # noqa: E402
from kvsim.calibrate.decode_report import DECODE_HEADS, FIT_HEADS, decode_lines, fit_lines, make_reports, notes  # noqa: E402
from kvsim.calibrate.decoder.capacity import largest_batch  # noqa: E402
from kvsim.calibrate.decoder.decoder import Decoder  # noqa: E402
from kvsim.calibrate.decoder.memory import PeakMemory  # noqa: E402
from kvsim.calibrate.decoder.predict import Predictor  # noqa: E402
from kvsim.calibrate.decoder.sample import CHUNK_TOKENS, packed, sample_decode  # noqa: E402
from kvsim.calibrate.decoder.spec import spec_of  # noqa: E402
from kvsim.calibrate.decoder.study import Study, ended_cases, make_plan, measure, open_rows  # noqa: E402
from kvsim.calibrate.decoder.transformer import Transformer  # noqa: E402
from kvsim.calibrate.decoder.weights import random_weights  # noqa: E402
from kvsim.cli import main  # noqa: E402
from kvsim.errors import InputError  # noqa: E402
from kvsim.hardware import load_gpu  # noqa: E402
from kvsim.model import Model  # noqa: E402
from kvsim.policies.ada_kv import AdaKV  # noqa: E402
from kvsim.policies.base import Policy  # noqa: E402
from kvsim.policies.h2o import H2O  # noqa: E402
from kvsim.policies.kivi import KIVI  # noqa: E402
from kvsim.policies.kv_quant import KVQuant  # noqa: E402
from kvsim.policies.scissorhands import Scissorhands  # noqa: E402
from kvsim.policies.snapkv import SnapKV  # noqa: E402
from kvsim.policies.think import ThinK  # noqa: E402
from kvsim.policies.window import Window  # noqa: E402
from kvsim.profiles import load_profile  # noqa: E402

TINY = Model("tiny", 2, 32, 4, 2, 16, 48, 53, 1024)
CPU = torch.device("cpu")
DEVICE_FILE = Path(__file__).parents[2] / "calibrate/results/cpu-intel-xeon-processor-1-threads/device.yaml"
POLICIES: dict[str, list[Policy]] = {
    "full": [],
    "h2o": [H2O(budget_tokens=24)],
    "window": [Window(window_tokens=32)],
    "scissorhands": [Scissorhands(budget_tokens=40, recent_tokens=4, history_window_tokens=20)],
    "snapkv": [SnapKV(budget_tokens=32, window_tokens=8)],
    "snapkv + think": [SnapKV(budget_tokens=48, window_tokens=8), ThinK(recent_tokens=8, pruned_frac=0.5)],
    "int4": [KVQuant(dtype="int4")],
}


def study(**changed: object) -> Study:
    fields = {
        "models": {"tiny": TINY}, "policies": {name: POLICIES[name] for name in ("full", "h2o")}, "batches": (1, 3),
        "contexts": (20, 60), "chunks": (16,), "priors": (0,), "pool_bytes": 2_000_000, "steps": 2,
        "fit_models": ("tiny",), "fit_contexts": (60,), "fit_pool_bytes": 300_000,
    }  # fmt: skip
    return Study(**{**fields, **changed})  # type: ignore[arg-type]


def decoder_of(policies: list[Policy], pool_bytes: int) -> Decoder:
    spec = spec_of(TINY)
    plan = make_plan(TINY, policies, "fp32", 16, "p", "torch")
    return Decoder(Transformer(spec, random_weights(spec, torch.float32, "cpu")), plan, pool_bytes)


def predictor_of(decoder: Decoder) -> Predictor:
    return Predictor(TINY, decoder.plan, load_profile("datasheet", load_gpu("a100-sxm-80gb"), "torch_decoder", Path()))


# -- the largest batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [20, 75])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_holds_as_many_as_the_simulator_says(policy: str, prompt: int) -> None:
    """By admission and decoding on one side, by counting units on the other; nothing is left behind in the pool."""
    decoder = decoder_of(POLICIES[policy], 200_000)
    found = largest_batch(decoder, prompt, 12)
    assert found.batch == predictor_of(decoder).largest_batch(200_000, prompt, 12) > 1
    assert 0 < found.held_bytes <= 200_000
    assert decoder.budget.held_bytes == 0 and len(decoder.full.free) == decoder.full.num_blocks


@pytest.mark.parametrize("policies", [[AdaKV(budget_tokens=32, window_tokens=8)], [KIVI(residual_tokens=32, group_size_tokens=16)]])
def test_uneven_heads_and_rings_are_near_it(policies: list[Policy]) -> None:
    """Heads that differ as the data has it end anywhere in a block; rings are reserved in whole units by the simulator."""
    decoder = decoder_of(policies, 400_000)
    found, said = largest_batch(decoder, 75, 12), predictor_of(decoder).largest_batch(400_000, 75, 12)
    assert found.batch == pytest.approx(said, abs=max(1, 0.2 * said))


def test_the_batch_found_decodes_and_one_more_does_not() -> None:
    """Steps take further blocks: fewer sequences live through them than are admitted."""
    decoder = decoder_of([], 330_000)
    few, many = (largest_batch(decoder, 60, steps) for steps in (1, 60))
    assert few.batch > many.batch and many.tries > 1


def test_a_pool_too_small_for_one_holds_none() -> None:
    for policies in ([], [KIVI(residual_tokens=32, group_size_tokens=16)]):
        decoder = decoder_of(policies, 10_000)
        assert largest_batch(decoder, 200, 2).batch == 0
        assert predictor_of(decoder).largest_batch(10_000, 200, 2) == 0
        assert decoder.budget.held_bytes == 0


# -- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "tokens"), [(1, 5), (3, CHUNK_TOKENS), (4, 300), (2, 2 * CHUNK_TOKENS + 1)])
def test_prompts_are_packed_whole_and_in_order(batch: int, tokens: int) -> None:
    steps = list(packed(batch, tokens))
    done = [0] * batch
    for step in steps:
        assert sum(new for _, new, _ in step) <= CHUNK_TOKENS
        for index, new, prior in step:
            assert prior == done[index] and all(done[before] == tokens for before in range(index))
            done[index] += new
    assert done == [tokens] * batch
    assert len(steps) == -(-batch * tokens // CHUNK_TOKENS)


def test_a_sample_has_the_cache_that_is_predicted() -> None:
    """H2O's prompts are whole in the pool before they are compressed: the peak is above what is held at the end."""
    decoder = decoder_of(POLICIES["h2o"], 2_000_000)
    sample = sample_decode(decoder, 3, 60, steps=2)
    assert sample.cache_bytes == predictor_of(decoder).cache_bytes(3, 60, 5)
    assert sample.cache_peak_bytes > sample.cache_bytes
    assert sample.prefill_s is not None and sample.prefill_s > 0 and sample.spread_frac >= 0
    assert decoder.budget.held_bytes == 0
    filled = sample_decode(decoder, 3, 60, steps=2, prefill=False)
    assert filled.prefill_s is None
    assert filled.cache_bytes == sample.cache_bytes
    assert [op for op, _ in filled.rows] == [op for op, _ in sample.rows]


def test_peak_memory_sees_what_is_taken_and_given_back() -> None:
    watch = PeakMemory(CPU)
    (name, before), = watch.read().items()
    torch.ones(40_000_000).sum()  # 160 MB
    assert watch.read()[name] >= max(before, 160_000_000)
    if name == "resident_peak_bytes":
        assert PeakMemory(CPU).read()[name] < watch.read()[name] or watch.read()[name] < before + 160_000_000


RESIDENT = """
import re, torch
from pathlib import Path
from kvsim.calibrate.decoder.heap import give_back_pages, keep_pages
def resident(): return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
kept, before = keep_pages(), resident()
torch.ones(5 << 20)
after = resident()
give_back_pages()
print(kept, after - before, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what is resident")
def test_memory_that_tensors_give_back_stays_until_it_is_asked_for() -> None:
    """In a process of its own, since the settings last; 20 MB are freed."""
    kept, after_mib, given_back_mib = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True
    ).stdout.split()
    if kept != "True":
        pytest.skip("this C library has no mallopt")
    assert float(after_mib) > 19 and float(given_back_mib) < float(after_mib) - 15


def test_weights_count_shared_tensors_once() -> None:
    tied = Model("tied", 2, 32, 4, 2, 16, 48, 53, 1024, tied_embeddings=True)
    sizes = [random_weights(spec_of(model), torch.float32, "cpu").num_bytes for model in (TINY, tied)]
    assert sizes[0] - sizes[1] == 53 * 32 * 4
    assert sizes[0] >= TINY.weight_bytes("fp32")


# -- the report -------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_a_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    small = study(pool_bytes=60_000, contexts=(20, 200), batches=(1,))
    file = open_rows(tmp_path, small, CPU)
    measure(small, CPU, file, 600, lambda done, total: None)
    file.close()
    reports = make_reports(small, predictor_of(decoder_of([], 10_000)).costs.profile, ended_cases(small, file), CPU)
    status = {(r["policy"], r["context_tokens"]): r["status"] for r in reports if r["kind"] == "decode step"}
    assert status["full", 20] == status["h2o", 20] == "step" and status["full", 200] == status["h2o", 200] == "out of memory"
    lines = decode_lines(reports, "tiny")
    assert all(len(line) == len(DECODE_HEADS) for line in lines) and ("full", "200", "1", "out of memory") in [line[:4] for line in lines]
    assert all(len(line) == len(FIT_HEADS) for line in fit_lines(reports))


def test_what_the_backend_refuses_is_a_row_and_a_line(tmp_path: Path) -> None:
    small = study(attention="triton", contexts=(20,), batches=(1,))
    file = open_rows(tmp_path, small, CPU)
    measure(small, CPU, file, 600, lambda done, total: None)
    file.close()
    reports = make_reports(small, predictor_of(decoder_of([], 10_000)).costs.profile, ended_cases(small, file), CPU)
    assert reports and {report["status"] for report in reports} == {"refused"}
    (line,) = [line for line in notes(reports) if line.startswith("refused")]
    assert "needs a cache of 16 bits, not float32; use attention=torch" in line
    with pytest.raises(InputError, match="attention"):
        open_rows(tmp_path, study(contexts=(20,), batches=(1,)), CPU)


def test_a_wide_spread_is_marked() -> None:
    report = {
        "model": "m", "policy": "p", "kind": "decode step", "context_tokens": 8, "batch": 2, "status": "step", "prefill_s": 1.0,
        "prefill_predicted_s": 1.1, "step_s": 0.5, "step_predicted_s": 0.4, "tokens_per_s": 4.0, "tokens_per_s_predicted": 5.0,
        "cache_bytes": 100, "cache_predicted_bytes": 100, "memory_peak_bytes": 2**20, "spread_frac": 0.11,
    }  # fmt: skip
    (line,) = decode_lines([report], "m")
    assert line[6] == "11% !" and line[7] == "-20%" and line[4] == "+10%" and line[-1] == "1"
    (line,) = decode_lines([{**report, "spread_frac": 0.1}], "m")
    assert line[6] == "10%"


def test_the_command_reports_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after a few cases, run again to the end: every case once, in CSV and tables."""
    shutil.copy(DEVICE_FILE, tmp_path / "device.yaml")
    threads, small = torch.get_num_threads(), study()
    monkeypatch.setattr(decode_command, "cpu_study", lambda: small)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_command.run_study(CPU, tmp_path, 600, stop)
    try:
        assert main(["calibrate", "decode", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "steps that only decode, torch, eager: no graphs on a CPU: full, h2o" in shown
    assert "Largest batch that a pool holds" in shown and "Decoding of model tiny" in shown and "wrote" in shown
    with (tmp_path / "decode.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    decoded = [row for row in rows if row["kind"] == "decode step"]
    assert {(row["policy"], row["context_tokens"], row["batch"]) for row in decoded} == {
        (policy, tokens, batch) for policy in ("full", "h2o") for tokens in ("20", "60") for batch in ("1", "3")
    }
    for row in decoded:
        assert float(row["cache_bytes"]) == float(row["cache_predicted_bytes"])
        assert float(row["tokens_per_s"]) == pytest.approx(int(row["batch"]) / float(row["step_s"]))
        assert float(row["memory_peak_bytes"]) > float(row["weight_bytes"]) > 0
    fits = [row for row in rows if row["kind"] == "largest batch"]
    assert len(fits) == 2 and all(row["batch"] == row["batch_predicted"] for row in fits)
