"""A user's own run: files as `vllm bench serve --save-detailed` writes them, made here by the simulator itself, come back with error 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvsim.api import simulate
from kvsim.cli import main
from kvsim.errors import InputError
from kvsim.result import PolicyResult
from kvsim.scenario import load_scenario
from kvsim.units import PS_PER_S
from kvsim.validation import replay
from kvsim.validation.bench_serve import MeasuredRun, read_bench_result
from kvsim.validation.latency import mean_counts

SCENARIO = """\
gpu: l4
model: llama-3.1-8b
engine: {kind: vllm_v1, max_num_seqs: 8, num_gpu_blocks: 800, max_model_len: 2048, enable_prefix_caching: false}
policies: {full: []}
"""
OPEN = {
    "arrivals": {"kind": "poisson", "rate_per_s": 2.0}, "num_requests": 60, "seed": 3,
    "lengths": {"kind": "uniform", "prompt_min_tokens": 20, "prompt_max_tokens": 700, "output_min_tokens": 1, "output_max_tokens": 90},
}  # fmt: skip


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SCENARIO)
    return path


def as_bench_serve(result: PolicyResult) -> dict[str, Any]:
    """The result file of a client that saw these requests, chunk by chunk: a token comes at each step's end."""
    log = result.log.request_columns()
    order = np.argsort(log["index"])
    arrival, first, finish, prompt, output = (
        log[name][order] for name in ("arrival_ps", "first_token_ps", "finish_ps", "prompt_tokens", "output_tokens")
    )
    rows = result.log.step_columns()
    ends: list[int] = []
    for start, step, growth, count, decodes in zip(
        *(rows[name].tolist() for name in ("start_ps", "first_step_ps", "step_growth_ps", "num_steps", "num_decodes")), strict=True
    ):
        if decodes:
            lasts = step + growth * np.arange(count)
            ends += (max(start, ends[-1] if ends and start < ends[-1] else start) + np.cumsum(lasts)).tolist()
    token_ps = np.array(sorted(ends))
    gaps = []
    for begin, end in zip(first.tolist(), finish.tolist(), strict=True):
        times = np.concatenate([[begin], token_ps[(token_ps > begin) & (token_ps <= end)]])
        gaps.append((np.diff(times) / PS_PER_S).tolist())
    assert [len(g) + 1 for g in gaps] == output.tolist(), "the file must have a gap for every token"
    return {
        "date": "20250101-000000", "backend": "vllm", "model_id": "m", "num_prompts": len(order), "request_rate": 2.0, "burstiness": 1.0,
        "max_concurrency": None, "duration": 1.0, "completed": len(order), "input_lens": prompt.tolist(), "output_lens": output.tolist(),
        "ttfts": ((first - arrival) / PS_PER_S).tolist(), "itls": gaps, "start_times": (1000.0 + arrival / PS_PER_S).tolist(),
        "generated_texts": [""] * len(order), "errors": [""] * len(order), "mean_ttft_ms": 1.0,
    }  # fmt: skip


@pytest.fixture
def result(scenario: Path) -> dict[str, Any]:
    return as_bench_serve(simulate(load_scenario(scenario, {"workload": OPEN})).policies["full"])


def write(folder: Path, result: Any) -> Path:
    path = folder / "result.json"
    path.write_text(result if isinstance(result, str) else json.dumps(result))
    return path


def test_round_trip(tmp_path: Path, scenario: Path, result: dict[str, Any]) -> None:
    """Arrivals lie in whole picoseconds 1,000 s after the clock's zero, where a float resolves 0.1 ns."""
    rows, notes, _ = replay.replay(write(tmp_path, result), scenario)
    assert notes == ("arrivals: the start times of the file",)
    found = {(row.metric, row.case) for row in rows}
    for metric in ("ttft_s", "tpot_ms", "itl_ms", "e2e_s"):
        assert {(metric, case) for case in ("mean", "P50", "P90", "P99")} <= found
    assert {("ttft_s", "median error of a request"), ("requests in flight", "mean")} <= found
    for row in rows:
        assert abs(row.error) < 1e-6, row
    bars = replay.bars(rows)
    assert len(bars) == 8 and all(bar.met for bar in bars)


def test_a_slower_deployment_is_seen(tmp_path: Path, scenario: Path, result: dict[str, Any]) -> None:
    """The same file against half the number of sequences: later first tokens, and bars that are missed."""
    path = write(tmp_path, result)
    scenario.write_text(SCENARIO.replace("max_num_seqs: 8", "max_num_seqs: 4"))
    rows, _, _ = replay.replay(path, scenario)
    by = {(row.metric, row.case): row.error for row in rows}
    assert by["ttft_s", "mean"] > 0.1 and by["tpot_ms", "mean"] < 0
    assert not all(bar.met for bar in replay.bars(rows))


def test_the_order_of_the_file_does_not_matter(tmp_path: Path, scenario: Path, result: dict[str, Any]) -> None:
    lists = [key for key, value in result.items() if isinstance(value, list)]
    order = np.random.default_rng(0).permutation(len(result["ttfts"]))
    mixed = {**result, **{key: [result[key][i] for i in order] for key in lists}}
    rows, _, _ = replay.replay(write(tmp_path, mixed), scenario)
    assert max(abs(row.error) for row in rows) < 1e-6


def test_failed_requests_are_left_out_and_told(tmp_path: Path, scenario: Path, result: dict[str, Any]) -> None:
    """Two more that failed, one with an error text and one without any output."""
    for error, tokens in (("Traceback: 500", 7), ("", 0)):
        for key, value in (
            ("input_lens", 100), ("output_lens", tokens), ("ttfts", 0.0), ("itls", []), ("errors", error), ("start_times", 1e4),
            ("generated_texts", ""),
        ):  # fmt: skip
            result[key].append(value)
    rows, notes, _ = replay.replay(write(tmp_path, result), scenario)
    assert notes[0].startswith("2 of 62 requests failed")
    assert max(abs(row.error) for row in rows) < 1e-6


def test_without_start_times_the_stated_traffic_is_drawn(tmp_path: Path, scenario: Path, result: dict[str, Any]) -> None:
    del result["start_times"]
    rows, notes, _ = replay.replay(write(tmp_path, result), scenario)
    assert "drawn anew at the stated 2 requests/s" in notes[0]
    assert not [row for row in rows if row.is_relative or "in flight" in row.metric], "requests cannot be paired"
    assert {row.metric for row in rows} == {"ttft_s", "tpot_ms", "itl_ms", "e2e_s"}
    assert abs(next(row.error for row in rows if (row.metric, row.case) == ("tpot_ms", "mean"))) < 0.2


def test_drawn_starts_keep_rate_and_burstiness() -> None:
    def starts(burstiness: float) -> np.ndarray:
        n = np.ones(4000, int)
        return replay.drawn_starts_s(MeasuredRun("f", n, n, n * 0.1, (), None, 5.0, burstiness, None, ()))

    for burstiness, cv in ((1.0, 1.0), (0.25, 2.0), (4.0, 0.5), (float("inf"), 0.0)):
        found = starts(burstiness)
        assert found[-1] == pytest.approx(4000 / 5.0)
        gaps = np.diff(found)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.1)


def test_closed_loop(tmp_path: Path, scenario: Path) -> None:
    """No start times and no rate: the stated concurrency, its lengths in the file's order, gives the same run again."""
    loop = {**OPEN, "arrivals": {"kind": "closed_loop", "clients": 5}}
    result = as_bench_serve(simulate(load_scenario(scenario, {"workload": loop})).policies["full"])
    del result["start_times"]
    result |= {"request_rate": "inf", "max_concurrency": 5}
    rows, notes, _ = replay.replay(write(tmp_path, result), scenario)
    assert "closed loop of 5 clients" in notes[0]
    assert max(abs(row.error) for row in rows) < 1e-6


def test_all_at_once(tmp_path: Path, scenario: Path) -> None:
    once = {**OPEN, "arrivals": {"kind": "all_at_once"}}
    result = as_bench_serve(simulate(load_scenario(scenario, {"workload": once})).policies["full"])
    del result["start_times"]
    rows, notes, _ = replay.replay(write(tmp_path, {**result, "request_rate": "inf"}), scenario)
    assert "all requests at once" in notes[0] and max(abs(row.error) for row in rows) < 1e-6


WRONG: list[tuple[Any, str]] = [
    ("", "must be JSON"),
    ("{", "must be JSON"),
    ("[1]", "must hold a JSON object, not a list"),
    ('{"a": 1}\n{"a": 2}\n', "it holds 2"),
    ({"mean_ttft_ms": 3.0}, "--save-detailed"),
    ({"input_lens": [1], "output_lens": [1], "ttfts": [0.1]}, "itls not found"),
    ({"input_lens": 5, "output_lens": [1], "ttfts": [0.1], "itls": [[]]}, "found a int"),
    ({"input_lens": [1, 2], "output_lens": [1], "ttfts": [0.1], "itls": [[]]}, "lists of one length"),
    ({"input_lens": [], "output_lens": [], "ttfts": [], "itls": []}, "must hold a request"),
    ({"input_lens": [5], "output_lens": [3], "ttfts": [0.1], "itls": [[0.1]], "errors": ["x"]}, "all 1 failed"),
    ({"input_lens": [5], "output_lens": [3], "ttfts": ["soon"], "itls": [[0.1]]}, "ttfts[0]; found 'soon'"),
    ({"input_lens": [5.5], "output_lens": [3], "ttfts": [0.1], "itls": [[0.1]]}, "input_lens[0]; found 5.5"),
    ({"input_lens": [5], "output_lens": [3], "ttfts": [0.1], "itls": [[-0.1]]}, "itls[0][0]; found -0.1"),
    ({"input_lens": [5], "output_lens": [3], "ttfts": [0.1], "itls": [0.1]}, "list of seconds in itls[0]"),
    ({"input_lens": [5], "output_lens": [3], "ttfts": [0.1], "itls": [[0.1]], "request_rate": -1}, "request_rate"),
    ({"input_lens": [5], "output_lens": [3], "ttfts": [0.1], "itls": [[0.1]], "start_times": [None]}, "start_times[0]; found None"),
    ({"input_lens": [5], "output_lens": [3], "ttfts": [0.1], "itls": [[0.1]]}, "start_times or a request_rate"),
]


@pytest.mark.parametrize(("content", "says"), WRONG, ids=[says for _, says in WRONG])
def test_wrong_files_end_in_one_line(content: Any, says: str, tmp_path: Path, scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, content)
    assert main(["validate", "requests", "--measured", str(path), "--scenario", str(scenario)]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out


def test_the_command(tmp_path: Path, scenario: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, result)
    assert main(["validate", "requests", "--measured", str(path), "--scenario", str(scenario), "--out", str(tmp_path / "v")]) == 0
    told = capsys.readouterr().out
    assert "side by side" in told and "itl_ms" in told and "the start times of the file" in told
    lines = (tmp_path / "v" / "requests.csv").read_text().splitlines()
    assert len(lines) == 61 and lines[0].startswith("start_s,prompt_tokens,output_tokens,measured_ttft_s,simulated_ttft_s")
    for line in lines[1:]:
        values = [float(value) for value in line.split(",")]
        assert values[3::2] == pytest.approx(values[4::2], rel=1e-6)
    assert "requests, one by one: ttft_s" in (tmp_path / "v" / "validation.html").read_text()
    content = json.loads((tmp_path / "v" / "validation.json").read_text())
    assert content["notes"] == ["arrivals: the start times of the file"]
    two = scenario.with_name("two.yaml")
    two.write_text(SCENARIO.replace("full: []", "full: [], half: [{kind: window, window_tokens: 64}]"))
    arguments = ["validate", "--measured", str(path), "--scenario", str(two)]
    assert main(arguments) == 2 and "--policy: full, half" in capsys.readouterr().err
    assert main([*arguments, "--policy", "full"]) == 0
    for wrong, says in (
        (["validate", "silicon", "--measured", str(path), "--scenario", str(scenario)], "must be requests"),
        (["validate", "requests", "--scenario", str(scenario)], "must be given with --scenario"),
        (["validate", "requests", "--measured", str(path)], "add --scenario FILE"),
        (["validate", "requests", "--measured", str(tmp_path / "no.json"), "--scenario", str(scenario)], "does not exist"),
        (["validate", "memory", "--policy", "full"], "belongs to a run of your own"),
    ):
        capsys.readouterr()
        assert main(wrong) == 2
        assert says in capsys.readouterr().err


def test_counts_over_time_are_integrals() -> None:
    """Against counting intervals at many instants."""
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 10, 50)
    end = start + rng.exponential(2.0, 50)
    edges = np.linspace(0, 12, 7)
    found = mean_counts(start, end, edges)
    for i in range(6):
        at = np.linspace(edges[i], edges[i + 1], 20_001)
        counted = ((start[:, None] <= at) & (end[:, None] > at)).sum(0).mean()
        assert found[i] == pytest.approx(counted, abs=0.01)


def test_the_file_is_read_as_it_is(tmp_path: Path, result: dict[str, Any]) -> None:
    run = read_bench_result(write(tmp_path, result))
    assert run.prompt_tokens.tolist() == result["input_lens"] and run.start_s is not None and run.start_s[0] == 0.0
    assert run.e2e_s[0] == pytest.approx(result["ttfts"][0] + sum(result["itls"][0]))
    with pytest.raises(InputError, match="does not exist"):
        read_bench_result(tmp_path / "none.json")
