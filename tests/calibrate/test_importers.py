"""Others' layouts become Ops with seconds: tiny files of each layout, and the real samples where shared/ is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvsim.calibrate.import_command import split_engine
from kvsim.calibrate.importers import aiconfigurator, llmservingsim, measure_rows, plain_csv, vidur
from kvsim.calibrate.rows import MeasuredRow, Rejected, without_suspect
from kvsim.cli import main
from kvsim.errors import InputError
from kvsim.hardware import load_gpu
from kvsim.model import load_model
from kvsim.ops import Collective, DecodeAttention, Elementwise, Gemm, MixedAttention, PrefillAttention
from kvsim.profile_file import load_profile_file

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT.parent / "shared" / "measured"
A100, H100, RTX4090 = (load_gpu(name) for name in ("a100-sxm", "h100-sxm", "rtx-4090"))
needs_shared = pytest.mark.skipif(not MEASURED.exists(), reason=f"{MEASURED} is absent")


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# -- plain CSV ----------------------------------------------------------------------------------------------------------

HEADER = (
    "kind,dtype,kv_dtype,batch,q_heads,kv_heads,head_dim,new_tokens,context_tokens,n_decode,decode_context_tokens,m,n,k,op,"
    "num_bytes,n_gpu,message_bytes,impl,time_us"
)


def row(time_us: object, **cells: object) -> str:
    return ",".join(str({"time_us": time_us, **cells}.get(name, "")) for name in HEADER.split(","))


def test_every_kind_of_a_plain_csv(tmp_path: Path) -> None:
    lines = [
        "# made by hand", HEADER,
        row(30, kind="gemm", dtype="bf16", m=4, n=4096, k=4096),
        row(40, kind="decode_attention", kv_dtype="fp8", batch=8, q_heads=32, kv_heads=8, head_dim=128, context_tokens=1000),
        row(90, kind="prefill_attention", batch=2, q_heads=32, kv_heads=8, head_dim=128, new_tokens=512),
        row(
            95, kind="mixed_attention", q_heads=32, kv_heads=8, head_dim=128, new_tokens=128, context_tokens=64, n_decode=4,
            decode_context_tokens=500,
        ),
        row(5, kind="elementwise", op="norm", num_bytes=65536),
        row(9, kind="all_reduce", n_gpu=4, message_bytes=8192, impl="custom eager"),
        row(30, kind="gemm", dtype="fp8_block", m=4, n=4096, k=4096),
    ]  # fmt: skip
    found = plain_csv.read(written(tmp_path / "mine.csv", "\n".join(lines)), A100, "mine", "1")
    assert not found.rejected
    assert [(r.op, round(r.seconds * 1e6, 6)) for r in found.rows] == [
        (Gemm(4, 4096, 4096, "bf16"), 30),
        (DecodeAttention(8, 32, 8, 128, 64000, 1000, 256.0, "fp8"), 40),
        (PrefillAttention(512, 0, 32, 8, 128, "bf16", 2), 90),
        (
            MixedAttention(PrefillAttention(128, 64, 32, 8, 128, "bf16"), DecodeAttention(4, 32, 8, 128, 16000, 500, 512.0)), 95,
        ),
        (Elementwise("norm", 65536), 5),
        (Collective("all_reduce", 8192, 4, True), 9),
    ]  # fmt: skip


def test_wrong_rows_are_told_by_line_and_left_out(tmp_path: Path) -> None:
    good = [row(30 + i, kind="gemm", dtype="bf16", m=4, n=4096, k=4096 + i) for i in range(8)]
    bad = [
        row("", kind="gemm", dtype="bf16", m=4, n=4096, k=4096), row("abc", kind="gemm", dtype="bf16", m=4, n=4096, k=4096),
        row(30, kind="gemm", dtype="bf16", m=0, n=4096, k=4096), row(1e-3, kind="gemm", dtype="bf16", m=8192, n=8192, k=8192),
        row("nan", kind="gemm", dtype="bf16", m=4, n=4096, k=4096), row(30, kind="gemm", dtype="int3", m=4, n=4096, k=4096),
    ]  # fmt: skip
    found = plain_csv.read(written(tmp_path / "x.csv", "\n".join([HEADER, *good, *bad])), A100, "mine", "1")
    assert len(found.rows) == 8
    assert [r.where.rpartition(":")[2] for r in found.rejected] == ["10", "11", "12", "13", "14", "15"]
    assert "is its unit right?" in found.rejected[3].reason and "m is 0" in found.rejected[2].reason


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "header and rows"),
        ("a,b\n1,2", "must have a column kind"),
        ("kind,m\ngemm,4", "must have a column time_us"),
        ("kind,time_us,dtype\ngemm,4,bf16", "must have a column m for rows of kind gemm"),
        ("kind,time_us\nconv,4", "kind 'conv' must be one of gemm"),
        # seconds in a column of microseconds: every row beats the GPU
        ("kind,time_us,dtype,m,n,k\n" + "gemm,0.0001,bf16,4096,8192,8192\n" * 3, "check the unit"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_a_reason(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says.replace("?", "[?]")):
        plain_csv.read(written(tmp_path / "x.csv", text), A100, "mine", "1")


@needs_shared
@pytest.mark.parametrize(("name", "gpu", "rows"), [("rtx4090", RTX4090, 9747), ("a100", A100, 18852), ("h100", H100, 15800)])
def test_the_measured_rows_at_hand(name: str, gpu: object, rows: int) -> None:
    path = MEASURED / f"kernel_{name}.csv"
    found = plain_csv.read(path, gpu, "any", "1")  # type: ignore[arg-type]
    assert (len(found.rows), len(found.rejected)) == (rows, 0)
    one = plain_csv.engines(path)[0]
    assert 0 < len(plain_csv.read(path, gpu, "any", "1", only_engine=one).rows) < rows  # type: ignore[arg-type]


# -- other layouts ------------------------------------------------------------------------------------------------------


@needs_shared
def test_vidur_samples() -> None:
    found = vidur.read(MEASURED / "samples" / "vidur", A100)
    assert not found.rejected
    gemms = {r.op for r in found.rows if isinstance(r.op, Gemm)}
    assert Gemm(4096, 12288, 4096, "fp16") in gemms or any(op.n == 12288 and op.k == 4096 for op in gemms)  # Llama-2-7B's QKV
    assert all(op.num_gpus == 2 for r in found.rows if isinstance(op := r.op, Collective))


@needs_shared
def test_llmservingsim_samples_equal_the_csv_made_of_them() -> None:
    """shared/measured/kernel_rtx4090.csv was made of the same files by another hand."""
    folder = MEASURED / "samples" / "llmservingsim_rtx4090_llama31_8b_tp1"
    found = llmservingsim.read(folder, RTX4090, load_model("llama-3.1-8b"))
    other = plain_csv.read(MEASURED / "kernel_rtx4090.csv", RTX4090, "vllm", "0.19.0")
    ours = {row.op: row.seconds for row in found.rows if not isinstance(row.op, Elementwise)}
    theirs = {row.op: row.seconds for row in other.rows if not isinstance(row.op, Elementwise)}
    assert len(ours.keys() & theirs.keys()) > 9000
    assert all(ours[op] == pytest.approx(theirs[op], rel=1e-3) for op in ours.keys() & theirs.keys())


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold dense\.csv"):
        llmservingsim.read(tmp_path, RTX4090, load_model("llama-3.1-8b"))
    written(tmp_path / "dense.csv", "layer,time_us\nqkv_proj,3\n")
    with pytest.raises(InputError, match="must have the columns layer, tokens, time_us"):
        llmservingsim.read(tmp_path, RTX4090, load_model("llama-3.1-8b"))
    with pytest.raises(InputError, match=r"must be an mlp\.csv"):
        vidur.read(tmp_path, A100)


def test_rows_of_measure(tmp_path: Path) -> None:
    base = {"status": "ok", "cold": True, "dtype": "bfloat16", "mode": "graph"}
    rows = [
        {**base, "op": "gemm", "m": 4, "n": 4096, "k": 4096, "p50_us": 30.0},
        {**base, "op": "gemm", "m": 4, "n": 4096, "k": 4096, "p50_us": 44.0, "mode": "eager"},
        {**base, "op": "copy", "dtype": "uint8", "num_bytes": 2**20, "p50_us": 3.0},
        {**base, "op": "sdpa_decode", "batch": 2, "q_heads": 8, "kv_heads": 2, "head_dim": 64, "kv_tokens": 100, "p50_us": 9.0},
        {**base, "op": "gemm", "m": 8, "n": 4096, "k": 4096, "status": "failed: out of memory"},
        {**base, "op": "gemm", "m": 16, "n": 4096, "k": 4096, "p50_us": 30.0, "cold": False},
    ]
    path = tmp_path / "measure.json"
    path.write_text(json.dumps({"header": {"schema_version": 1, "device_name": "X"}, "rows": rows}))
    found = measure_rows.read(tmp_path, A100)
    assert [(r.op, round(r.seconds * 1e6)) for r in found.rows] == [
        (Gemm(4, 4096, 4096, "bf16"), 30), (Elementwise("copy", 2**21), 3),
        (DecodeAttention(2, 8, 2, 64, 400, 100, 256.0, "bf16", "contiguous"), 9),
    ]  # fmt: skip
    assert [r.reason for r in found.rejected] == ["failed: out of memory", "was measured with warm caches"]
    path.write_text("{}")
    with pytest.raises(InputError, match=r"must be a file that kvsim\.calibrate\.measure wrote"):
        measure_rows.read(tmp_path, A100)


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
    assert "gemm 16bit" in capsys.readouterr().out
    profile = load_profile_file(out)
    assert (profile.gpu, profile.engine, profile.engine_version) == ("a100-sxm-80gb", "vllm", "0.14.0")
    assert profile.command == "kvsim calibrate import aiconfigurator --gpu a100-sxm-80gb --engine vllm==0.14.0"
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


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiconfigurator.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'kvsim\[aiconfigurator\]'"):
        aiconfigurator.read(A100, "vllm")


def test_tables_with_too_many_impossible_rows_are_left_out_whole() -> None:
    op = Gemm(1, 4096, 4096, "bf16")
    rows = [MeasuredRow(op, 1e-5, f"good.parquet bf16:{i}") for i in range(99)]
    rows += [MeasuredRow(op, 1e-5, f"bad.parquet bf16:{i}") for i in range(90)]
    rejected = [Rejected("good.parquet bf16:99", "too fast"), *(Rejected(f"bad.parquet bf16:{90 + i}", "too fast") for i in range(10))]
    kept, suspect = without_suspect(rows, rejected)
    assert len(kept) == 99 and suspect == ["bad.parquet bf16: 10 of 100 rows"]


def test_engine_names() -> None:
    assert split_engine("vllm==0.24.0") == ("vllm", "0.24.0") and split_engine("sglang") == ("sglang", None)
