"""FlexGen and its H2O fork: logs of an A100-80GB with everything on the GPU, and FlexGen's own table on a T4 with offloading.

The logs' commands are those of h2o_flexgen/benchmark/h2o/h2o_suite.py, the table's those of benchmark/flexgen/bench_suite.py. A
log's hh_ratio r counts heavy hitters, so that 2 int(r n) tokens stay: kept_frac is 2 r here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvsim.validation.cases import OUT_OF_MEMORY, Bar, Case, Row, Truth
from kvsim.validation.loads import at_once, fixed
from kvsim.validation.naive import BYTES, ROOFLINE, byte_ratio, roofline

NAME = "published"
LOGS, LOGS_T4, TABLE = "H2O on FlexGen, A100", "H2O on FlexGen, T4", "FlexGen on T4"
SOURCE_LOGS = "H2O repository, h2o_flexgen/benchmark/h2o/a100_80 and t4, logs"
SOURCE_TABLE = "FlexGen (ICML 2023), table 2"
DECODE_LIMIT, PEAK_LIMIT = 0.12, 0.05


class Log(NamedTuple):
    """hh_ratio 0: the full cache. peak_gib 0: out of memory."""

    model: str
    batch: int
    prompt_tokens: int
    output_tokens: int
    hh_ratio: float
    peak_gib: float
    prefill_s: float
    decode_s: float

    @property
    def name(self) -> str:
        policy = f"H2O {self.hh_ratio:g}" if self.hh_ratio else "full"
        return f"{policy} {self.model} {self.prompt_tokens}+{self.output_tokens} batch {self.batch}"


A100_LOGS = (
    Log("opt-6.7b", 24, 2048, 2048, 0.0, 74.764, 4.541, 94.936), Log("opt-6.7b", 24, 2048, 2048, 0.2, 36.392, 4.125, 49.366),
    Log("opt-6.7b", 64, 2048, 2048, 0.0, 0.0, 0.0, 0.0), Log("opt-6.7b", 64, 2048, 2048, 0.2, 75.673, 11.048, 101.857),
    Log("opt-13b", 4, 5000, 5000, 0.0, 70.919, 5.105, 209.101), Log("opt-13b", 4, 5000, 5000, 0.2, 46.511, 4.632, 150.809),
    Log("opt-30b", 1, 7000, 1024, 0.0, 77.579, 3.869, 53.227), Log("opt-30b", 1, 7000, 1024, 0.11, 69.170, 3.592, 46.729),
)  # fmt: skip
T4_LOGS = {
    14: Log("opt-30b", 52, 512, 32, 0.1, 9.342, 1052.874, 787.918), 8: Log("opt-30b", 52, 512, 512, 0.2, 9.698, 609.548, 10704.99),
    6: Log("opt-30b", 44, 512, 1024, 0.3, 8.686, 395.424, 19085.48),
}  # fmt: skip
"""By num_gpu_batches, --percent 0 100 0 100 0 100 --cpu; projected by the authors from a few batches."""
_IN_HOST = {"cache_gpu_frac": 0.0, "cache_cpu_frac": 1.0, "activations_on": "cpu"}
_INT4 = [{"kind": "kv_quant", "dtype": "int4"}]
T4_TABLE: tuple[tuple[str, float, dict[str, Any], list[dict[str, Any]]], ...] = (
    ("opt-6.7b", 25.26, {"gpu_batch_size": 2, "overlap": False}, []),
    ("opt-30b", 7.32, {
        "gpu_batch_size": 48, "num_gpu_batches": 3, "weight_gpu_frac": 0.2, "weight_cpu_frac": 0.8, "cpu_cache_compute": True, **_IN_HOST,
    }, []),
    ("opt-175b", 0.69, {
        "gpu_batch_size": 32, "num_gpu_batches": 8, "weight_gpu_frac": 0.0, "weight_cpu_frac": 0.5, "cpu_cache_compute": True,
        **_IN_HOST, "cache_cpu_frac": 0.0,
    }, []),
    ("opt-6.7b", 29.12, {"gpu_batch_size": 72, "compress_weight": True, "overlap": False}, _INT4),
    ("opt-30b", 8.38, {
        "gpu_batch_size": 64, "num_gpu_batches": 8, "weight_gpu_frac": 0.0, "weight_cpu_frac": 1.0, **_IN_HOST,
    }, _INT4),
    ("opt-175b", 1.12, {
        "gpu_batch_size": 48, "num_gpu_batches": 3, "weight_gpu_frac": 0.0, "weight_cpu_frac": 1.0, "compress_weight": True, **_IN_HOST,
    }, _INT4),
)  # fmt: skip
"""512 + 32 tokens; output tokens a second."""


def _scenario(
    gpu: str, model: str, prompt: int, output: int, engine: dict[str, Any], policy: list[dict[str, Any]]
) -> dict[str, Any]:
    block = engine["gpu_batch_size"] * engine.get("num_gpu_batches", 1)
    return {
        "gpu": gpu, "model": model, "weight_dtype": "fp16", "policies": {"p": policy},
        "engine": {
            "kind": "flexgen", "prompt_tokens": prompt, "max_model_len": prompt + output, "long_sequences": prompt + output > 2048,
            **engine,
        },
        "workload": at_once(block, fixed(prompt, output)),
    }  # fmt: skip


def _policy(log: Log) -> list[dict[str, Any]]:
    return [{"kind": "h2o", "variant": "flexgen", "kept_frac": 2 * log.hh_ratio}] if log.hh_ratio else []


def _a100_case(log: Log) -> Case:
    full = {(other.model, other.batch): other for other in A100_LOGS if not other.hh_ratio}.get((log.model, log.batch))
    naive: dict[str, dict[str, float]] = {}
    truths: tuple[Truth, ...] = (Truth(OUT_OF_MEMORY, 1.0),)
    if log.peak_gib:
        all_tokens = log.prompt_tokens + log.output_tokens / 2
        kept = 2 * int(log.hh_ratio * log.prompt_tokens) if log.hh_ratio else all_tokens
        naive[ROOFLINE] = roofline("a100-sxm-80gb", log.model, 1, "fp16", log.batch, log.prompt_tokens, log.output_tokens, kept)
        if full is not None and full.decode_s and log.hh_ratio:
            naive[BYTES] = byte_ratio("decode_s", full.decode_s, all_tokens, kept)
        truths = (Truth("decode_s", log.decode_s), Truth("prefill_s", log.prefill_s), Truth("peak_gib", log.peak_gib))
    engine = {"gpu_batch_size": log.batch, "overlap": False}
    data = _scenario("a100-sxm-80gb", log.model, log.prompt_tokens, log.output_tokens, engine, _policy(log))
    return Case(NAME, LOGS, log.name, data, truths, SOURCE_LOGS, naive)


def cases() -> list[Case]:
    found = [_a100_case(log) for log in A100_LOGS]
    for batches, log in T4_LOGS.items():
        engine: dict[str, Any] = {
            "gpu_batch_size": log.batch, "num_gpu_batches": batches, "weight_gpu_frac": 0.0, "weight_cpu_frac": 1.0,
            "cpu_cache_compute": True, **_IN_HOST,
        }  # fmt: skip
        data = _scenario("t4-16gb", log.model, log.prompt_tokens, log.output_tokens, engine, _policy(log))
        truths = (Truth("decode_s", log.decode_s), Truth("prefill_s", log.prefill_s), Truth("peak_gib", log.peak_gib))
        found.append(Case(NAME, LOGS_T4, f"{log.name} x {batches}", data, truths, SOURCE_LOGS, confidence="projected by its authors"))
    for model, rate, placed, policy in T4_TABLE:
        data = _scenario("t4-16gb", model, 512, 32, placed, policy)
        block = placed["gpu_batch_size"] * placed.get("num_gpu_batches", 1)
        # Without offloading a napkin has only the GPU to look at.
        naive = {ROOFLINE: roofline("t4-16gb", model, 1, "fp16", block, 512, 32)} if model == "opt-6.7b" and not policy else {}
        name = f"{model} block {block}{', 4 bits' if policy else ''}"
        found.append(Case(NAME, TABLE, name, data, (Truth("output_tok_s", rate),), SOURCE_TABLE, naive))
    return found


def bars(rows: list[Row]) -> list[Bar]:
    """Of the A100 logs: decode time of each, the worst peak, and that what ran out of memory does."""
    mine = [row for row in rows if row.group == LOGS]
    found = [
        Bar(NAME, f"{LOGS}: decode of {row.case}, {row.truth:.1f} s logged, {row.predicted:.1f} s simulated", abs(row.error), DECODE_LIMIT)
        for row in mine
        if row.metric == "decode_s"
    ]
    peaks = [abs(row.error) for row in mine if row.metric == "peak_gib"]
    misses = [abs(row.error) for row in mine if row.metric == OUT_OF_MEMORY]
    found.append(Bar(NAME, f"{LOGS}: largest error of peak GPU memory", max(peaks), PEAK_LIMIT))
    found.append(Bar(NAME, f"{LOGS}: what ran out of memory does so", max(misses), 0.0))
    return found
