"""A real run, request by request: vLLM 0.19 on an RTX 4090 (`vllm_rtx4090_requests.csv` of the measured data).

Its arrivals are replayed with the engine's own number of blocks, with the prefix hits that it had and without.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import numpy as np

from kvsim.api import simulate
from kvsim.errors import InputError
from kvsim.scenario import Scenario, parse_scenario
from kvsim.validation.cases import Bar, Row
from kvsim.validation.latency import compare_counts, compare_latencies, limits_of, roofline_times, simulated_times
from kvsim.validation.naive import ROOFLINE

NAME = "requests"
COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "prefix_hit_tokens_inf", "ttft_s", "tpot_ms", "e2e_s")
ENGINE = {"kind": "vllm_v1", "max_num_seqs": 256, "max_num_batched_tokens": 2048, "num_gpu_blocks": 2588, "max_model_len": 32768}
SOURCE = "vLLM 0.19.0, Llama-3.1-8B on RTX 4090, 300 ShareGPT requests at 10/s (LLMServingSim bench, MIT)"


def rows(measured: Path) -> list[Row]:
    """Means, 99th percentiles and medians of the errors of single requests, with and without the prefix hits."""
    path = measured / "vllm_rtx4090_requests.csv"
    with path.open(encoding="utf-8", newline="") as file:
        table = [row for row in csv.DictReader(line for line in file if not line.startswith("#"))]
    absent = [column for column in COLUMNS if column not in table[0]]
    if absent:
        raise InputError("--measured", str(path), f"must have the columns {', '.join(absent)}")
    table.sort(key=lambda row: float(row["arrival_s"]))
    known = [*COLUMNS, *(["queue_s"] if "queue_s" in table[0] else [])]
    truth = {name: np.array([float(row[name]) for row in table]) for name in known}
    found = []
    for hits in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.csv"
            lines = ["arrival_s,prompt_tokens,output_tokens,cached_prompt_tokens"]
            lines += [
                f"{row['arrival_s']},{row['input_tokens']},{row['output_tokens']},{row['prefix_hit_tokens_inf'] if hits else 0}"
                for row in table
            ]
            trace.write_text("\n".join(lines) + "\n", encoding="utf-8")
            scenario = parse_scenario({
                "gpu": "rtx-4090", "model": "llama-3.1-8b", "engine": ENGINE, "policies": {"full": []},
                "workload": {"trace": {"path": str(trace), "format": "csv"}},
            }, Path(folder))  # fmt: skip
            found += compare(scenario, truth, "prefix hits given" if hits else "without prefix hits", SOURCE)
    return found


def compare(scenario: Scenario, truth: dict[str, np.ndarray], group: str, source: str) -> list[Row]:
    """The first policy of the scenario beside a run's requests, both in order of arrival.

    truth: ttft_s, tpot_ms, e2e_s, input_tokens, output_tokens and arrival_s; with queue_s, waiting and running requests are compared too.
    """
    simulated = simulated_times(next(iter(simulate(scenario).policies.values())))
    naive = {ROOFLINE: roofline_times(scenario, truth["input_tokens"].astype(int), truth["output_tokens"].astype(int))}
    found = compare_latencies(truth, simulated, NAME, group, source, naive=naive)
    if "queue_s" in truth:
        arrival = truth["arrival_s"]
        scheduled, finish = arrival + truth["queue_s"], arrival + truth["e2e_s"]
        spans = {"running": (scheduled, finish), "waiting": (arrival, scheduled)}
        others = {
            "running": (simulated["scheduled_s"], simulated["finish_s"]),
            "waiting": (simulated["arrival_s"], simulated["scheduled_s"]),
        }  # fmt: skip
        found += compare_counts(spans, others, NAME, group, source)
    return found


def bars(rows: list[Row]) -> list[Bar]:
    """With the prefix hits given, as the experiment had them."""
    given = limits_of([row for row in rows if row.group == "prefix hits given"])
    return [Bar(NAME, f"{row.metric}: {row.case}", abs(row.error), limit) for row, limit in given]
