"""Times the host work of a decode step of vLLM 0.6.0's V0 engine, part by part, with its own Python code on a CPU.

    python benchmarks/vllm_v0_host.py SOURCES [--out benchmarks/results/vllm_v0_host.csv] [--steps 80] [--rounds 3]
        [--batches 1 2 4 ...] [--prompt-tokens 256 ...] [--fp8]

SOURCES is the wheel of PyPI's vllm 0.6.0, unpacked (`pip download --no-deps vllm==0.6.0`, `unzip`). Run it in an environment of its
own with its requirements (torch 2.4.0, transformers 4.44; no GPU is used) and a C++ compiler. What is real and what stands in for a GPU
is said in `vllm_v0_engine.py`. Sequences have temperature 1, top_p 1 and ignore_eos; prompts are prefilled and 200 tokens decoded before
timing.

Parts: schedule (`Scheduler.schedule`), prepare (`Worker.prepare_input`: input builder, attention and sampling metadata), launch (what
`LLMEngine.step` does besides: executor, worker, logits), sample_launch (`Sampler.forward` up to where it waits for the device), sample
(from there: tokens, log-probabilities and outputs as Python objects), process (`_process_model_outputs` with a RequestOutput for every
sequence, as a server asks), process_finished (the same where only finished requests are answered, as in `LLM.generate`), stats
(`do_log_stats`, which `LLM` leaves out), layer (a `LlamaDecoderLayer` whose kernels do nothing).

--fp8 gives the layers fp8 weights as compressed-tensors has them. No rows of it are kept. Five runs with it, in turn with five without, all
at `--batches 1 2 4 8 --prompt-tokens 256 --rounds 1`: a layer took 178 us and 154 us in the median of twenty.

Times are of the thread's processor. It is not alone on its machine, so all cases are run several times over: a row is the quietest
round's, slowest_us the median of the slowest. Left out: the CUDA runtime's launches and copies, and a server's own processes
(`AsyncLLMEngine`, HTTP).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import thread_time_ns
from typing import Any

from host_timing import as_row, quietest, write
from vllm_v0_engine import TINY_VOCAB, VERSION, make_engine, stand_in

BATCHES, PROMPT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (256, 1024, 4096)
NUM_LAYERS, WARM_STEPS, MAX_LAYER_BATCH = 16, 200, 8
"""Layers are timed in batches small enough that matrix products of 64 columns cost nothing."""
ENGINE = f"vLLM {VERSION} (PyPI wheel, V0 engine, eager)"
AFTER_SAMPLING = ("get_pythonized_sample_results", "get_logprobs", "_build_sampler_output")
"""Functions of the sampler that run once the device has answered."""


class Clock:
    """Processor time of watched calls, by name, of the step that runs."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = defaultdict(int)

    def watch(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = thread_time_ns()
            result = inner(*args, **kwargs)
            self.spent[name] += thread_time_ns() - start
            return result

        setattr(owner, method, timed)

    def step(self, run: Callable[[], Any]) -> dict[str, int]:
        self.spent.clear()
        start = thread_time_ns()
        run()
        return {"step": thread_time_ns() - start, **self.spent}


def watch_all(engine: Any, clock: Clock) -> None:
    import vllm.model_executor.layers.sampler as sampler

    worker = engine.model_executor.driver_worker
    model = worker.model_runner.model
    clock.watch(engine.scheduler[0], "schedule", "schedule")
    clock.watch(worker, "prepare_input", "prepare")
    clock.watch(model, "forward", "forward")
    clock.watch(model, "sample", "sample")
    for function in AFTER_SAMPLING:
        clock.watch(sampler, function, "after sampling")
    clock.watch(engine, "_process_model_outputs", "process")
    clock.watch(engine, "do_log_stats", "stats")
    for layer in model.model.layers[1:]:  # the first one has no residual to add
        clock.watch(layer, "forward", "layers")


def measure(engine: Any, clock: Clock, batch: int, prompt_tokens: int, num_steps: int) -> list[dict[str, Any]]:
    """Rows of one batch; every other step answers finished requests only."""
    from vllm import SamplingParams

    rng = random.Random(f"{batch} {prompt_tokens}")
    params = SamplingParams(temperature=1.0, top_p=1.0, ignore_eos=True, max_tokens=WARM_STEPS + num_steps + 50)
    for index in range(batch):
        prompt = [rng.randrange(TINY_VOCAB) for _ in range(prompt_tokens)]
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    while engine.scheduler[0].waiting:
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    times: dict[str, list[float]] = defaultdict(list)
    for index in range(num_steps):
        engine.step_return_finished_only = bool(index % 2)
        spent = clock.step(engine.step)
        inside = sum(spent[name] for name in ("schedule", "prepare", "forward", "sample", "process", "stats"))
        for name in ("schedule", "prepare", "stats"):
            times[name].append(spent[name] / 1e3)
        times["sample_launch"].append((spent["sample"] - spent["after sampling"]) / 1e3)
        times["sample"].append(spent["after sampling"] / 1e3)
        times["launch"].append((spent["step"] - inside) / 1e3)
        times["process_finished" if index % 2 else "process"].append(spent["process"] / 1e3)
        if batch <= MAX_LAYER_BATCH:
            times["layer"].append(spent["layers"] / 1e3 / (NUM_LAYERS - 1))
    engine.step_return_finished_only = False
    assert len(engine.scheduler[0].running) == batch
    engine.abort_request([str(index) for index in range(batch)])
    engine.step()
    context = prompt_tokens + WARM_STEPS + num_steps // 2
    return [as_row(name, batch, context, values) for name, values in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=Path, help="folder that holds the package vllm of the unpacked wheel")
    kept = Path(__file__).parent / "results" / "vllm_v0_host.csv"
    parser.add_argument("--out", type=Path, default=kept)
    parser.add_argument("--steps", type=int, default=80, help="timed steps of each case, half of them with RequestOutputs")
    parser.add_argument("--rounds", type=int, default=3, help="times that all cases are run over")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=PROMPT_TOKENS)
    parser.add_argument("--fp8", action="store_true", help="fp8 weights, a scale a tensor")
    options = parser.parse_args()
    if options.out == kept and (options.fp8 or options.batches != BATCHES or options.prompt_tokens != PROMPT_TOKENS):
        parser.error("--out: the kept rows are of all batches and prompts with 16-bit weights; name another file")
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        stand_in(options.sources, Path(folder))
        engine, clock = make_engine(Path(folder), NUM_LAYERS, fp8=options.fp8), Clock()
        watch_all(engine, clock)
        engine_name = f"{ENGINE}, fp8 weights" if options.fp8 else ENGINE
        for _ in range(options.rounds):
            for prompt_tokens, batch in [(p, b) for p in options.prompt_tokens for b in options.batches]:
                new = measure(engine, clock, batch, prompt_tokens, options.steps)
                print(prompt_tokens, batch, *(f"{row['part']}={row['median_us']}" for row in new), flush=True)
                for row in new:
                    found[row["part"], row["batch"], row["context_tokens"]].append(row)
            # A round is worth keeping if a later one is cut short.
            write(options.out, [quietest(rounds) for rounds in found.values()], engine_name, Path(__file__).name)


if __name__ == "__main__":
    main()
