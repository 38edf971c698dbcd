"""`kvsim calibrate import`: what it prints, writes and refuses; the layout of the package aiconfigurator-core."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvsim.calibrate.import_command import rejected_lines, split_engine
from kvsim.calibrate.importers import aiconfigurator
from kvsim.calibrate.rows import MeasuredRow, Rejected, without_suspect
from kvsim.cli import main
from kvsim.hardware import load_gpu
from kvsim.ops import Collective, DecodeAttention, Gemm
from kvsim.profile_file import load_profile_file

A100 = load_gpu("a100-sxm")
REDUCE_HEADER = "time_stats.all_reduce.median,rank,num_workers,size,collective,devices_per_node,max_devices_per_node"
MEASURE_HEADER = {"schema_version": 1, "device_type": "cuda", "device_name": "X", "sessions": [{"torch": "2.9.1+cu128"}]}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# -- aiconfigurator -----------------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, object]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet as files

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(pyarrow.Table.from_pylist(rows), path)


def tiny_package(root: Path, system: str = "a100_sxm") -> Path:
    data = root / "systems" / "data" / system
    parquet(
        data / "gemm" / "vllm" / "0.14.0" / "gemm_perf.parquet",
        [
            {"gemm_dtype": dtype, "m": m, "n": 4096, "k": k, "latency": 0.03 + m * 1e-5, "kernel_source": "x"}
            for dtype in ("bfloat16", "nvfp4") for m in (1, 16, 256) for k in (32, 2048, 4096)
        ],
    )  # fmt: skip
    head = {"head_dim": 128, "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "kernel_source": "fa", "window_size": 0}
    parquet(
        data / "attention" / "vllm" / "0.14.0" / "generation_attention_perf.parquet",
        [
            {**head, "batch_size": b, "isl": 1, "step": 1023, "num_heads": 32, "num_key_value_heads": kv, "latency": 0.05 * b, **more}
            for b in (1, 8) for kv, more in ((8, {}), (0, {}), (8, {"window_size": 128}), (8, {"head_dim": 192}))
        ],
    )  # fmt: skip
    parquet(
        data / "comm" / "vllm" / "0.14.0" / "custom_allreduce_perf.parquet",
        [{"message_size": 512, "num_gpus": 2, "kernel_source": f"vLLM_custom_{m}", "latency": 0.01} for m in ("graph", "eager")],
    )
    return root


def test_the_packages_layout(tmp_path: Path) -> None:
    found = aiconfigurator.read(A100, "vllm", root=tiny_package(tmp_path))
    assert (found.engine, found.engine_version, found.rejected) == ("vllm", "0.14.0", [])
    ops = [row.op for row in found.rows]
    assert Gemm(16, 4096, 2048, "bf16") in ops and not any(isinstance(op, Gemm) and op.k == 32 for op in ops)
    decodes = [op for op in ops if isinstance(op, DecodeAttention)]
    # 1023 tokens before the new one; no KV heads stated means as many as query heads; windows and odd head sizes are left out
    assert DecodeAttention(8, 32, 32, 128, 8 * 32 * 1024, 1024, 512.0, "bf16") in decodes and len(decodes) == 4
    assert {op for op in ops if isinstance(op, Collective)} == {  # message sizes are elements of two bytes
        Collective("all_reduce", 1024, 2, False), Collective("all_reduce", 1024, 2, True)
    }  # fmt: skip


def test_importing_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tiny_package(tmp_path / "package"), tmp_path / "a100.json"
    command = ["calibrate", "import", "aiconfigurator", "--gpu", "a100", "--root", str(root), "--out", str(out), "--engine"]
    assert main([*command, "vllm==0.14.0"]) == 0
    told = capsys.readouterr().out
    assert "read of vllm 0.14.0 on a100-sxm-80gb, 0 left out\n" in told and f"wrote {out}; " in told
    assert re.search(r"^gemm 16bit +6 +2 +[\d.]+% +[\d.]+%$", told, re.MULTILINE)
    profile = load_profile_file(out)
    assert (profile.gpu, profile.engine, profile.engine_version) == ("a100-sxm-80gb", "vllm", "0.14.0")
    assert profile.command == shlex.join(["kvsim", *command, "vllm==0.14.0"])
    assert ("gemm", "16bit", 0) in profile.tables and len(profile.rows_sha256) == 64


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "a100", "--engine", "vllm==9"], "must be a version measured on a100-sxm-80gb: vllm==0.14.0"),
        (["--gpu", "a100", "--engine", "sglang"], "must be one measured on a100-sxm-80gb: vllm"),
        (["--gpu", "l4", "--engine", "vllm"], "must be one that aiconfigurator measured: a100-sxm-80gb"),
        (["--gpu", "a100", "--engine", "vllm=="], "must be NAME or NAME==VERSION"),
        (["--gpu", "a1000", "--engine", "vllm"], "gpu='a1000'"),
    ],
)
def test_what_the_package_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    root, out = tiny_package(tmp_path / "package"), tmp_path / "x.json"
    assert main(["calibrate", "import", "aiconfigurator", "--root", str(root), "--out", str(out), *arguments]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out and not out.exists()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aiconfigurator.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "import", "aiconfigurator", "--gpu", "a100", "--engine", "vllm"]) == 2
    told = capsys.readouterr()
    assert "pip install 'kvsim[aiconfigurator]'" in told.err and told.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny_package(tmp_path / "package")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(["calibrate", "import", "aiconfigurator", "--gpu", "a100", "--engine", "vllm", "--root", str(root)]) == 2
    told = capsys.readouterr()
    assert "needs pyarrow" in told.err and told.err.count("\n") == 1


def test_a_damaged_table_of_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tiny_package(tmp_path / "package"), tmp_path / "x.json"
    table = next(root.rglob("gemm_perf.parquet"))
    table.write_bytes(table.read_bytes()[:200])
    command = ["calibrate", "import", "aiconfigurator", "--gpu", "a100", "--engine", "vllm", "--root", str(root), "--out", str(out)]
    assert main(command) == 2
    told = capsys.readouterr()
    assert "must be a Parquet file" in told.err and told.err.count("\n") == 1 and not out.exists()


# -- the command --------------------------------------------------------------------------------------------------------


def gemm_csv(path: Path, wrong: int = 0) -> Path:
    """20 GEMMs and 30 copies; of the GEMMs so many beat the GPU."""
    lines = ["kind,engine,dtype,m,n,k,num_bytes,time_us"]
    for i in range(20):
        lines.append(f"gemm,x-{i % 2},bf16,{16 * (i + 1)},4096,{1024 * (1 + i % 4)},,{1e-3 if i < wrong else 30 + i}")
    lines += [f"elementwise,x-0,,,,,{2**20 * (i + 1)},{3 + i}" for i in range(30)]
    return written(path, "\n".join([*lines, "gemm,x-0,bf16,1,,1,,3"]))


def test_importing_a_csv_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gemm_csv(tmp_path / "my rows.csv")
    arguments = ["calibrate", "import", "csv", "my rows.csv", "--gpu", "a100-sxm", "--engine", "mine==1"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert told.startswith("51 measurements read of mine 1 on a100-sxm-80gb, 1 left out\n")
    assert "1 left out (my rows.csv:52): n is empty, which must be a number" in told
    assert "note: one profile is made of 2 engines, x-0, x-1; --only-engine picks one" in told
    assert "wrote a100-sxm-80gb-mine-1.json" in told and "left out as a whole" not in told
    profile = load_profile_file(tmp_path / "a100-sxm-80gb-mine-1.json")
    assert profile.command == "kvsim calibrate import csv 'my rows.csv' --gpu a100-sxm --engine mine==1"
    assert profile.tables.keys() == {("gemm", "16bit", 0), ("elementwise", "", 0)} and profile.licence == "the owner's own measurements"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a100-sxm-80gb-mine-1.json", "my rows.csv"]
    assert main([*arguments, "--only-engine", "x-1", "--out", "one.json"]) == 0
    assert capsys.readouterr().out.startswith("10 measurements read of mine 1 on a100-sxm-80gb, 0 left out\n\nErrors")


def test_a_suspect_table_is_left_out_whole_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = gemm_csv(tmp_path / "x.csv", wrong=2), tmp_path / "p.json"
    assert main(["calibrate", "import", "csv", str(path), "--gpu", "a100-sxm", "--engine", "mine==1", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "2 left out (x.csv gemm bf16:2, x.csv gemm bf16:3): takes 0.001 us where" in told
    assert told.count("left out as a whole") == 1 and "left out as a whole, too many impossible rows: x.csv gemm bf16: 2 of 20 rows" in told
    assert load_profile_file(out).tables.keys() == {("elementwise", "", 0)}


def test_other_layouts_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "dense.csv", "layer,tokens,time_us\n" + "".join(f"qkv_proj,{m},30\no_proj,{m},20\n" for m in range(1, 20)))
    (tmp_path / "v").mkdir()
    written(tmp_path / "v" / "r.csv", REDUCE_HEADER + "".join(f"\n0.05,0,2,{2**i},all_reduce,2,8" for i in range(12, 22)))
    base = {"status": "ok", "cold": True, "dtype": "bfloat16", "mode": "graph", "op": "gemm", "n": 4096, "k": 4096, "p50_us": 30.0}
    written(tmp_path / "measure.json", json.dumps({"header": MEASURE_HEADER, "rows": [{**base, "m": m} for m in range(1, 9)]}))
    run = ["calibrate", "import"]
    assert main([*run, "llmservingsim", ".", "--model", "llama-3.1-8b", "--gpu", "rtx-4090", "--engine", "vllm==0.19.0"]) == 0
    assert main([*run, "vidur", "v", "--gpu", "a100"]) == 0
    assert main([*run, "measure", ".", "--gpu", "a100"]) == 0
    made = {path.name: load_profile_file(path) for path in tmp_path.glob("*-*.json")}
    assert {name: (profile.engine, profile.licence) for name, profile in made.items()} == {
        "rtx-4090-24gb-vllm-0.19.0.json": ("vllm", "MIT"),
        "a100-sxm-80gb-vidur-2024.json": ("vidur", "MIT"),
        "a100-sxm-80gb-torch-2.9.1.json": ("torch", "the owner's own measurements"),
    }
    assert made["a100-sxm-80gb-torch-2.9.1.json"].command == "kvsim calibrate import measure . --gpu a100"
    assert capsys.readouterr().out.count("wrote ") == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["csv", "x.csv", "--gpu", "a100", "--engine", "mine"], "must name a version for rows of a file; try mine==1.0"),
        (["csv", "x.csv", "--gpu", "a100", "--engine", "my engine==1"], "must be NAME or NAME==VERSION"),
        (["csv", "x.csv", "--gpu", "a1000", "--engine", "mine==1"], "gpu='a1000'"),
        (["csv", "x.csv", "--gpu", "a100", "--engine", "mine==1", "--only-engine", "y"], "its column engine holds x-0, x-1"),
        (["csv", "x.csv", "--gpu", "a100", "--engine", "mine==1", "--out", "p.yaml"], "must end in .json"),
        (["csv", "x.csv", "--gpu", "a100", "--engine", "mine==1", "--out", "folder.json"], "must be a file, not a folder"),
        (["csv", "x.csv", "--gpu", "a100", "--engine", "mine==1", "--out", "x.csv/p.json"], "cannot be written"),
        (["csv", "absent.csv", "--gpu", "a100", "--engine", "mine==1"], "must be a text file that can be read"),
        (["csv", "one.csv", "--gpu", "a100", "--engine", "mine==1"], "must be at least two of a kind"),
        (["csv", "slow.csv", "--gpu", "a100", "--engine", "mine==1"], "is their unit right, and the GPU?"),
        (["llmservingsim", ".", "--gpu", "a100", "--engine", "vllm==1", "--model", "llama-9"], "llama-9"),
        (["llmservingsim", ".", "--gpu", "a100", "--engine", "vllm", "--model", "llama-3.1-8b"], "must name a version"),
        (["vidur", "x.csv", "--gpu", "a100"], "must hold an mlp.csv, attention.csv or all_reduce.csv"),
        (["measure", "x.csv", "--gpu", "a100"], "must be a file that kvsim.calibrate.measure wrote"),
        (["csv", "x.csv", "--gpu", "a100"], "Missing option '--engine'"),
    ],
)
def test_a_wrong_command_ends_in_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    gemm_csv(tmp_path / "x.csv")
    written(tmp_path / "one.csv", "kind,time_us,dtype,m,n,k\ngemm,30,bf16,16,4096,4096\n")
    written(tmp_path / "slow.csv", "kind,time_ms,dtype,m,n,k\n" + "".join(f"gemm,30,bf16,{m},4096,4096\n" for m in range(1, 9)))
    (tmp_path / "folder.json").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["calibrate", "import", *arguments]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out
    assert sorted(tmp_path.rglob("*")) == before


def test_reasons_are_grouped_whatever_their_numbers() -> None:
    rows = [Rejected(f"x.csv:{i}", f"takes {i * 0.7:.3g} us where {i}.5e-06 are needed") for i in range(2, 7)]
    rows += [Rejected(f"y.csv:{i}", f"reason {'abcdefghij'[i]}") for i in range(10)]
    lines = rejected_lines(rows)
    assert lines[0] == "  5 left out (x.csv:2, x.csv:3, x.csv:4, ...): takes 1.4 us where 2.5e-06 are needed"
    assert lines[1] == "  1 left out (y.csv:0): reason a" and lines[-1] == "  3 left out for 3 other reasons" and len(lines) == 9


def test_help_needs_nothing_heavy() -> None:
    """Neither torch nor pyarrow, SciPy or numpy: help of the imports answers at once."""
    code = (
        "import sys\nfrom kvsim.cli import main\n"
        "for name in ('aiconfigurator', 'csv', 'vidur', 'llmservingsim', 'measure'):\n"
        "    assert main(['calibrate', 'import', name, '--help']) == 0\n"
        "assert not {'torch', 'pyarrow', 'scipy', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_tables_with_too_many_impossible_rows_are_left_out_whole() -> None:
    op = Gemm(1, 4096, 4096, "bf16")
    rows = [MeasuredRow(op, 1e-5, f"good.parquet bf16:{i}") for i in range(99)]
    rows += [MeasuredRow(op, 1e-5, f"bad.parquet bf16:{i}") for i in range(90)]
    rejected = [Rejected("good.parquet bf16:99", "too fast"), *(Rejected(f"bad.parquet bf16:{90 + i}", "too fast") for i in range(10))]
    kept, suspect = without_suspect(rows, rejected)
    assert len(kept) == 99 and suspect == ["bad.parquet bf16: 10 of 100 rows"]


def test_engine_names() -> None:
    assert split_engine("vllm==0.24.0") == ("vllm", "0.24.0") and split_engine("sglang") == ("sglang", None)
