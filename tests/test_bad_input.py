"""Wrong input: one line on standard error that says field, rule and fix, exit code 2, nothing written."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from kvsim.cli import main
from kvsim.commands.exit_codes import BAD_INPUT, DONE

SCENARIO = """\
gpu: a100-sxm-80gb
model: llama-3.1-8b
engine: {kind: vllm_v1, max_model_len: 4096}
workload:
  arrivals: {kind: poisson, rate_per_s: 8}
  lengths: {kind: fixed, prompt_tokens: 512, output_tokens: 16}
  num_requests: 20
policies:
  full: []
  snapkv: [{kind: snapkv, budget_tokens: 256}]
slo: {ttft_p99_s: 2.0}
"""
HEADER = "arrival_s,prompt_tokens,output_tokens\n"


class Wrong(NamedTuple):
    """settings: `--set` options; says: parts of the line, the field first and the fix last."""

    settings: list[str]
    says: list[str]

    @property
    def id(self) -> str:
        return " ".join(self.settings)


def wrong(settings: str | list[str], *says: str) -> Wrong:
    return Wrong([settings] if isinstance(settings, str) else settings, list(says))


GPU_MODEL_ENGINE = [
    wrong("gpu=a100-sxm-80g", "gpu='a100-sxm-80g' is not in the catalogue", "did you mean a100-sxm-80gb"),
    wrong("gpu=2024-12-05", "gpu='2024-12-05' must be text", "put it in quotes"),
    wrong("gpu=null", "gpu=null must be text", "try gpu: a100-sxm-80gb"),
    wrong("gpu=mine.yaml", "gpu='mine.yaml' does not exist", "path of a file"),
    wrong("gpu=broken_gpu.yaml", "gpu.hbm_bandwidth_gb_per_s='2039 GB/s' must be a number", "without a unit"),
    wrong("model=llama3.1-8b", "model='llama3.1-8b' is not in the catalogue", "did you mean llama-3.1-8b"),
    wrong("gpu=scenario.yaml", "gpu.memory_gib is missing", "as those in kvsim/data/gpus/"),
    wrong("model=scenario.yaml", "model.num_q_heads is missing", "kvsim/data/models/, or give a Hugging Face config.json"),
    wrong("model=.", "model='.' is a folder without a config.json", "a Hugging Face checkpoint"),
    wrong("model=t5.json", "model.model_type='t5' must be one of llama", "kvsim/data/models/"),
    wrong("model=cut.json", "model='cut.json' is not valid JSON", "give a Hugging Face config.json"),
    wrong("model=moe.json", "model.num_local_experts=8 means a mixture of experts, which is not supported"),
    wrong("engine=vllm_v1", "engine='vllm_v1' must be a mapping", "try engine: {kind: vllm_v1}"),
    wrong("engine.kind=vllm", "engine.kind='vllm' is not known", "did you mean vllm_v1?"),
    wrong("engine.kind=lmdeploy", "engine.kind='lmdeploy' is not known", "use one of vllm_v1, vllm_v0, trtllm, sglang, huggingface"),
    wrong("engine={}", "engine.kind is missing", "use one of vllm_v1"),
    wrong("enigne={}", "enigne is not a known field", "did you mean engine?"),
    wrong("engine.max_seqs=64", "engine.max_seqs is not a known field", "did you mean max_num_seqs?"),
    wrong("max_num_seqs=64", "max_num_seqs is not a known field", "did you mean engine.max_num_seqs?"),
    wrong("engine.swap_space_gib=4", "engine.swap_space_gib is not a known field", "belongs to kind vllm_v0"),
    wrong("base_dir=/tmp", "base_dir is not a known field", "folder of the scenario's file"),
    wrong("engine.max_num_seqs=0", "engine.max_num_seqs=0 must be > 0", "the default is 256"),
    wrong("engine.max_num_seqs=-3", "engine.max_num_seqs=-3 must be > 0", "the default is 256"),
    wrong("engine.max_num_seqs=true", "engine.max_num_seqs=true must be a number"),
    wrong("engine.max_num_seqs=2.5", "engine.max_num_seqs=2.5 must be a whole number", "the default is 256"),
    wrong("engine.max_num_seqs=64 seqs", "engine.max_num_seqs='64 seqs' must be a whole number without a unit"),
    wrong("engine.max_num_seqs=1e3", "engine.max_num_seqs='1e3' must be a whole number", "write 1000"),
    wrong("engine.max_num_seqs=.nan", "engine.max_num_seqs=nan must be a finite number"),
    wrong("engine.max_num_seqs=4000000000000", "must be at most 2,147,483,647", "check its unit"),
    wrong("engine.num_gpu_blocks=99999999", "engine.num_gpu_blocks=99999999 must fit the GPU", "give at most 33301"),
    wrong("engine={kind: flexgen, disk_read_gb_per_s: 2 GB/s}", "engine.disk_read_gb_per_s='2 GB/s'", "in GB per second"),
    wrong("engine.gpu_memory_utilization=90%", "engine.gpu_memory_utilization='90%' must be a number", "write 0.9"),
    wrong("engine.gpu_memory_utilization=90", "engine.gpu_memory_utilization=90 must be <= 1", "the default is 0.9"),
    wrong("engine={kind: vllm_v0, swap_space_gib: 2 GB}", "engine.swap_space_gib='2 GB' must be a number", "it is in GiB"),
    wrong("engine={kind: vllm_v0, swap_space_gib: .inf}", "engine.swap_space_gib=inf must be a finite number"),
    wrong("engine.kv_cache_dtype=fp4", "engine.kv_cache_dtype='fp4' must be auto", "did you mean fp8?"),
    wrong("engine.max_num_batched_tokens=128", "must be at least max_num_seqs=256", "raise the budget"),
    wrong("engine={kind: vllm_v0, max_num_batched_tokens: 1024}", "engine.max_num_batched_tokens=1024", "max_model_len"),
    wrong("engine.max_model_len=200000", "engine.max_model_len=200000 must be at most the context", "lower it"),
    wrong("weight_dtype=bf61", "weight_dtype='bf61' must be fp32", "did you mean bf16?"),
    wrong("profile=h100", "profile='h100' is not in the catalogue", "`kvsim list profiles` shows all names"),
    wrong("profile=./nothing.json", "profile=", "must be a file that can be read"),
    wrong("tensor_parallel=3", "tensor_parallel=3 must divide the 32 query heads", "use one of 1, 2, 4, 8"),
    wrong(["model=qwen2.5-7b", "tensor_parallel=8"], "tensor_parallel=8 must divide the 28 query heads", "1, 2, 4, 7"),
    wrong("tensor_parallel=16", "tensor_parallel=16 must be <= 8"),
]
WORKLOAD = [
    wrong("workload.arrivals.rate_per_s=8 req/s", "workload.arrivals.rate_per_s='8 req/s' must be a number without a unit",
          "requests per second"),
    wrong("workload.arrivals.rate_per_s=0", "workload.arrivals.rate_per_s=0 must be >= 1e-06", "requests per second"),
    wrong("workload.arrivals.rate_per_s=.nan", "workload.arrivals.rate_per_s=nan must be a finite number"),
    wrong("workload.arrivals.rate_per_s=.inf", "workload.arrivals.rate_per_s=inf must be a finite number"),
    wrong("workload.arrivals.rate_per_s=1.0e-6", "must be served within 9,000,000 s", "raise the rate"),
    wrong("workload.arrivals.rate=8", "workload.arrivals.rate is not a known field", "rate_per_s"),
    wrong("workload.arrivals.kind=poison", "workload.arrivals.kind='poison' is not known", "did you mean poisson?"),
    wrong("workload.arrivals=8", "workload.arrivals=8 must be a mapping", "try arrivals: {kind: poisson"),
    wrong("workload.arrivals={kind: gamma, rate_per_s: 8}", "workload.arrivals.burstiness is missing", "1 is Poisson"),
    wrong("workload.arrivals={kind: closed_loop, clients: 400}", "num_requests=20 >= arrivals.clients=400", "fewer clients"),
    wrong("workload.lengths.prompt_tokens=0", "workload.lengths.prompt_tokens=0 must be >= 1"),
    wrong("workload.lengths.prompt_tokens=1k", "workload.lengths.prompt_tokens='1k' must be a whole number", "in tokens"),
    wrong("workload.lengths.prompt_mean_tokens=9", "prompt_mean_tokens is not a known field", "belongs to kind lognormal"),
    wrong("workload.lengths={kind: empirical, path: nope.csv}", "workload.lengths.path='nope.csv'", "scenario's folder"),
    wrong("workload.num_requests=null", "workload must have num_requests", "try num_requests: 2000"),
    wrong("workload.num_requests=99999999999", "num_requests=99,999,999,999 must be at most 2,147,483,647"),
    wrong("workload.num_requests=true", "workload.num_requests=true must be a number"),
    wrong("workload.num_requests=-5", "workload.num_requests=-5 must be >= 1"),
    wrong("workload.warmup_requests=20", "warmup_requests=20 below the number of requests, 20", "try 2"),
    wrong("workload={}", "workload must have arrivals", "or a trace", "try arrivals"),
    wrong("workload=null", "workload=null must be a mapping", "try workload:"),
    wrong("workload.trace={path: good.csv, format: csv}", "workload must have either a trace or", "leaving one of them out"),
    # Longer than the context, the pool, or both.
    wrong("workload.lengths.prompt_tokens=5000", "prompt + output tokens=5016 must be at most 4096", "longer context"),
    wrong("engine.num_gpu_blocks=8", "prompt tokens=512 must fit the KV pool", "the pool holds 16.00 MiB", "shorten"),
]  # fmt: skip
TRACES = [
    wrong("workload={trace: {path: nope.csv, format: csv}}", "workload.trace.path='nope.csv' must be a file", "folder"),
    wrong("workload={trace: {path: good.csv}}", "workload.trace.format is missing"),
    wrong("workload={trace: {path: good.csv, format: azur}}", "workload.trace.format='azur'", "did you mean azure?"),
    wrong("workload={trace: good.csv}", "workload.trace='good.csv' must be a mapping", "try trace: {path:"),
    wrong("workload={trace: {path: good.csv, format: azure}}", "workload.trace.format='azure'", "try format: csv"),
    wrong("workload={trace: {path: good.csv, format: csv, rate_scale: 2x}}", "workload.trace.rate_scale='2x'"),
    wrong("workload={trace: {path: empty.csv, format: csv}}", "workload.trace.path='empty.csv' must have at least one row"),
    wrong("workload={trace: {path: header.csv, format: csv}}", "must have at least one usable row", "check the file"),
    wrong("workload={trace: {path: word.csv, format: csv}}", "word.csv:3 prompt_tokens='x'", "correct the row"),
    wrong("workload={trace: {path: nan.csv, format: csv}}", "nan.csv:3 arrival_s='nan'", "correct the row"),
    wrong("workload={trace: {path: back.csv, format: csv}}", "back.csv:3 arrival_s=1.0", "sort the rows"),
    wrong("workload={trace: {path: cut.csv.gz, format: csv}}", "cut.csv.gz", "copy it again"),
    wrong("workload={trace: {path: cut.jsonl, format: jsonl}}", "cut.jsonl:1 row=", "correct the row"),
    wrong("workload={trace: {path: ., format: csv}}", "workload.trace.path='.' must be a readable file (Is a directory)"),
    wrong(["engine.block_size_tokens=48", "workload={trace: {path: moon.jsonl, format: mooncake}}"],
          "engine.block_size_tokens=48 must divide the trace's hash blocks of 512", "enable_prefix_caching: false"),
    wrong("workload={trace: {path: hashed.csv, format: csv}}", "workload.trace.hash_block_tokens must be given", "try 16"),
    wrong("workload={trace: {path: good.csv, format: csv}, warmup_requests: 9}", "workload.warmup_requests=9", "try 0"),
]  # fmt: skip
POLICIES = [
    wrong("policies={}", "policies must name at least one policy", "try full: []"),
    wrong("policies=null", "policies=null must be a mapping", "try policies: {full: []"),
    wrong("policies=[snapkv]", "policies=['snapkv'] must be a mapping", "try policies: {full: []"),
    wrong('policies={"": []}', "policies has the name ''", "a name of letters"),
    wrong('policies={"a\\nb": []}', "policies has the name 'a\\nb'", "a name of letters"),
    wrong("policies={4: []}", "policies has the key 4, which must be text", "put it in quotes"),
    wrong("policies.full=null", "policies.full=null must be a list", "[] keeps the whole cache"),
    wrong("policies.a=[full]", "policies.a[0]='full' must be a mapping", "try {kind: full}"),
    wrong("policies.a={kind: snapkv}", "policies.a={'kind': 'snapkv'} must be a list", "put it in [ ]"),
    wrong("policies.a=[{}]", "policies.a[0].kind is missing", "use one of full, keyformer"),
    wrong("policies.a=[{kind: snap_kv}]", "policies.a[0].kind='snap_kv' is not known", "did you mean snapkv?"),
    wrong("policies.snapkv[0].budget_tokens=0", "policies.snapkv[0].budget_tokens=0 must be > 0", "the default is 2048"),
    wrong("policies.snapkv[0].budget=64", "policies.snapkv[0].budget is not a known field", "did you mean budget_tokens?"),
    wrong("policies.snapkv[0].budget_tokens=16", "policies.snapkv[0].window_tokens=32 must be below", "lower the window"),
    wrong("policies.a=[{kind: h2o}]", "policies.a[0] must have kept_frac or budget_tokens", "try kept_frac: 0.2"),
    wrong("policies.a=[{kind: kivi, group_size_tokens: 48}]", "policies.a[0].group_size_tokens=48 must divide", "try 32"),
    wrong("policies.a=[{kind: kivi, bits: 3}]", "policies.a[0].bits=3 must be 2 or 4", "the default is 2"),
    wrong("policies.a=[{kind: think, pruned_frac: 40%}]", "policies.a[0].pruned_frac='40%'", "write 0.4"),
    wrong("policies.a=[{kind: keyformer, tau_end: .inf}]", "policies.a[0].tau_end=inf must be a finite number"),
    wrong("policies.a=[{kind: kv_compress}]", "policies.a[0].compression_ratio is missing", "prompt tokens over kept ones"),
    wrong("policies.a=[{kind: snapkv}, {kind: h2o, kept_frac: 0.5}]", "policies.a=['snapkv', 'h2o'] must hold at most one",
          "drop snapkv or h2o"),
    wrong("policies.a=[{kind: kivi}, {kind: kv_quant}]", "at most one policy that acts on bits", "drop kivi or kv_quant"),
    wrong(["engine.kv_cache_dtype=fp8", "policies.a=[{kind: kv_quant}]"], "engine.kv_cache_dtype=fp8", "at auto"),
    wrong("policies.a=[{kind: ada_kv}]", "another number of tokens in every KV head", "engine.per_head_kv: true"),
    wrong("policies.a=[{kind: kv_compress, compression_ratio: 4, table_tokens: 4096}]", "policies.a[0].table_tokens=4096 must be 0",
          "implementation: paper"),
    wrong("policies.a=[{kind: kv_compress, compression_ratio: 4, implementation: paper, interval_steps: 4}]",
          "policies.a[0].interval_steps=4 must be 1", "implementation: kernels"),
    wrong(["engine.per_head_kv=true", "policies.a=[{kind: kv_compress, compression_ratio: 4, block_size_tokens: 32}]"],
          "policies.a[0].block_size_tokens=32 must be engine.block_size_tokens=16", "set it to 16"),
    wrong("slo={ttft_p99: 2}", "slo.ttft_p99=2.0 is not a limit", "did you mean ttft_p99_s?"),
    wrong("slo={TTFT_p99_s: 2}", "slo.TTFT_p99_s=2.0 is not a limit", "did you mean ttft_p99_s?"),
    wrong("slo.ttft_p99_s=2 s", "slo.ttft_p99_s='2 s' must be a number without a unit", "it is in seconds"),
    wrong("slo.ttft_p99_s=-1", "slo.ttft_p99_s=-1.0 must be a positive number", "try 2.0"),
    wrong("slo.ttft_p99_s=true", "slo.ttft_p99_s=true must be a number"),
]  # fmt: skip
DOES_NOT_FIT = [
    wrong("gpu=t4", "llama-3.1-8b does not fit on 1 x t4-16gb: ", "GiB a GPU short", "what would fit: tensor_parallel: 2"),
    wrong("model=llama-3.1-70b", "GiB a GPU short", "tensor_parallel: 2 or weight_dtype: fp8"),
    wrong("model=llama-3.1-405b", "GiB a GPU short", "tensor_parallel: 8 with weight_dtype: fp8"),
    wrong("engine.gpu_memory_utilization=0.15", "GiB a GPU short", "what would fit: engine.gpu_memory_utilization: 0.2"),
    wrong("engine={kind: huggingface, max_prefill_tokens: 100000, attn_implementation: eager}", "activation peak",
          "a lower engine.max_prefill_tokens"),
    wrong(["engine={kind: huggingface, batch_size: 20, fit_batch: false}", "workload.lengths.prompt_tokens=60000",
           "workload.arrivals={kind: all_at_once}"], "engine.batch_size=20", "GiB short", "lower batch_size"),
]  # fmt: skip
SETTINGS = [
    wrong("engine", "--set='engine' must be field=value", "try --set engine.max_num_seqs=64"),
    wrong("engine..x=4", "--set='engine..x' must be a dotted field", "try engine.max_num_seqs=64"),
    wrong("gpu.x=4", "--set gpu.x=4 must name a field of a mapping; gpu is none"),
    wrong("policies.snapkv[3].budget_tokens=16", "policies.snapkv is a list of 1"),
    wrong("engine=[", "--set engine='[' is not valid YAML"),
]
TABLE = [*GPU_MODEL_ENGINE, *WORKLOAD, *TRACES, *POLICIES, *DOES_NOT_FIT, *SETTINGS]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the scenario and some broken files."""
    monkeypatch.chdir(tmp_path)
    row = "0,5,5\n"
    texts = {
        "scenario.yaml": SCENARIO,
        "good.csv": HEADER + row + "1,5,5\n",
        "moon.jsonl": '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n',
        "hashed.csv": HEADER.replace("\n", ",prefix_hashes\n") + "0,500,5,1 2\n",
        "empty.csv": "",
        "header.csv": HEADER,
        "word.csv": HEADER + row + "1,x,5\n",
        "nan.csv": HEADER + row + "nan,5,5\n",
        "back.csv": HEADER + "5,5,5\n1,4,5\n",
        "cut.jsonl": '{"arrival_s": 0, \n',
        "t5.json": '{"model_type": "t5"}',
        "cut.json": '{"model_type": ',
        "moe.json": '{"model_type": "llama", "num_local_experts": 8}',
        "broken_gpu.yaml": "memory_gib: 80\nusable_memory_gib: 79\nhost_link_gb_per_s: 32\ngpu_link_gb_per_s: 300\n"
        "peak_tflops: {fp16: 312}\nhbm_bandwidth_gb_per_s: 2039 GB/s\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress((HEADER + row * 1000).encode())[:40])
    return tmp_path


def check_refused(argv: list[str], says: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(folder.rglob("*"))
    assert main(argv) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvsim: error: ") and captured.err.count("\n") == 1, captured.err
    assert len(captured.err) < 400, captured.err
    assert "Traceback" not in captured.err and "pydantic" not in captured.err
    place = 0
    for part in says:
        assert part in captured.err[place:], f"{part!r} is not (in this order) in {captured.err!r}"
        place = captured.err.index(part, place)
    assert sorted(folder.rglob("*")) == before
    return captured.err


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id[:70])
def test_one_line_says_field_rule_and_fix(case: Wrong, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [part for setting in case.settings for part in ("--set", setting)]
    check_refused(["run", "scenario.yaml", "--out", "out", *settings], case.says, folder, capsys)


FILES = {
    "empty": ("", ["scenario='s.yaml' must not be empty", "gpu, model, engine"]),
    "only a comment": ("# nothing\n", ["must not be empty"]),
    "a list": ("- a\n", ["scenario='s.yaml' must hold a mapping", "gpu, model, engine"]),
    "a word": ("hello\n", ["must hold a mapping"]),
    "a key twice": (SCENARIO + "gpu: l4\n", ["is not valid YAML at line 12", "key 'gpu' is given twice"]),
    "a nested key twice": (SCENARIO.replace("slo: {", "slo: {ttft_p99_s: 1, "), ["line 11", "'ttft_p99_s' is given twice"]),
    "unbalanced": ("gpu: [a\nmodel: x\n", ["is not valid YAML at line 2"]),
    "a tab": ("gpu:\n\t- x\n", ["is not valid YAML at line 2"]),
    "a list as a key": ("{[1, 2]: 3}\n", ["is not valid YAML at line 1", "a key must be one word"]),
    "no such month": ("gpu: 2024-13-45\n", ["is not valid YAML", "put such text in quotes"]),
    "a control character": ("gpu: \x00\n", ["is not valid YAML", "control characters"]),
    "a Python object": ("gpu: !!python/object:os.system x\n", ["is not valid YAML at line 1", "tag"]),
    "a number as a key": (SCENARIO + "5: 3\n", ["scenario has the key 5, which must be text", "quotes"]),
    "too deep": ("a: " + "[" * 100_000 + "]" * 100_000 + "\n", ["is nested more than 100 deep", "check its brackets"]),
    "a sweep": ("scenario: s.yaml\nvary: {workload.seed: [1, 2]}\n", ["vary belongs to a sweep", "run `kvsim sweep`"]),
    "nothing but a GPU": ("gpu: l4\n", ["model is missing", "try model: llama-3.1-8b", "3 more problems"]),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_scenario(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, says = FILES[name]
    (folder / "s.yaml").write_text(text)
    check_refused(["run", "s.yaml", "--out", "out"], says, folder, capsys)


def test_files_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    check_refused(["run", "nope.yaml"], ["scenario='nope.yaml' does not exist", "give the path"], folder, capsys)
    check_refused(["run", "."], ["scenario='.' is a folder", "give the path"], folder, capsys)
    check_refused(["show", "binary.yaml"], ["scenario='binary.yaml' must be UTF-8 text"], folder, capsys)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policy", "snapvk"], ["--policy='snapvk' must be one of the scenario's", "did you mean snapkv?"]),
        (["--sections", "latncy"], ["--sections='latncy' must be a section", "use title, latency"]),
        (["--perfetto"], ["--perfetto writes a file", "add --out DIR"]),
        (["--requests-format", "parquet"], ["--requests-format writes a file", "add --out DIR"]),
        (["--requests-format", "xml"], ["--requests-format", "'xml'", "kvsim run --help"]),
        (["--set"], ["--set", "requires an argument", "kvsim run --help"]),
        (["--out", ""], ["--out='' must not be empty", "name a folder"]),
        (["--bogus"], ["--bogus", "kvsim run --help"]),
        (["--out", "scenario.yaml"], ["--out='scenario.yaml' must be a directory", "choose another"]),
        (["--out", "scenario.yaml/out"], ["must be a directory", "choose another"]),
        (["--out", "/proc/nowhere/out"], ["--out='/proc/nowhere/out' cannot be written", "choose another"]),
    ],
    ids=" ".join,
)
def test_options(options: list[str], says: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(["run", "scenario.yaml", *options], says, folder, capsys)


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused([], ["Missing command", "kvsim --help"], folder, capsys)
    check_refused(["runn"], ["'runn'", "kvsim --help"], folder, capsys)
    check_refused(["run"], ["SCENARIO", "kvsim run --help"], folder, capsys)
    check_refused(["list", "gpu"], ["'gpu'", "kvsim list --help"], folder, capsys)
    check_refused(["sweep", "scenario.yaml"], ["sweep must be a sweep file", "{scenario: FILE, vary:"], folder, capsys)
    check_refused(["sweep", "nope.yaml"], ["sweep='nope.yaml' does not exist", "path of a sweep file"], folder, capsys)
    check_refused(["validate", "theory", "--out", "scenario.yaml"], ["--out='scenario.yaml' must be a directory"], folder, capsys)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("{target_rate_per_s: 4, gpus: [l4]}", ["plan.gpus=['l4'] must be a mapping", "{price_per_gpu_hour: 2.5}"]),
        ("{target_rate_per_s: 4, gpus: {l4: 2.5}}", ["plan.gpus.l4=2.5 must be a mapping of fields", "try {price_per_gpu_hour"]),
        ("{target_rate_per_s: 4, gpus: {l4: {price_per_gpu_hour: -2}}}", ["price_per_gpu_hour=-2 must be >= 0", "it means: price"]),
    ],
)
def test_plans(block: str, says: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "plan.yaml").write_text(f"{SCENARIO}plan: {block}\n")
    check_refused(["plan", "plan.yaml"], says, folder, capsys)


@pytest.mark.parametrize("trace", ["word.csv", "empty.csv", "long.csv"])
def test_init_reads_the_trace_that_it_names(trace: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scenario that could not run is not written."""
    (folder / "long.csv").write_text(HEADER + "0,500000,5\n")
    check_refused(["init", "--traffic", trace, "--out", "new.yaml"], [], folder, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "locked").mkdir(mode=0o500)
    check_refused(["run", "scenario.yaml", "--out", "locked/out"], ["cannot be written"], folder, capsys)


@pytest.mark.parametrize("fix", ["tensor_parallel=2", "weight_dtype=fp8", "gpu=a10g-24gb"])
def test_what_would_fit_does(fix: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "gpu=t4", "--policy", "full"]
    line = check_refused(["run", "scenario.yaml", *options], ["what would fit: "], folder, capsys)
    assert fix.replace("=", ": ") in line
    assert main(["run", "scenario.yaml", "-q", *options, "--set", fix]) == DONE


def test_a_full_disk_leaves_no_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvsim.reports import files

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_requests_csv", full)
    check_refused(["run", "scenario.yaml", "--out", "a/b", "--no-plots", "-q"], ["cannot be written (No space"], folder, capsys)


def test_the_real_program_ends_the_same_way(folder: Path) -> None:
    """Through the interpreter: exit code, one line, no traceback."""
    command = [sys.executable, "-m", "kvsim.cli", "run", "scenario.yaml", "--set", "engine.max_num_seqs=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (BAD_INPUT, "")
    assert done.stderr == "kvsim: error: engine.max_num_seqs=0 must be > 0; the default is 256\n"


def test_the_scenario_of_this_table_is_good(folder: Path) -> None:
    assert main(["run", "scenario.yaml", "-q"]) == DONE
    assert yaml.safe_load(SCENARIO)["policies"]["full"] == []


LONG = "a" * 300


@pytest.mark.parametrize(
    "argv", [["run", "scenario.yaml", "--out", LONG], ["report", LONG], ["run", "scenario.yaml", "--set", f"gpu={LONG}.yaml"]]
)
def test_a_path_that_no_file_system_takes_is_one_line(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(argv, ["the path is too long; give a shorter one"], folder, capsys)
