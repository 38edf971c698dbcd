"""Others' layouts become Ops with seconds: tiny files of each layout, and the real samples where shared/ is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvsim.calibrate.import_command import check_unit
from kvsim.calibrate.importers import llmservingsim, measure_rows, plain_csv, vidur
from kvsim.calibrate.importers.cells import LeftOut
from kvsim.calibrate.rows import Import, impossible, without_suspect
from kvsim.errors import InputError
from kvsim.hardware import Gpu, load_gpu
from kvsim.model import load_model
from kvsim.ops import Collective, DecodeAttention, Elementwise, Gemm, HostWork, MixedAttention, Op, PrefillAttention
from kvsim.profile_file import load_profile_file, shipped

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT.parent / "shared" / "measured"
A100, H100, RTX4090 = (load_gpu(name) for name in ("a100-sxm", "h100-sxm", "rtx-4090"))
needs_shared = pytest.mark.skipif(not MEASURED.exists(), reason=f"{MEASURED} is absent")


def in_us(found: Import) -> list[tuple[Any, float]]:
    return [(row.op, round(row.seconds * 1e6, 6)) for row in found.rows]


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
    assert found.rejected == [("mine.csv:9", "dtype is fp8_block: other arithmetic than our fp8, int8 and int4")]
    assert in_us(found) == [
        (Gemm(4, 4096, 4096, "bf16"), 30),
        (DecodeAttention(8, 32, 8, 128, 64000, 1000, 256.0, "fp8"), 40),
        (PrefillAttention(512, 0, 32, 8, 128, "bf16", 2), 90),
        (
            MixedAttention(PrefillAttention(128, 64, 32, 8, 128, "bf16"), DecodeAttention(4, 32, 8, 128, 16000, 500, 512.0)), 95,
        ),
        (Elementwise("norm", 65536), 5),
        (Collective("all_reduce", 8192, 4, True), 9),
    ]  # fmt: skip


def test_elementwise_kernels_of_known_widths(tmp_path: Path) -> None:
    """Two bytes a number: an addition moves three widths, a norm two, an activation three of the MLP's."""
    text = (
        "kind,op,num_tokens,hidden,ffn,tp,time_ms\n"
        "elementwise,add,10,4096,,,0.004\nelementwise,layernorm,10,4096,,,0.004\nelementwise,act_fn,10,,14336,2,0.004\n"
        "elementwise,rotary_emb,10,4096,,,0.004\nelementwise,,10,4096,,,0.004\n"
    )
    with pytest.raises(InputError, match="must have a column num_bytes for rows of kind elementwise"):
        plain_csv.read(written(tmp_path / "x.csv", text), A100, "mine", "1")
    found = plain_csv.read(written(tmp_path / "x.csv", text.rpartition("elementwise,,")[0]), A100, "mine", "1")
    assert in_us(found) == [
        (Elementwise("add", 3 * 2 * 10 * 4096), 4), (Elementwise("layernorm", 2 * 2 * 10 * 4096), 4),
        (Elementwise("act_fn", 3 * 2 * 10 * 7168), 4),
    ]  # fmt: skip
    assert found.rejected == [("x.csv:5", "op is rotary_emb: what it moves is not told by its columns, only by num_bytes")]


def test_wrong_rows_are_told_by_line_and_left_out(tmp_path: Path) -> None:
    gemm: dict[str, Any] = {"kind": "gemm", "dtype": "bf16", "m": 4, "n": 4096, "k": 4096}
    heads: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 4, "context_tokens": 1000}
    good = [row(30 + i, **{**gemm, "k": 4096 + i}) for i in range(20)]
    bad = {
        row("", **gemm): "time_us is empty, which must be a number",
        row("abc", **gemm): "time_us is abc, which must be a number",
        row("nan", **gemm): "time_us is nan, which must be above 0",
        row("inf", **gemm): "time_us is inf, which must be above 0",
        row(0, **gemm): "time_us is 0, which must be above 0",
        row(-3, **gemm): "time_us is -3, which must be above 0",
        row(30, **{**gemm, "m": 0}): "m is 0, which must be a whole number of at least 1",
        row(30, **{**gemm, "m": 4.5}): "m is 4.5, which must be a whole number of at least 1",
        row(30, **{**gemm, "m": ""}): "m is empty, which must be a number",
        row(30, **{**gemm, "m": "nan"}): "m is nan, which must be a whole number of at least 1",
        row(30, **{**gemm, "dtype": "int3"}): "dtype is int3, which must be one of bf16",
        row(30, **{**gemm, "kind": "conv"}): "kind is conv, which must be one of gemm",
        row(30, **gemm) + ",5": "has 21 cells where the header has 20",
        row(30, kind="decode_attention", **{**heads, "context_tokens": 0}): "context_tokens is 0",
        row(30, kind="decode_attention", **{**heads, "kv_heads": 5}): "kv_heads is 5, which must divide q_heads 32",
        row(30, kind="decode_attention", kv_dtype="int2", **heads): "kv_dtype is int2",
        row(30, kind="all_reduce", n_gpu=1, message_bytes=8): "n_gpu is 1, which must be a whole number of at least 2",
        row(30, kind="all_reduce", n_gpu=16, message_bytes=8): "n_gpu is 16: beyond the 8 GPUs of one node",
        row(1e-3, **{**gemm, "m": 8192}): "is its unit right?",
    }
    found = plain_csv.read(written(tmp_path / "x.csv", "\n".join(["# x", "", HEADER, *good, *bad])), A100, "mine", "1")
    assert len(found.rows) == 20
    by_line = {int(r.where.rpartition(":")[2]): r.reason for r in found.rejected}
    assert sorted(by_line) == list(range(24, 24 + len(bad)))
    for line, says in enumerate(bad.values(), 24):
        assert says in by_line[line]
    # a slip of the pen is no sign that the other rows are wrong; a row that beats the GPU is, in its own table
    kept, suspect = without_suspect(found.rows, found.rejected)
    assert len(kept) == 20 and "x.csv gemm bf16: 1 of 21 rows" not in suspect


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "header and rows"),
        ("kind,time_us,dtype,m,n,k", "header and rows"),
        ("a,b\n1,2", "must have a column kind; it has a, b; kinds: gemm"),
        ("kind,m,m,time_us\ngemm,4,4,1", "m is there twice"),
        ("kind,dtype,m,n,k\ngemm,bf16,4,64,64", "must have a column time_us, time_ms or time_s"),
        ("kind,time_us,dtype\ngemm,4,bf16", r"must have a column m for rows of kind gemm \(line 2\); add it"),
        ("kind,time_us,m,n,k\ngemm,4,1,1,1", "must have a column dtype for rows of kind gemm"),
        ("kind,time_us,batch,q_heads,kv_heads,head_dim\ndecode_attention,4,1,8,8,128", "must have a column context_tokens"),
        ("kind,time_us,q_heads,kv_heads,head_dim\nprefill_attention,4,8,8,128", "must have a column new_tokens"),
        ("kind,time_us\nelementwise,4", "must have a column num_bytes"),
        ("kind,time_us,n_gpu\nall_reduce,4,2", "must have a column message_bytes"),
        ("kind,time_us,n_gpu,message_bytes\nall_reduce,4,5,2,256", "Ops of ours; x.csv:2 has 5 cells where the header has 4"),
        ("kind,time_us\nconv,4", "kind is conv, which must be one of gemm"),
        # milliseconds in a column of microseconds: every row beats the GPU, and not in the other unit
        ("kind,time_us,dtype,m,n,k\n" + "gemm,3.1,bf16,4096,8192,8192\n" * 3, r"3 of 3 are not .*; as time_ms they would be possible"),
        ("kind,time_us,dtype,m,n,k\n" + "gemm,0.0031,bf16,4096,8192,8192\n" * 3, "as time_s they would be possible"),
        ("kind,time_s,dtype,m,n,k\n" + "gemm,1e-12,bf16,4096,8192,8192\n" * 3, "check the unit of its times"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_a_reason(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        plain_csv.read(written(tmp_path / "x.csv", text), A100, "mine", "1")


def test_times_that_are_a_thousand_times_too_slow_are_refused(tmp_path: Path) -> None:
    """Not impossible, only absurd: microseconds in a column of milliseconds."""
    text = "kind,time_ms,dtype,m,n,k\n" + "".join(f"gemm,3100,bf16,4096,8192,{k}\n" for k in range(8000, 8200))
    found = plain_csv.read(written(tmp_path / "x.csv", text), A100, "mine", "1")
    with pytest.raises(InputError, match=r"times of gemm are .* times that; is their unit right"):
        check_unit(A100, found)


def test_a_spreadsheets_csv(tmp_path: Path) -> None:
    """A byte-order mark, blanks in the header, a quoted cell of two lines, and further columns."""
    text = '\ufeff# mine\n kind , note ,time_us,dtype,m,n,k\n\ngemm,"two\nlines",30,bf16,4,64,64\ngemm,,x,bf16,4,64,64\n'
    text += "gemm,,31,bf16,4,64,128\ngemm,,32,bf16,4,64"
    found = plain_csv.read(written(tmp_path / "x.csv", text), A100, "mine", "1")
    assert in_us(found) == [(Gemm(4, 64, 64, "bf16"), 30), (Gemm(4, 64, 128, "bf16"), 31)]
    assert found.rejected == [
        ("x.csv:6", "time_us is x, which must be a number"), ("x.csv:8", "k is empty, which must be a number")
    ]  # fmt: skip


def test_rows_of_one_engine_and_gpu(tmp_path: Path) -> None:
    """The layout of shared/measured/allreduce_a100_h100.csv has no kind."""
    text = "gpu,engine,interconnect,impl,n_gpu,message_bytes,time_us\n"
    text += "A,x-1,NV,x_graph,2,256,5\nA,x-2,NV,x_graph,2,256,6\nB,x-1,NV,x_Eager,2,256,7\n"
    path = written(tmp_path / "x.csv", text)
    assert len(plain_csv.read(path, A100, "x", "1").rows) == 3
    one = plain_csv.read(path, A100, "x", "1", only_engine="x-1", only_gpu="B")
    assert in_us(one) == [(Collective("all_reduce", 256, 2, True), 7)]
    assert plain_csv.texts(path, "engine") == ["x-1", "x-2"] and plain_csv.texts(path, "gpu", {"engine": "x-2"}) == ["A"]
    with pytest.raises(InputError, match="rows that are Ops of ours of engine x; its column engine holds x-1, x-2"):
        plain_csv.read(path, A100, "x", "1", only_engine="x")


@needs_shared
@pytest.mark.parametrize(
    ("name", "gpu", "rows", "others"),
    [("rtx4090", RTX4090, 9747, 344), ("a100", A100, 18852, 2148), ("h100", H100, 15800, 4300)],
)
def test_the_measured_rows_at_hand(name: str, gpu: Gpu, rows: int, others: int) -> None:
    """Left out are Ops that are none of ours (block-scaled fp8, weight-only int8, fp8 arithmetic, embeddings); none is impossible."""
    path = MEASURED / f"kernel_{name}.csv"
    found = plain_csv.read(path, gpu, "any", "1")
    assert (len(found.rows), len(found.rejected)) == (rows, others)
    assert all(isinstance(row, LeftOut) for row in found.rejected)
    check_unit(gpu, found)
    one = plain_csv.texts(path, "engine")[0]
    assert 0 < len(plain_csv.read(path, gpu, "any", "1", only_engine=one).rows) < rows


def test_sums_of_rows_tell_ops_apart_and_outlive_new_fields() -> None:
    """The sum of rows of before `PrefillAttention.stored` and `HostWork.variant`, and others for rows that have them."""

    def summed(*ops: Op) -> str:
        found = Import("made", "1", "made up")
        for op in ops:
            found.add(op, 0.5, "made:1", RTX4090)
        assert len(found.rows) == len(ops)
        return found.sha256()

    prefill, host = PrefillAttention(512, 0, 32, 8, 128, "bf16"), HostWork("torch_decoder", "step", 3)
    before = (
        "PrefillAttention(new_tokens=512, prior_tokens=0, q_heads=32, kv_heads=8, head_dim=128, kv_dtype='bf16', num_sequences=1) 0.5\n"
        "HostWork(engine='torch_decoder', part='step', batch=3) 0.5\n"
    )
    assert summed(prefill, host) == hashlib.sha256(before.encode()).hexdigest()
    others = ((replace(prefill, stored="int8"), host), (prefill, replace(host, variant="fp8")))
    assert len({summed(*ops) for ops in ((prefill, host), *others)}) == 3


@needs_shared
def test_the_shipped_rtx4090_profile_is_made_of_these_rows() -> None:
    found = plain_csv.read(MEASURED / "kernel_rtx4090.csv", RTX4090, "vllm", "0.19.0")
    (path,) = (path for name, path in shipped().items() if name.startswith("rtx-4090"))
    assert load_profile_file(path).rows_sha256 == found.sha256()


@needs_shared
def test_the_measured_all_reduces_at_hand() -> None:
    path = MEASURED / "allreduce_a100_h100.csv"
    found = plain_csv.read(path, H100, "vllm", "0.24.0", only_engine="vllm-0.24.0")
    assert (len(found.rows), found.rejected) == (138, [])
    assert {(row.op.num_gpus, row.op.eager) for row in found.rows if isinstance(row.op, Collective)} == {
        (n, eager) for n in (2, 4, 8) for eager in (False, True)
    }
    everything = plain_csv.read(path, A100, "any", "1")
    assert (len(everything.rows), len(everything.rejected)) == (5213, 225)  # 16 GPUs are two nodes


# -- other layouts ------------------------------------------------------------------------------------------------------


MLP_HEADER = (
    "time_stats.{}.median".format(".median,time_stats.".join(
        ("emb", "input_layernorm", "attn_pre_proj", "attn_post_proj", "post_attention_layernorm", "mlp_up_proj", "mlp_down_proj",
         "mlp_act", "add")
    )) + ",n_head,n_kv_head,n_embd,n_expanded_embd,vocab_size,use_gated_mlp,num_tokens,num_tensor_parallel_workers"
)  # fmt: skip
ATTENTION_HEADER = (
    "time_stats.attn_decode.median,time_stats.attn_prefill.median,n_embd,n_q_head,n_kv_head,block_size,num_tensor_parallel_workers,"
    "max_model_len,batch_size,prefill_chunk_size,kv_cache_size,is_prefill,attention_backend"
)
REDUCE_HEADER = "time_stats.all_reduce.median,rank,num_workers,size,collective,devices_per_node,max_devices_per_node"


def test_vidurs_layouts(tmp_path: Path) -> None:
    """Sizes are the whole model's (here Llama-2-70B's), to be divided by the tensor-parallel degree; times are milliseconds."""
    folder = tmp_path / "a100"
    (folder / "model").mkdir(parents=True)
    mlp = "0.1,0.02,0.21,0.17,0.03,0.9,0.45,0.04,0.05,64,8,8192,28672,32000,True,512,2"
    other = "0.1,0.02,0.21,0.17,,0.9,0.45,0.04,0.05,64,8,8192,28672,32000,False,512,3"  # tp 3 splits no head
    phi = "0.1,0.02,0.08,0.04,,0.2,0.15,0.04,0.05,32,32,2560,10240,51200,False,512,1"  # one norm for attention and MLP
    written(folder / "model" / "mlp.csv", "\n".join([MLP_HEADER, mlp, other, phi]))
    lines = [ATTENTION_HEADER, "0.053,,8192,64,8,16,2,4096,43,0,704,False,X", ",2.3,8192,64,8,16,2,4096,1,3904,96,True,X"]
    written(folder / "model" / "attention.csv", "\n".join(lines))
    reduce = ["0.095,0,2,8388608,all_reduce,2,8", "0.2,0,2,2048,all_reduce,1,8", "x,0,2,2048,all_reduce,2,8"]
    written(folder / "all_reduce.csv", "\n".join([REDUCE_HEADER, *reduce]))
    written(folder / "send_recv.csv", "time_stats.send_recv.median,size\n0.1,2\n")
    found = vidur.read(folder, A100)
    norm = Elementwise("norm", 2 * 2 * 512 * 8192)
    assert in_us(found) == [
        (Collective("all_reduce", 8388608, 2, True), 95),
        (DecodeAttention(43, 32, 4, 128, 43 * 4 * 705, 705, 512.0, "fp16"), 53),  # 704 tokens and the new one
        (PrefillAttention(3904, 96, 32, 4, 128, "fp16", 1), 2300),
        (Gemm(512, (64 + 16) * 128 // 2, 8192, "fp16"), 210), (Gemm(512, 8192, 4096, "fp16"), 170),
        (Gemm(512, 28672, 8192, "fp16"), 900), (Gemm(512, 8192, 14336, "fp16"), 450), (norm, 20), (norm, 30),
        (Elementwise("activation", 3 * 2 * 512 * 14336), 40), (Elementwise("add", 3 * 2 * 512 * 8192), 50),
        (Gemm(512, 7680, 2560, "fp16"), 80), (Gemm(512, 2560, 2560, "fp16"), 40), (Gemm(512, 10240, 2560, "fp16"), 200),
        (Gemm(512, 2560, 10240, "fp16"), 150), (Elementwise("norm", 2 * 2 * 512 * 2560), 20),
        (Elementwise("activation", 2 * 2 * 512 * 10240), 40),  # not gated, and its "add" is two additions
    ]  # fmt: skip
    assert found.rejected == [
        ("all_reduce.csv:3", "goes over 2 nodes: num_workers is 2, devices_per_node 1"),
        ("all_reduce.csv:4", "time_stats.all_reduce.median is x, which must be a number"),
        ("model/mlp.csv:3", "n_head is 64, which num_tensor_parallel_workers 3 must divide"),
        ("send_recv.csv:1", "is the header of no mlp.csv, attention.csv or all_reduce.csv"),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"must hold an mlp\.csv"):
        vidur.read(folder / "send_recv.csv", A100)
    seconds = written(tmp_path / "all_reduce.csv", REDUCE_HEADER + "\n" + "0.000005,0,2,83886080,all_reduce,2,8\n" * 2)
    wrong = vidur.read(seconds, A100)
    assert not wrong.rows and all("is its unit right?" in row.reason for row in wrong.rejected)


@needs_shared
def test_vidur_samples() -> None:
    found = vidur.read(MEASURED / "samples" / "vidur", A100)
    rows = {row.where: row for row in found.rows}
    first = rows["a100_llama-2-7b_mlp.csv attn_pre_proj:2"]
    assert (first.op, first.seconds) == (Gemm(4096, 12288, 4096, "fp16"), pytest.approx(1.911e-3))
    assert (len(found.rows), len(found.rejected)) == (8 * 1044 + 505, 994)  # 994 all-reduces run over two nodes
    assert {row.reason for row in found.rejected} == {"goes over 2 nodes: num_workers is 2, devices_per_node 1"}
    check_unit(A100, found)


@needs_shared
def test_vidurs_all_reduce_sizes_are_bytes() -> None:
    """As bytes they take what NCCL's own benchmark took for as many; as elements they would be faster than it by a quarter or more."""
    nccl = plain_csv.read(MEASURED / "allreduce_a100_h100.csv", A100, "nccl", "2", only_engine="nccl-2.27.3", only_gpu="A100-SXM-80GB")
    known = {row.op.message_bytes: row.seconds for row in nccl.rows if isinstance(row.op, Collective) and row.op.num_gpus == 2}
    theirs = {row.op.message_bytes: row.seconds for row in vidur.read(MEASURED / "samples" / "vidur", A100).rows
              if isinstance(row.op, Collective)}  # fmt: skip
    for size in (4 * 2**20, 8 * 2**20):
        assert 0.9 < theirs[size] / known[size] < 1.2
        assert theirs[size] / known[2 * size] < 0.8


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


def test_llmservingsims_layout(tmp_path: Path) -> None:
    """Llama-3.1-8B on two GPUs: 16 query and 4 KV heads of 128 each."""
    lines = ["layer,tokens,time_us", "qkv_proj,8,30", "o_proj,8,20", "gate_up_proj,8,80", "down_proj,8,40", "layernorm,8,3"]
    lines += ["act_fn,8,4", "rotary_emb,8,4", "qkv_proj,8,", "qkv_proj,0,30", "qkv_proj,8192,0.1"]
    written(tmp_path / "dense.csv", "\n".join(lines))
    written(tmp_path / "per_sequence.csv", "layer,sequences,time_us\nlm_head,8,800\nsampler,8,30\n")
    attention = ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", "0,0,4,100,9", "64,32,0,0,12", "64,32,4,100,15", "0,0,0,0,1"]
    written(tmp_path / "attention.csv", "\n".join([*attention, "0,0,4,0,9"]))
    found = llmservingsim.read(tmp_path, RTX4090, load_model("llama-3.1-8b"), 2)
    prefill, decode = PrefillAttention(64, 32, 16, 4, 128, "bf16"), DecodeAttention(4, 16, 4, 128, 1600, 100, 512.0)
    assert in_us(found) == [
        (Gemm(8, 3072, 4096, "bf16"), 30), (Gemm(8, 4096, 2048, "bf16"), 20), (Gemm(8, 14336, 4096, "bf16"), 80),
        (Gemm(8, 4096, 7168, "bf16"), 40), (Elementwise("layernorm", 2 * 2 * 8 * 4096), 3), (Elementwise("act_fn", 3 * 2 * 8 * 7168), 4),
        (Gemm(8, 64128, 4096, "bf16"), 800), (decode, 9), (prefill, 12), (MixedAttention(prefill, decode), 15),
    ]  # fmt: skip
    where = [row.where for row in found.rejected]
    assert where == [
        "dense.csv:8", "dense.csv:9", "dense.csv:10", "dense.csv qkv_proj:11", "per_sequence.csv:3", "attention.csv:5", "attention.csv:6"
    ]  # fmt: skip
    with pytest.raises(InputError, match="--tp=3 must divide the 32 query heads"):
        llmservingsim.read(tmp_path, RTX4090, load_model("llama-3.1-8b"), 3)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a folder that holds dense\.csv"):
        llmservingsim.read(tmp_path, RTX4090, load_model("llama-3.1-8b"))
    written(tmp_path / "dense.csv", "layer,time_us\nqkv_proj,3\n")
    with pytest.raises(InputError, match="must have the columns layer, tokens, time_us; it has layer, time_us"):
        llmservingsim.read(tmp_path, RTX4090, load_model("llama-3.1-8b"))
    with pytest.raises(InputError, match=r"must hold an mlp\.csv"):
        vidur.read(tmp_path, A100)
    (tmp_path / "damaged.csv").write_bytes(b"kind,\xff\xfe\n1,2\n")
    with pytest.raises(InputError, match="must be a text file that can be read"):
        vidur.read(tmp_path, A100)
    with pytest.raises(InputError, match=r"must be a text file that can be read .No such file"):
        plain_csv.read(tmp_path / "absent.csv", A100, "mine", "1")


MEASURE_HEADER = {"schema_version": 1, "device_type": "cuda", "device_name": "X", "sessions": [{"torch": "2.9.1+cu128"}]}


def test_rows_of_measure(tmp_path: Path) -> None:
    base = {"status": "ok", "cold": True, "dtype": "bfloat16", "mode": "graph"}
    gemm = {**base, "op": "gemm", "m": 4, "n": 4096, "k": 4096, "p50_us": 30.0}
    heads = {"batch": 2, "q_heads": 8, "kv_heads": 2, "head_dim": 64}
    rows: list[dict[str, Any]] = [
        {**gemm, "p50_us": 44.0, "mode": "eager"},
        gemm,
        {**base, "op": "copy", "dtype": "uint8", "num_bytes": 2**20, "p50_us": 3.0},
        {**base, "op": "sdpa_decode", **heads, "kv_tokens": 100, "p50_us": 9.0},
        {**base, "op": "sdpa_prefill", **heads, "new_tokens": 100, "p50_us": 9.5, "dtype": "float16", "mode": "eager"},
        {**gemm, "m": 8, "status": "failed: out of memory"},
        {**gemm, "m": 16, "cold": False},
        {**gemm, "dtype": "float32"},
        {**base, "op": "graph_replay", "nodes": 8, "p50_us": 30.0},
        {**gemm, "mode": "issue"},
        {**gemm, "m": 32, "p50_us": 0.0},
        {key: value for key, value in gemm.items() if key != "m"},
        {**gemm, "m": 8192, "p50_us": 0.001},
    ]
    path = tmp_path / "measure.json"
    path.write_text(json.dumps({"header": MEASURE_HEADER, "rows": rows}))
    found = measure_rows.read(tmp_path, A100)
    assert (found.engine, found.engine_version, found.source) == ("torch", "2.9.1", "kvsim.calibrate.measure on X")
    assert in_us(found) == [
        (Gemm(4, 4096, 4096, "bf16"), 30), (Elementwise("copy", 2**21), 3),
        (DecodeAttention(2, 8, 2, 64, 400, 100, 256.0, "bf16", "contiguous"), 9),
        (PrefillAttention(100, 0, 8, 2, 64, "fp16", 2), 9.5),
    ]  # fmt: skip
    reasons = {row.where.rpartition(":")[2]: row.reason for row in found.rejected}
    assert "is its unit right?" in reasons.pop("12")
    assert reasons == {
        "0": "is eager where a graph of the same shape was measured", "5": "is failed: out of memory",
        "6": "was measured with a warm cache (cold is false)", "7": "is float32, which no table holds",
        "8": "is graph_replay, of which profiles hold no table", "9": "is mode issue, the host's time",
        "10": "p50_us is 0.0, which must be above 0", "11": "lacks 'm'",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "must be a file that kvsim.calibrate.measure wrote .it lacks 'header'"),
        ("{", "must be a file that kvsim.calibrate.measure wrote"),
        ("[1]", "must be a file that kvsim.calibrate.measure wrote"),
        (json.dumps({"header": {**MEASURE_HEADER, "schema_version": 2}, "rows": []}), "schema_version 2, not 1"),
        (json.dumps({"header": {"schema_version": 1}, "rows": []}), "the header lacks the device"),
        (json.dumps({"header": {**MEASURE_HEADER, "device_type": "cpu"}, "rows": []}), "must have been measured on a GPU; its device is X"),
        (json.dumps({"header": {**MEASURE_HEADER, "sessions": []}, "rows": []}), "--engine must name a version"),
        (json.dumps({"header": {**MEASURE_HEADER, "sessions": [{"torch": "1"}, {"torch": "2"}]}, "rows": []}), "of several .1, 2.;"),
    ],
)  # fmt: skip
def test_files_that_measure_did_not_write(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        measure_rows.read(written(tmp_path / "measure.json", text), A100)
    with pytest.raises(InputError, match=r"must be a file that can be read .No such file"):
        measure_rows.read(tmp_path / "absent.json", A100)


def test_a_rate_above_the_datasheet_is_possible_where_the_gpu_file_says_so() -> None:
    """And one that it says is lower takes nothing away from the peak."""
    gpu, op = load_gpu("rtx-3090"), Gemm(8192, 8192, 8192, "bf16")
    fast_s = 2 * 8192**3 / 76.6e12
    assert not impossible(op, fast_s, gpu) and "is its unit right?" in impossible(op, fast_s, gpu.by_datasheet())
    mi300x = load_gpu("mi300x")
    assert not impossible(op, 2 * 8192**3 / 1300e12, mi300x) and impossible(op, 2 * 8192**3 / 1400e12, mi300x)
