"""The benchmark of the kernels, run on the CPU, where it times the references: rows, resumption, refusals, baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvsim.kernels import KERNELS, bench, bench_cases, bench_timing, load

CPU = torch.device("cpu")


def measure(out: Path, *options: str) -> list[dict[str, Any]]:
    assert bench.main(["--device", "cpu", "--out", str(out), *options]) == 0
    return json.loads((out / "kernels.json").read_text())["rows"]


def test_rows_say_what_was_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure(tmp_path, "--kernels", "select,metric_pool")
    header = json.loads((tmp_path / "kernels.json").read_text())["header"]
    assert header["torch"] == torch.__version__ and header["device"].startswith("cpu") and header["ceilings"]["copy_gb_per_s"] > 0
    assert {(row["kernel"], row["variant"]) for row in rows} == {
        ("select", "reference"), ("select", "torch topk"), ("metric_pool", "reference")
    }  # fmt: skip
    for row in rows:
        assert row["status"] == "ok" and 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["p50_us"] / 1e3, rel=1e-3)
        assert row["of_copy_frac"] == pytest.approx(row["gb_per_s"] / header["ceilings"]["copy_gb_per_s"])
        module = load(row["kernel"])
        assert row["bytes_moved"] == module.bytes_moved(module.Shape(**row["shape"]))
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    assert measure(tmp_path, "--kernels", "select,metric_pool") == rows, "a second run measures nothing again"
    assert capsys.readouterr().out == ""
    more = measure(tmp_path, "--kernels", "select,think_gather")
    assert more[: len(rows)] == rows and {row["kernel"] for row in more[len(rows) :]} == {"think_gather"}


def test_a_spent_budget_leaves_rows_for_the_next_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(tmp_path, "--kernels", "metric_pool", "--budget-s", "0") == []
    assert "2 rows are missing" in capsys.readouterr().out
    assert len(measure(tmp_path, "--kernels", "metric_pool")) == 2


def test_a_failing_kernel_is_a_row_that_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_inputs: Any) -> None:
        raise RuntimeError("out of memory\nand much more")

    with monkeypatch.context() as patch:
        patch.setattr(load("metric_pool"), "reference", fails)
        assert {row["status"] for row in measure(tmp_path, "--kernels", "metric_pool")} == {"RuntimeError: out of memory"}
    assert {row["status"] for row in measure(tmp_path, "--kernels", "metric_pool")} == {"ok"}


def test_another_device_or_version_is_refused(tmp_path: Path) -> None:
    measure(tmp_path, "--kernels", "metric_pool")
    content = json.loads((tmp_path / "kernels.json").read_text())
    content["header"]["torch"] = "0.1"
    (tmp_path / "kernels.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"kernels.json:torch='0.1' must be .* to go on here; give another --out"):
        bench.main(["--device", "cpu", "--out", str(tmp_path), "--kernels", "metric_pool"])


@pytest.mark.parametrize(("options", "message"), [(["--kernels", "flash"], "--kernels flash: must be of"),
                                                  (["--device", "cuda"], "torch finds no GPU here")])  # fmt: skip
def test_bad_options_are_refused(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench.main([*options, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_every_kernel_has_cases_and_a_gpu_run_fits_its_budget() -> None:
    """Some hundred rows at most: at 0.15 s each and a few seconds to compile, within 480 s."""
    assert set(bench_cases.SHAPES) == set(KERNELS)
    rows = [(name, shape) for name in KERNELS for shape in bench_cases.cases(name, small=False)]
    assert len(rows) == len({(name, repr(shape)) for name, shape in rows}) <= 100
    assert all(next(bench_cases.cases(name, small=True)) for name in KERNELS)


def test_decode_cases_are_past_the_sizes_of_the_design_goals() -> None:
    """Plain decode attention is judged for KV past 256 MB, int4 past 1 GB of what bf16 would take."""
    def kv_bytes(shape: Any) -> int:
        return 4 * shape.head_dim * sum(shape.pair_lengths())

    assert all(kv_bytes(shape) > 256e6 for shape in bench_cases.cases("decode_attention", small=False))
    quantised = list(bench_cases.cases("kv_quant_decode_attention", small=False))
    assert {shape.format for shape in quantised} == set(bench_cases.FORMATS) and all(kv_bytes(shape) > 1e9 for shape in quantised)


def test_rings_are_larger_than_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"x": torch.zeros(1000), "same": None, "count": 3}
    monkeypatch.setattr(bench_timing, "cache_bytes", lambda device: 20000)
    ring = bench_timing.ring_of(first, CPU)
    assert len(ring) * 4000 > 40000 and len({inputs["x"].data_ptr() for inputs in ring}) == len(ring)
    assert all(inputs["count"] == 3 for inputs in ring)


@pytest.mark.parametrize("group", [1, 4])
def test_torch_attention_does_what_the_kernel_does(group: int) -> None:
    module = load("decode_attention")
    shape = module.Shape(batch=2, kv_heads=2, tokens=33, head_dim=64, group=group, dtype="float16")
    inputs = module.make_inputs(shape, np.random.default_rng(), "cpu")
    name, call = bench_cases.baseline("decode_attention", shape)
    floats = {key: value.float() if key in ("q", "k", "v") else value for key, value in inputs.items()}
    assert name.startswith("torch") and torch.allclose(call(floats).squeeze(2).double(), module.reference(**inputs)[0], atol=1e-5)


def test_torch_index_select_does_what_compact_does() -> None:
    module = load("compact")
    shape = module.Shape(batch=2, kv_heads=3, tokens=40, kept_frac=0.3)
    inputs = module.make_inputs(shape, np.random.default_rng(), "cpu")
    _, call = bench_cases.baseline("compact", shape)
    k, v = call(inputs)
    kept = inputs["kept"].long()[..., None].expand(-1, -1, -1, shape.head_dim)
    assert torch.equal(k.view(kept.shape), inputs["k"].gather(2, kept)) and torch.equal(v.view(kept.shape), inputs["v"].gather(2, kept))
