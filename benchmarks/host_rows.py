"""Host work of vLLM's engines as lines over the batch, out of the rows that `vllm_v0_host.py` and `vllm_v1_host.py` measured; eager
launches of others.

A step of either engine is schedule and prepare, then max(launch, device), then sample and process. So what the sampler does before it
waits for the device counts as launch. V0's process is that of a server: RequestOutputs of all sequences and statistics; V1 makes those
in another process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from measured_rows import read_csv

from kvsim.forward import num_launches_per_step
from kvsim.model import Model, load_model

RESULTS = Path(__file__).parent / "results"
KERNELS_PER_LAYER = 11
"""Of a decode step of `LlamaDecoderLayer` under FlashAttention: two norms, four matrix products, rotary embedding, cache write, attention,
copy of its output, activation. Attention split over the context adds a twelfth."""
CUDA_LAUNCH_US = 3.8
"""Per kernel, asynchronous launches of a 2.9 us kernel back to back on a V100: developer.nvidia.com/blog/cuda-graphs; 2-5 us elsewhere."""


class HostEngine(NamedTuple):
    """What was measured of an engine's steps, and how kvsim's parts of a step are made of it.

    parts: measured parts by kvsim's. cuda_calls: copies and kernels of a step that a CPU does not see, each taken at CUDA_LAUNCH_US.
    meanings: what each part of kvsim's is in the engine's code.
    """

    name: str
    words: str
    parts: Mapping[str, tuple[str, ...]]
    cuda_calls: Mapping[str, int]
    meanings: Mapping[str, str]

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.name}_host.csv"


V0 = HostEngine(
    "vllm_v0", "vLLM 0.6.0's own Python, eager, on a CPU",
    {"schedule": ("schedule",), "prepare": ("prepare",), "launch": ("launch", "sample_launch"), "sample": ("sample",),
     "process": ("process", "stats")},
    {"prepare": 13, "launch": 19},
    {
        "schedule": "Scheduler.schedule",
        "prepare": "input builder, attention and sampling metadata",
        "launch": "executor, worker, and the sampler up to where it waits",
        "sample": "tokens and log-probabilities as Python objects",
        "process": "stop checks, detokenizer, RequestOutputs, statistics",
    },
)  # fmt: skip
"""CUDA calls of prepare: seven inputs copied, two tensors of zeros, two sums, two sampling indices copied. launch: nine sampling tensors
copied, hidden states and indices gathered, eight sampler kernels."""
V0_OFFLINE = V0._replace(parts={**V0.parts, "process": ("process_finished",)})
"""What `LLM.generate` does: it answers finished requests only and keeps no statistics."""
V1 = HostEngine(
    "vllm_v1", "vLLM 0.12.0's own Python on a CPU",
    {"schedule": ("schedule",), "prepare": ("prepare",), "launch": ("launch_greedy",), "sample": ("sample",),
     "process": ("process", "encode")},
    {"prepare": 10, "launch": 9},
    {
        "schedule": "Scheduler.schedule",
        "prepare": "persistent batch, inputs, attention metadata of FlashAttention 2",
        "launch": "replay of a captured graph, logits, greedy sampler up to where it waits",
        "sample": "tokens to lists, bookkeeping",
        "process": "Scheduler.update_from_output, statistics, msgpack; the detokenizer runs in another process",
    },
)  # fmt: skip
"""encode is another thread's, but one that holds Python's lock while the loop goes on: by the clock on the wall a round takes at least as
much longer. CUDA calls as `vllm_v1_host.py --launches` lists them. prepare: seven inputs copied, indices of the logits, block table and
slots filled up to the graph's batch. launch: the graph, hidden states gathered by indices that become 64-bit first, logits, logits in
fp32, argmax, tokens in 32 bits, their copy, its event. A graph of a straight line of kernels is launched in constant time
(developer.nvidia.com/blog/constant-time-launch-for-straight-line-graphs-and-other-performance-enhancements)."""
V1_OTHERWISE = V1._replace(
    parts={**V1.parts, "prepare": ("prepare_fa3",), "launch": ("launch_random",)}, cuda_calls={"prepare": 13, "launch": 13}
)
"""FlashAttention 3, whose metadata is a kernel, a copy and a fill; temperature 1: two divisions, softmax and noise besides."""


class EagerStep(NamedTuple):
    """A decode step without CUDA graphs whose length is the host's: it does not change with what the device computes.

    batch: sequences, at which the engine's measured lines say what the host does beside its launches; 0: the model was run alone.
    """

    engine: str
    model: str
    step_ms: float
    batch: int
    source: str


EAGER_STEPS = (
    EagerStep("vllm_v1", "qwen3-8b", 1e3 * 8 / 227.8, 8, "github.com/vllm-project/vllm issue 42058: vLLM 0.26, enforce_eager, A100, 8 "
              "streams decode 227.8, 227.3 and 228.2 tokens a second after 1k, 4k and 8k of prompt"),
    EagerStep("vllm_v1", "qwen2.5-7b", 22.5, 1, "github.com/vllm-project/vllm-omni issue 7960: vLLM 0.29, enforce_eager, A800: 22-23 ms "
              "a token, 13 ms with graphs"),
    EagerStep("sglang", "llama-3.1-8b", 8.23, 0, "github.com/sgl-project/sglang pull request 1401, Llama-3-8B on an H100 by its rates: "
              "bench_latency, FlashInfer, 8.23 ms with --disable-cuda-graph, 7.35 ms without"),
)  # fmt: skip
"""Other model code inside vLLM takes a third as much a launch on hosts with quicker cores: 10 ms a token for the 28 layers of Qwen3-0.6B
(github.com/pytorch/torchtitan pull request 2373)."""


class Line(NamedTuple):
    base_us: float
    per_sequence_us: float

    def at(self, batch: np.ndarray) -> np.ndarray:
        return self.base_us + self.per_sequence_us * batch


def read_rows(engine: HostEngine) -> list[dict[str, str]]:
    return read_csv(engine.path)


def measured(engine: HostEngine, rows: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Batches of all cases, and the microseconds of each of kvsim's parts there, CUDA calls added."""
    times = {(row["part"], int(row["batch"]), row["context_tokens"]): float(row["median_us"]) for row in rows}
    cases = sorted({key[1:] for key in times})
    found = {
        part: np.array([sum(times[name, *case] for name in names) for case in cases]) + engine.cuda_calls.get(part, 0) * CUDA_LAUNCH_US
        for part, names in engine.parts.items()
    }
    return np.array([batch for batch, _ in cases], dtype=float), found


def fit_lines(batch: np.ndarray, times: Mapping[str, np.ndarray]) -> dict[str, Line]:
    """Least squares of relative errors: a batch of 1 counts as much as one of 256."""
    lines = {}
    for part, us in times.items():
        slope, base = np.polyfit(batch, us, 1, w=1.0 / us)
        assert slope >= 0 and base >= 0, part
        lines[part] = Line(float(base), float(slope))
    return lines


def eager_launch_us(rows: Sequence[Mapping[str, str]], model: Model) -> float:
    """Of each launch that kvsim counts in a layer: Python and dispatcher as measured, the CUDA runtime's part added."""
    layer_us = median(float(row["median_us"]) for row in rows if row["part"] == "layer")
    counted = num_launches_per_step(model, 1, "bf16") // model.num_layers
    return (layer_us + KERNELS_PER_LAYER * CUDA_LAUNCH_US) / counted


def engine_launch_us(engine: str) -> float:
    """Of each launch that kvsim counts, the median of an engine's EAGER_STEPS."""
    return median(
        (1e3 * step.step_ms - _host_us(step)) / num_launches_per_step(load_model(step.model), 1, "bf16")
        for step in EAGER_STEPS
        if step.engine == engine
    )


def _host_us(step: EagerStep) -> float:
    if not step.batch:
        return 0.0
    host = {"vllm_v1": V1}[step.engine]
    return sum(float(line.at(np.array(step.batch))) for line in fit_lines(*measured(host, read_rows(host))).values())
