"""Numbers of a report against paper and pencil: Llama-3.1-8B on an A100, four requests that never meet, 1024 tokens in and 129 out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvsim.api import simulate
from kvsim.engines.base import FRONT_END_S
from kvsim.reports.resolved import print_resolved
from kvsim.reports.terminal import render_text
from kvsim.result import Result
from kvsim.scenario import Scenario, parse_scenario

MIB = 2**20
PROMPT, OUTPUT, NUM, GAP_S = 1024, 129, 4, 20.0
TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
"""Keys and values, 32 layers, 8 KV heads of 128 channels, 2 bytes: 128 KiB."""
LAYER_PARAMS = (4096 + 2 * 1024) * 4096 + 4096 * 4096 + 2 * 14336 * 4096 + 4096 * 14336
"""Queries, keys and values; output; gate and up; down."""
HEAD_PARAMS, NORM_PARAMS = 128256 * 4096, 65 * 4096
HBM_BYTES_PER_S, PEAK_FLOPS = 2039e9, 312e12
POLICIES: dict[str, list[dict[str, Any]]] = {
    "full": [], "fp8": [{"kind": "kv_quant", "dtype": "fp8"}], "snapkv": [{"kind": "snapkv", "budget_tokens": 512}],
    "window": [{"kind": "window", "window_tokens": 256}],
}  # fmt: skip


def scenario() -> Scenario:
    return parse_scenario({
        "gpu": "a100-sxm-80gb", "model": "llama-3.1-8b", "engine": {"kind": "vllm_v1", "max_model_len": 9216},
        "workload": {
            "arrivals": {"kind": "constant", "rate_per_s": 1 / GAP_S}, "num_requests": NUM,
            "lengths": {"kind": "fixed", "prompt_tokens": PROMPT, "output_tokens": OUTPUT},
        },
        "policies": POLICIES,
    })  # fmt: skip


@pytest.fixture(scope="module")
def result() -> Result:
    return simulate(scenario())


def mean_blocks(first_tokens: int) -> float:
    """Blocks of 16 tokens over the 128 decode steps, each with a token more than the one before."""
    return sum(-(-(first_tokens + k) // 16) for k in range(OUTPUT - 1)) / (OUTPUT - 1)


def test_kv_per_sequence_is_a_mean_over_its_decoding(result: Result) -> None:
    """137 MiB: 68.5 blocks of 2 MiB between the 65th and the 72nd; snapkv's grow from 513 tokens, fp8's are half as wide."""
    held = {name: policy.kv_bytes_per_sequence / MIB for name, policy in result.policies.items()}
    assert mean_blocks(PROMPT + 1) * 16 * TOKEN_BYTES == 137 * MIB
    assert held["full"] == pytest.approx(137, rel=1e-6)
    assert held["fp8"] == pytest.approx(137 / 2, rel=1e-6)
    assert held["snapkv"] == pytest.approx(2 * mean_blocks(513), rel=1e-6)
    assert held["window"] == pytest.approx(2 * 256 / 16, rel=0.07)  # and a block where the ring is not aligned
    assert "137.00 MiB" in render_text(result, sections=["capacity"])
    assert f"{137 / 73:.2f}x" in render_text(result, sections=["gains"])


def test_a_lone_request_is_one_prefill_and_128_steps(result: Result) -> None:
    for policy in result.policies.values():
        s = policy.summary
        assert s.e2e.mean_s == pytest.approx(s.ttft.mean_s + (OUTPUT - 1) * s.tpot.mean_s, rel=1e-9)
        duration_s = (NUM - 1) * GAP_S + s.e2e.mean_s
        assert s.output_tokens_per_s == pytest.approx(NUM * OUTPUT / duration_s, rel=1e-9)
        assert s.requests_per_s == pytest.approx(NUM / duration_s, rel=1e-9)
        computed_s = NUM * (s.e2e.mean_s - FRONT_END_S)  # nobody computes while a request is in the front end
        assert s.utilisation_frac == pytest.approx(computed_s / duration_s, rel=1e-9)
        assert sum(s.op_s.values()) == pytest.approx(computed_s, rel=1e-6)


def test_times_lie_above_what_the_datasheet_allows_and_not_far(result: Result) -> None:
    """Every step reads all matrices once and the cache; a prompt of T tokens takes 2·T FLOPs a parameter and its attention."""
    full = result.policies["full"].summary
    matrices_bytes = 2 * (32 * LAYER_PARAMS + HEAD_PARAMS)
    step_s = (matrices_bytes + (PROMPT + OUTPUT / 2) * TOKEN_BYTES) / HBM_BYTES_PER_S
    assert 1 < full.tpot.mean_s / step_s < 1.7  # a batch of one reaches some 65 % of the bandwidth
    attention_flops = 4 * 32 * 32 * 128 * PROMPT**2 / 2
    prefill_s = (2 * PROMPT * 32 * LAYER_PARAMS + 2 * HEAD_PARAMS + attention_flops) / PEAK_FLOPS
    assert 1 < full.ttft.mean_s / prefill_s < 1.7


def test_memory_adds_up(result: Result) -> None:
    """What is left of the engine's share after weights and buffers are 28,309 blocks; so many sequences of 65 blocks fit."""
    policy = result.policies["full"]
    lines = {line.name: line.num_bytes for line in policy.ledger}
    assert lines["weights"] == 2 * (32 * LAYER_PARAMS + 2 * HEAD_PARAMS + NORM_PARAMS)
    assert lines["engine's share"] == int(lines["GPU memory"] * 0.9)
    inside = lines["weights"] + lines["activation peak"] + lines["non-torch memory"]
    assert 0 <= lines["engine's share"] - inside - lines["KV pool"] < 16 * TOKEN_BYTES
    blocks = lines["KV pool"] // (16 * TOKEN_BYTES)
    assert policy.pool_units * policy.unit_bytes == blocks * 16 * TOKEN_BYTES
    assert policy.summary.peak_held_units * policy.unit_bytes == 72 * 16 * TOKEN_BYTES


def test_show_counts_the_sequences_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    print_resolved(scenario())
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line and line[0].isalpha()}
    blocks = int(rows["full"][4].replace(",", ""))
    fits = {name: [int(cell.replace(",", "")) for cell in rows[name][-2:]] for name in ("full", "fp8", "snapkv")}
    assert fits["full"] == [blocks // 65, blocks // 513]
    assert fits["fp8"] == [2 * blocks // 65, 2 * blocks // 513]
    assert fits["snapkv"] == [blocks // 33] * 2
    assert re.match(r"128\.12 MiB 1\.00 GiB", " ".join(rows["full"][5:9]))
