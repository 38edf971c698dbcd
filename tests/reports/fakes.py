"""Results made by a toy server, so that reports are tested on logs that obey the rules of `recording`."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from kvsim.metrics import summarize
from kvsim.recording import RunLog
from kvsim.result import Basis, LedgerLine, PolicyResult, Result
from kvsim.units import GB, GIB, ps

UNIT_TOKENS = 16


def make_log(
    num_requests: int = 300,
    rate_per_s: float = 4.0,
    slots: int = 16,
    step_s: float = 0.020,
    growth_s: float = 2e-6,
    prefill_s: float = 0.05,
    seed: int = 0,
) -> RunLog:
    """First come, first served; a prompt is one step; decodes run until an arrival or a completion."""
    rng = np.random.default_rng(seed)
    arrivals = deque(
        (index, ps(time_s)) for index, time_s in enumerate(np.cumsum(rng.exponential(1 / rate_per_s, num_requests)))
    )
    prompts, outputs = rng.integers(50, 2000, num_requests), rng.integers(1, 300, num_requests)
    log, now, waiting, running = RunLog(), 0, deque(), {}
    started: dict[int, tuple[int, int, int]] = {}
    op_ps = {"gemm": 0, "decode_attention": 0, "prefill_attention": 0, "host": 0}

    def held() -> int:
        return sum(-(-int(prompts[i] + outputs[i] - left) // UNIT_TOKENS) for i, left in running.items())

    while arrivals or waiting or running:
        if not waiting and not running:
            now = max(now, arrivals[0][1])
        while arrivals and arrivals[0][1] <= now:
            waiting.append(arrivals.popleft())
        if waiting and len(running) < slots:
            index, arrival = waiting.popleft()
            length, decodes, growth, num = ps(prefill_s + 1e-5 * int(prompts[index])), len(running), 0, 1
            log.steps.extend([now, length, 0, 1, decodes, int(prompts[index]), 1, held(), len(waiting)])
            started[index] = (arrival, now, now + length)
            running = {i: left - 1 for i, left in running.items()} | {index: int(outputs[index]) - 1}
            op_ps["prefill_attention"] += length
        else:
            length, growth, decodes = ps(step_s + 1e-4 * len(running)), ps(growth_s), len(running)
            num = min(running.values())
            if arrivals and len(running) < slots:
                ahead = arrivals[0][1] - now
                num = min(num, max(1, -(-ahead // length)))
            running = {i: left - num for i, left in running.items()}
            log.steps.extend([now, length, growth, num, decodes, 0, 0, held(), len(waiting)])
            op_ps["gemm"] += num * length * 6 // 10
            op_ps["decode_attention"] += num * length - num * length * 6 // 10 + growth * (num * (num - 1) // 2)
        now += num * length + growth * (num * (num - 1) // 2)
        log.peak_held_units = max(log.peak_held_units, held())
        for index in [i for i, left in running.items() if left == 0]:
            del running[index]
            arrival, scheduled, first = started[index]
            log.requests.extend([index, arrival, scheduled, first, now, int(prompts[index]), int(outputs[index]), 0, 0])
    log.end_ps, log.op_ps = now, op_ps
    return log


def make_policy(
    name: str, description: str, log: RunLog, result: Mapping[str, object], **fields: object
) -> PolicyResult:
    total = sum(log.op_ps.values())
    basis = tuple(
        Basis(op, op_ps / 1e12, op_ps / total, "datasheet" if op == "host" else "measured: A100, 2026-01", 0.93, 1.08)
        for op, op_ps in log.op_ps.items()
    )
    ledger = (
        LedgerLine("weights", 16 * GB, "8.03 B parameters, bf16"),
        LedgerLine("activations", 2 * GIB, "profile run at 2048 tokens"),
        *((LedgerLine("policy state", 300 * 2**20, "score sums"),) if description != "full" else ()),
        LedgerLine("KV pool", 40 * GIB, "what is left"),
    )
    defaults: dict[str, object] = {
        "name": name,
        "description": description,
        "summary": summarize(log, warmup_requests=result["warmup"], slo=result["slo"]),  # type: ignore[arg-type]
        "log": log,
        "ledger": ledger,
        "pool_units": 2500,
        "unit_bytes": UNIT_TOKENS * 131072,
        "kv_bytes_per_sequence": 1155 * 131072.0,
        "basis": basis,
        "notes": ("prefix caching is off: compressed KV cannot be shared",) if description != "full" else (),
    }
    return PolicyResult(**(defaults | fields))  # type: ignore[arg-type]


def make_result(
    *, logs: Mapping[str, RunLog] | None = None, warmup: int = 20, slo: Mapping[str, float] | None = None
) -> Result:
    """By default `full` is overloaded, `snapkv+think` just keeps up, `[kivi]` (markup in its name) does easily."""
    if logs is None:
        logs = {
            "full": make_log(slots=8),
            "snapkv+think": make_log(slots=24, step_s=0.015),
            "[kivi]": make_log(slots=40, step_s=0.012),
        }
    limits = {"ttft_p99_s": 2.0, "tpot_p99_s": 0.1} if slo is None else slo
    shared = {"warmup": warmup, "slo": limits}
    policies = {
        name: make_policy(
            name,
            "full" if name == "full" else f"{name}, described",
            log,
            shared,
            **({} if name == "full" else {"kv_bytes_per_sequence": 600 * 131072.0}),
        )
        for name, log in logs.items()
    }
    scenario = {
        "gpu": "a100-sxm-80gb",
        "model": "llama-3.1-8b",
        "engine": {"kind": "vllm_v1", "max_num_seqs": 256},
        "workload": {"num_requests": 300, "rate": float("nan"), "lengths": (1, 2)},
    }
    return Result(
        scenario=scenario,
        title="A100-80GB, Llama-3.1-8B, chat",
        policies=policies,
        versions={"kvsim": "0.1.0"},
        seed=0,
        slo=limits,
        warmup_requests=warmup,
    )
