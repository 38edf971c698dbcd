"""Serving on GPUs without a measured profile, as others ran it: scenarios with what they saw.

`STATED` groups come from sources that say model, dtype, engine version, lengths and load; the others leave something out, and
their confidence says what.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsim.hardware import load_gpu
from kvsim.model import load_model
from kvsim.units import GIB
from kvsim.validation.cases import Case, Truth
from kvsim.validation.loads import SHAREGPT_MEANS, at_once, fixed, loop, mean_tokens
from kvsim.validation.naive import ROOFLINE, roofline_of
from kvsim.validation.serving_lengths import LENGTHS
from kvsim.validation.serving_models import reference
from kvsim.validation.serving_run import Run
from kvsim.validation.serving_runs import runs

STATED, PARTLY = "serving", "serving, partly stated"
BY_SETTING = "serving by setting"
"""How groups of `serving_runs` begin, on GPUs with and without a table."""
V1 = {"kind": "vllm_v1", "enable_prefix_caching": False}
A10G = "github.com/mapathak-commits/inference-wall, 08-flash-attention: vLLM 0.11.0, Qwen2.5-7B, one stream, chunks of 2,048"
QWEN25_SAMPLING = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
"""Of Qwen2.5-7B-Instruct's generation_config, whose repetition penalty was on in that run; vLLM takes the file as a whole."""
A10G_PROMPTS = {
    257: (116.0, 33.76), 1025: (280.0, 33.68), 2050: (502.0, 33.86), 4097: (992.0, 34.20), 8193: (2067.0, 34.96),
    16385: (4591.0, 35.81), 24577: (7620.0, 36.81), 30720: (10181.0, 37.33),
}  # fmt: skip
"""Prompt tokens → TTFT and time of a decode step in ms; 64 tokens are generated."""
L4 = "github.com/ish-codes-magic/bytes-per-token, M4: vLLM 0.30.0, bf16, prefix caching off"
L4_DECODE = {
    "qwen3-0.6b": {1: 170.0, 4: 627.0, 16: 1939.0, 64: 4110.0, 256: 5738.0},
    "qwen3-1.7b": {1: 68.0, 4: 252.0, 16: 891.0, 64: 2401.0, 256: 3962.0},
}
"""Closed-loop users → output tokens a second, 128 + 256 tokens each."""
L4_ONE_USER = {"qwen3-0.6b": (5.78, 370.0), "qwen3-1.7b": (14.72, 692.0)}
"""TPOT of a chat in ms, TTFT of 8,192 tokens in ms."""
L4_SATURATED = {"qwen3-0.6b": 1834.0, "qwen3-1.7b": 1596.0}
"""Output tokens a second of 512 users."""
L4_POOL_TOKENS = {"qwen3-0.6b": 172_640, "qwen3-1.7b": 152_800}
L4_MIX = {
    "kind": "lognormal", "prompt_mean_tokens": 417.3, "prompt_cv": 1.311, "prompt_max_tokens": 4096,
    "output_mean_tokens": 256.9, "output_cv": 0.947, "output_max_tokens": 1024,
}  # fmt: skip
"""Its saturated workload: medians of 256 and 192, sigmas of 1.0 and 0.8, clipped to 16-4096 and 16-1024; here by their means."""
L4_SMALL = "ai.wmx.dev/benchmarks: vLLM 0.23.0, Qwen2.5-0.5B, 256 + 128 tokens, closed loop"
L4_SMALL_USERS = {
    1: (27.0, 679.0, 168.0), 2: (37.8, 698.0, 367.0), 4: (50.1, 722.0, 698.0), 8: (60.9, 772.0, 1312.0),
    16: (103.8, 880.0, 2277.0), 32: (135.3, 1082.0, 3773.0),
}  # fmt: skip
"""Clients → medians of TTFT and E2E in ms, output tokens a second."""
A10G_V0 = "report 'Benchmark: Llama 3 8b Instruct on NVIDIA A10G': llmperf on g5.2xlarge, vLLM 0.4.3, 550 + 150 tokens in the mean"
A10G_V0_USERS = {1: (137.29, 30.651), 4: (171.40, 33.887), 16: (302.75, 42.668)}
"""Clients → TTFT, and E2E over output tokens, in ms. TTFT under load depends on how lengths vary, which is not written."""
A6000 = "ld-singh.github.io/ai-factory-ops-lab: vLLM 0.23.0, Qwen2.5-7B, 51 tokens generated"
A6000_TPOT_MS = {1: 21.9, 2: 22.0, 4: 22.1, 8: 22.3}


def cases(suite: str, folder: Path) -> list[Case]:
    """folder: where `write_models` and `write_lengths` have written."""
    make = _Maker(suite, folder)
    return [*_a10g(make), *_l4(make), *_l4_small(make), *_others(make), *(make.of_run(run) for run in runs())]


class _Maker:
    """Makes cases of one policy, the full cache, under vLLM."""

    def __init__(self, suite: str, folder: Path) -> None:
        self._suite, self._folder = suite, folder

    def case(
        self, group: str, name: str, gpu: str, model: str, engine: dict[str, Any], workload: dict[str, Any], truths: dict[str, float],
        source: str, confidence: str = "", weight_dtype: str = "bf16", batch: int = 1,
    ) -> Case:  # fmt: skip
        """batch: of the roofline."""
        model = reference(model, self._folder)
        scenario = {
            "gpu": gpu, "model": model, "weight_dtype": weight_dtype, "engine": engine, "workload": workload,
            "policies": {"full": []},
        }  # fmt: skip
        prompt, output = mean_tokens(workload["lengths"])
        naive = roofline_of(load_gpu(gpu), load_model(model), 1, weight_dtype, batch, prompt, output)
        return Case(
            self._suite, f"{group}: {load_gpu(gpu).name}", name, scenario, tuple(Truth(*pair) for pair in truths.items()), source,
            {ROOFLINE: naive}, confidence,
        )  # fmt: skip

    def of_run(self, run: Run) -> Case:
        model = reference(run.model, self._folder)
        if isinstance(run.workload, str):
            recorded = LENGTHS[run.workload]
            workload: Mapping[str, Any] = {"trace": {"path": str(self._folder / f"{run.workload}.csv"), "format": "csv"}}
            prompt, output = recorded.mean_prompt_tokens, recorded.mean_output_tokens
        else:
            workload = run.workload
            prompt, output = mean_tokens(workload["lengths"])
        scenario = {
            "gpu": run.gpu, "model": model, "tensor_parallel": run.tp, "weight_dtype": run.weight_dtype, "engine": run.engine,
            "workload": workload, "policies": {"full": []},
        }  # fmt: skip
        naive = roofline_of(load_gpu(run.gpu), load_model(model), run.tp, run.weight_dtype, run.batch, prompt, output)
        group = f"{BY_SETTING}{', partly stated' if run.missing else ''}: {run.setting}"
        truths = tuple(Truth(*pair) for pair in run.truths.items())
        return Case(self._suite, group, run.name, scenario, truths, run.source, {ROOFLINE: naive}, run.missing)


def _a10g(make: _Maker) -> list[Case]:
    engine = {
        **V1, "async_scheduling": False, "max_num_batched_tokens": 2048, "max_model_len": 32768, "sampling": QWEN25_SAMPLING,
        "sampling_backend": "pytorch",
    }  # fmt: skip
    found = [
        make.case(STATED, f"Qwen2.5-7B {prompt}+64", "a10g", "qwen2.5-7b", engine, loop(1, 2, fixed(prompt, 64)),
                  {"ttft_ms": ttft, "tpot_ms": tpot, **({"kv_pool_gib": 5.04} if prompt == 257 else {})}, A10G)
        for prompt, (ttft, tpot) in A10G_PROMPTS.items()
    ]  # fmt: skip
    v0 = {"kind": "vllm_v0", "max_model_len": 8192}
    for clients, (ttft, each) in A10G_V0_USERS.items():
        tpot = (150 * each - ttft) / 149
        found.append(make.case(
            PARTLY, f"Llama-3-8B c={clients} 550+150", "a10g", "llama-3.1-8b", v0, loop(clients, 10 * clients, fixed(550, 150)),
            {"tpot_ms": tpot, **({"ttft_ms": ttft} if clients == 1 else {})}, A10G_V0,
            "found without its address; lengths vary, requests not stated", batch=clients,
        ))  # fmt: skip
    return found


def _l4(make: _Maker) -> list[Case]:
    engine = {**V1, "max_num_batched_tokens": 2048}
    found = []
    for model, rates in L4_DECODE.items():
        tpot, ttft = L4_ONE_USER[model]
        pool = L4_POOL_TOKENS[model] * 2 * 28 * 8 * 128 * 2 / GIB  # keys and values of 28 layers, 8 heads of 128, 2 bytes
        for users, rate in rates.items():
            found.append(make.case(
                STATED, f"{model} c={users} 128+256", "l4", model, engine, loop(users, max(3 * users, 8), fixed(128, 256)),
                {"output_tok_s": rate}, L4, batch=users,
            ))  # fmt: skip
        found += [
            make.case(STATED, f"{model} chat 100+256", "l4", model, engine, loop(1, 2, fixed(100, 256)),
                      {"tpot_ms": tpot, "kv_pool_gib": pool}, L4),
            make.case(STATED, f"{model} 8192+64", "l4", model, engine, loop(1, 2, fixed(8192, 64)), {"ttft_ms": ttft}, L4),
            make.case(
                STATED, f"{model} saturated, 512 users", "l4", model, engine,
                loop(512, 2000, L4_MIX),
                {"output_tok_s": L4_SATURATED[model]}, L4, "drawn lengths of the stated kind", batch=256,
            ),
        ]  # fmt: skip
    return found


def _l4_small(make: _Maker) -> list[Case]:
    engine = {**V1, "gpu_memory_utilization": 0.6, "max_model_len": 8192}
    return [
        make.case(
            PARTLY, f"Qwen2.5-0.5B c={users} 256+128", "l4", "qwen2.5-0.5b", engine, loop(users, 10 * users, fixed(256, 128)),
            {"tpot_ms": (e2e - ttft) / 127, "ttft_ms": ttft, "output_tok_s": rate}, L4_SMALL, "medians; number of requests not stated",
            batch=users,
        )
        for users, (ttft, e2e, rate) in L4_SMALL_USERS.items()
    ]  # fmt: skip


def _others(make: _Maker) -> list[Case]:
    """Single figures of five more GPUs."""
    short = {**V1, "max_model_len": 8192}
    found = [
        make.case(
            PARTLY, f"Qwen2.5-7B c={users}", "rtx-a6000", "qwen2.5-7b", short, loop(users, 12, fixed(64, 51)), {"tpot_ms": tpot}, A6000,
            "prompts not stated, 64 tokens taken; median", batch=users,
        )
        for users, tpot in A6000_TPOT_MS.items()
    ]  # fmt: skip
    found += [
        make.case(
            PARTLY, "Qwen2.5-1.5B, one request of 64 tokens", "t4", "qwen2.5-1.5b", short, loop(1, 1, fixed(64, 64)), {"tpot_ms": 14.6},
            "github.com/thealonemusk/InferStack: vLLM 0.29.0, Kaggle", "prompt not stated, 64 tokens taken", "fp16",
        ),
        make.case(
            PARTLY, "Llama-3.1-8B c=1 1024+128", "a100-40gb", "llama-3.1-8b", short, loop(1, 20, fixed(1024, 128)), {"tpot_ms": 1000 / 75},
            "johnmusgrave.com, vLLM throughput-latency sweep: vLLM 0.23.0", "in words: about 75 tokens a second",
        ),
        make.case(
            PARTLY, "Llama-3.1-8B, 50 at once, 100+443", "a40", "llama-3.1-8b", {**short, "async_scheduling": False},
            at_once(50, fixed(100, 443)), {"tpot_ms": 35.96},
            "databasemart.com, vLLM on A40", "version not stated, 0.8 or later; answers vary, 443 tokens in the mean; median", batch=50,
        ),
        make.case(
            PARTLY, "Qwen3-32B, 1000 ShareGPT at once, 32 running", "h100-nvl", "qwen3-32b",
            {**V1, "async_scheduling": False, "max_num_seqs": 32, "max_model_len": 32000, "max_num_batched_tokens": 2048},
            at_once(1000, SHAREGPT_MEANS), {"output_tok_s": 653.61}, "vllm-project/vllm issue 17788: vLLM 0.8.5",
            "reported as too slow (fp8 no faster); lengths by their means", batch=32,
        ),
    ]  # fmt: skip
    return found
