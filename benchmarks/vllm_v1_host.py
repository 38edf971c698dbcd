"""Times the host work of a decode step of vLLM 0.12.0's V1 engine, part by part, with its own Python code on a CPU.

    python benchmarks/vllm_v1_host.py SOURCES [--out benchmarks/results/vllm_v1_host.csv] [--steps 160] [--rounds 3] [--more] [--launches]

SOURCES is the wheel of PyPI's vllm 0.12.0, unpacked (`pip download --no-deps vllm==0.12.0`, `unzip`; its shared objects are not needed).
Run it in an environment of its own with what vLLM's Python imports (any torch that does; transformers below 5, triton, numba, xgrammar
0.1.27; no GPU is used) and a C++ compiler. What is real and what stands in for a GPU is said in `vllm_v1_engine.py`. Asynchronous
scheduling is off, as it was by default before 0.14. Prompts are prefilled and 100 tokens decoded before timing.

Parts of a round of the engine's loop, which add up to it: schedule (`Scheduler.schedule`), prepare (from there to the model's forward:
persistent batch, inputs, dispatch, attention metadata, as for FlashAttention 2), launch_greedy (from there to the wait for sampled tokens:
replay, logits, sampler at temperature 0, as `vllm bench serve` asks), sample (from the device's answer: tokens to lists, bookkeeping),
process (`Scheduler.update_from_output`, statistics, output queue). prepare_fa3 and launch_random stand for prepare with the metadata of
FlashAttention 3 and the launch at temperature 1.

Beside the loop: encode (the output thread of the same process: msgpack, socket), frontend (the server's process: socket, msgpack,
detokenizer, a RequestOutput of the new token for every sequence), frontend_stats (its loggers) and frontend_json (the text of an event for
every sequence); new_request (what a step costs on top that admits a request, its launches aside) and new_request_input (the engine's input
thread for it: msgpack, hashes of the prompt's blocks).
wall_alone and wall_encoding: the loop's whole round by the clock on the wall, device's time taken off, without and with the output thread.

Other times are of the thread's processor. It is not alone on its machine, so all cases are run several times over: a row is the quietest
round's, slowest_us the median of the slowest. Left out: the CUDA runtime's launches and copies (--launches lists the operators that would
launch one, by part), asyncio and HTTP of the server.
"""

from __future__ import annotations

import argparse
import hashlib
import queue
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import thread_time_ns
from typing import Any

import numpy as np
from host_timing import as_row, quietest, read, write
from vllm_v0_engine import TOKENIZER_VOCAB
from vllm_v1_engine import OUTPUT_PATH, VERSION, Graph, make_engine, stand_in, waits

BATCHES, PROMPT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (256, 1024, 4096)
WARM_STEPS, WALL_STEPS, NEW_REQUESTS, MAX_TOKENS = 100, 40, 20, 2000
SPIN_ITERATIONS = 5000
"""Of a hash that keeps the processor busy without Python's lock for some 2 ms, as waiting for a CUDA event does: where time is told by the
clock on the wall. Long enough for the output thread to end."""
ENGINE = f"vLLM {VERSION} (PyPI wheel, V1 engine, synchronous scheduling)"
LOOP = ("schedule", "prepare", "launch", "sample", "process")


class Marks:
    """Processor time of the loop's thread at the borders of LOOP."""

    def __init__(self, core: Any, runner: Any) -> None:
        self.times: list[int] = []
        waits.append(self.mark)
        _call_too(core.scheduler, "schedule", after=self.mark)
        _call_too(runner, "_model_forward", before=self.mark)
        _call_too(core.scheduler, "update_from_output", before=self.mark)

    def mark(self) -> None:
        self.times.append(thread_time_ns())

    def parts(self) -> dict[str, float]:
        assert len(self.times) == len(LOOP) + 1
        return dict(zip(LOOP, np.diff(self.times) / 1e3, strict=True))


def _call_too(owner: Any, method: str, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None) -> None:
    inner = getattr(owner, method)

    def called(*args: Any, **kwargs: Any) -> Any:
        if before:
            before()
        result = inner(*args, **kwargs)
        if after:
            after()
        return result

    setattr(owner, method, called)


class Server:
    """The engine with its output thread, and what the server's process does with its outputs."""

    def __init__(self, core: Any, config: Any, folder: Path) -> None:
        import zmq
        from transformers import AutoTokenizer
        from vllm.entrypoints.openai.protocol import CompletionResponseStreamChoice, CompletionStreamResponse
        from vllm.utils.network_utils import make_zmq_socket
        from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
        from vllm.v1.engine.output_processor import OutputProcessor
        from vllm.v1.metrics.loggers import StatLoggerManager
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        self.core, self.rng, self.num_requests = core, np.random.default_rng(0), 0
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.marks = Marks(core, self.runner)
        path = OUTPUT_PATH.format(folder=folder)
        self.socket = make_zmq_socket(zmq.Context(), path, zmq.PULL)
        thread = threading.Thread(target=core.process_output_sockets, args=([path], None, 0), daemon=True)
        thread.start()
        assert thread.ident is not None
        self.output_clock = time.pthread_getcpuclockid(thread.ident)
        self.decoder, self.encoder = MsgpackDecoder(EngineCoreOutputs), MsgpackEncoder()
        self.request_decoder = MsgpackDecoder(EngineCoreRequest)
        self.processor = OutputProcessor(AutoTokenizer.from_pretrained(folder), log_stats=True)
        self.loggers, self.choice, self.response = StatLoggerManager(config), CompletionResponseStreamChoice, CompletionStreamResponse
        self.queues: dict[str, Any] = {}

    def add(self, prompt_tokens: int) -> float:
        """Microseconds of the engine's input thread for one more request."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
        from vllm.v1.engine.output_processor import RequestOutputCollector

        self.num_requests += 1
        name = f"cmpl-{self.num_requests:032x}-0"
        params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=MAX_TOKENS, output_kind=RequestOutputKind.DELTA)
        prompt = self.rng.integers(TOKENIZER_VOCAB, size=prompt_tokens).tolist()
        request = EngineCoreRequest(name, prompt, None, params, None, None, time.time(), None, None, None)
        self.queues[name] = RequestOutputCollector(RequestOutputKind.DELTA)
        self.processor.add_request(request, None, None, 0, self.queues[name])
        frames = self.encoder.encode(request)
        start = thread_time_ns()
        received = self.core.preprocess_add_request(self.request_decoder.decode(frames))
        self.core.input_queue.put_nowait((EngineCoreRequestType.ADD, received))
        return (thread_time_ns() - start) / 1e3

    def abort(self, names: list[str]) -> None:
        self.core.abort_requests(names)
        self.processor.abort_requests(names)
        for name in names:
            del self.queues[name]

    def step(self) -> dict[str, float]:
        """Microseconds of one round by part, of output thread and front end too."""
        marks, before = self.marks, time.clock_gettime_ns(self.output_clock)
        marks.times.clear()
        marks.mark()
        self.core.one_round()
        marks.mark()
        if len(marks.times) <= len(LOOP):  # nothing was left to run
            while self.socket.poll(20):
                self.socket.recv_multipart()
            return {}
        times = marks.parts()
        times["frontend"], times["frontend_stats"], times["frontend_json"] = self.receive()
        times["encode"] = (time.clock_gettime_ns(self.output_clock) - before) / 1e3
        return times

    def receive(self) -> tuple[float, float, float]:
        """As AsyncLLM's output handler: microseconds up to the RequestOutputs, of the loggers, and of the answers' JSON."""
        from vllm.v1.metrics.stats import IterationStats

        start = thread_time_ns()
        outputs = self.decoder.decode(self.socket.recv_multipart(copy=False))
        stats = IterationStats()
        most = 128  # VLLM_V1_OUTPUT_PROC_CHUNK_SIZE
        num_slices = -(-len(outputs.outputs) // most)
        for part in (outputs.outputs,) if num_slices <= 1 else np.array_split(outputs.outputs, num_slices):
            self.processor.process_outputs(part, outputs.timestamp, stats)
        self.processor.update_scheduler_stats(outputs.scheduler_stats)
        processed = thread_time_ns()
        self.loggers.record(scheduler_stats=outputs.scheduler_stats, iteration_stats=stats)
        recorded = thread_time_ns()
        ready = [output for collector in self.queues.values() if (output := collector.get_nowait())]
        answered = thread_time_ns()
        for output in ready:
            self.answer(output)
        return (processed - start) / 1e3, (recorded - processed) / 1e3, (thread_time_ns() - answered) / 1e3

    def answer(self, output: Any) -> str:
        """As OpenAIServingCompletion streams a token."""
        choice = self.choice(index=0, text=output.outputs[0].text, logprobs=None, finish_reason=None, stop_reason=None)
        chunk = self.response(id=output.request_id, created=0, model="model", choices=[choice])
        return f"data: {chunk.model_dump_json(exclude_unset=False)}\n\n"

    def wall(self, num_steps: int, encoding: bool) -> list[float]:
        """Microseconds of rounds, what the device takes taken off; encoding: with the output thread, which reads the queue."""
        own_queue, waited = self.core.output_queue, [0]

        def spin() -> None:
            start = time.perf_counter_ns()
            hashlib.pbkdf2_hmac("sha256", b"", b"", SPIN_ITERATIONS)
            waited[0] += time.perf_counter_ns() - start

        waits.append(spin)
        if not encoding:
            self.core.output_queue = queue.Queue()
        found = []
        for _ in range(num_steps):
            waited[0], start = 0, time.perf_counter_ns()
            self.core.one_round()
            found.append((time.perf_counter_ns() - start - waited[0]) / 1e3)
        self.core.output_queue = own_queue
        waits.remove(spin)
        for _ in range(num_steps if encoding else 0):
            self.receive()
        return found

    def choose(self, greedy: bool, flash_3: bool, random: Any) -> None:
        """How the next step samples and which attention it prepares; random: sampling metadata at temperature 1."""
        chosen = replace(random, temperature=None, all_greedy=True, all_random=False) if greedy else random
        self.runner.input_batch.sampling_metadata = chosen
        self.runner.attn_groups[0][0].get_metadata_builder().aot_schedule = flash_3


def fill(server: Server, batch: int, prompt_tokens: int) -> None:
    for _ in range(batch):
        server.add(prompt_tokens)
    server.step()
    while server.core.scheduler.waiting or not all(request.num_output_tokens for request in server.core.scheduler.running):
        server.step()
    for _ in range(WARM_STEPS):
        server.step()
    assert len(server.core.scheduler.running) == batch


def measure(server: Server, batch: int, prompt_tokens: int, num_steps: int) -> list[dict[str, Any]]:
    """Rows of one batch; steps take turns at greedy and random sampling, pairs of them at FlashAttention 2 and 3."""
    fill(server, batch, prompt_tokens)
    times: dict[str, list[float]] = defaultdict(list)
    random = server.runner.input_batch.sampling_metadata
    assert random.all_random
    num_replays = Graph.num_replays
    for index in range(num_steps):
        greedy, flash_3 = index % 2 == 0, index // 2 % 2 == 1
        server.choose(greedy, flash_3, random)
        spent = server.step()
        times["prepare_fa3" if flash_3 else "prepare"].append(spent.pop("prepare"))
        times["launch_greedy" if greedy else "launch_random"].append(spent.pop("launch"))
        for name, us in spent.items():
            times[name].append(us)
    assert Graph.num_replays == num_replays + num_steps
    server.choose(True, False, random)
    for _ in range(WALL_STEPS // 5):  # in turns, so that both see the same noise
        times["wall_alone"] += server.wall(5, False)
        times["wall_encoding"] += server.wall(5, True)
    server.choose(False, False, random)
    for _ in range(NEW_REQUESTS):
        server.abort([next(iter(server.queues))])
        server.step()
        times["new_request_input"].append(server.add(prompt_tokens))
        admitting, usual = (sum(us for part, us in server.step().items() if part in LOOP and part != "launch") for _ in range(2))
        times["new_request"].append(admitting - usual)
    assert len(server.core.scheduler.running) == batch
    server.abort(list(server.queues))
    server.step()
    context = prompt_tokens + WARM_STEPS + num_steps // 2
    return [as_row(name, batch, context, values) for name, values in times.items()]


def print_launches(server: Server) -> None:
    """Operators of a padded decode step by part: but for views, each launches a kernel or a copy on a GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[str] = []

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view:
                found.append(f"{len(server.marks.times)} {func}")
            return func(*args, **(kwargs or {}))

    fill(server, 3, 256)
    random = server.runner.input_batch.sampling_metadata
    for greedy, flash_3 in ((True, False), (False, True)):
        server.choose(greedy, flash_3, random)
        found.clear()
        with Listed():
            server.step()
        print(f"greedy={greedy} flash_3={flash_3}", *found, sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=Path, help="folder that holds the package vllm of the unpacked wheel")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vllm_v1_host.csv")
    parser.add_argument("--steps", type=int, default=160, help="timed steps of each case")
    parser.add_argument("--rounds", type=int, default=3, help="times that all cases are run over")
    parser.add_argument("--more", action="store_true", help="take the rows of --out for one more round, of a noisier hour say")
    parser.add_argument("--launches", action="store_true", help="list the operators of a step instead")
    options = parser.parse_args()
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in read(options.out) if options.more else ():
        found[row["part"], row["batch"], row["context_tokens"]].append(row)
    with tempfile.TemporaryDirectory() as folder:
        stand_in(options.sources, Path(folder))
        server = Server(*make_engine(Path(folder)), Path(folder))
        if options.launches:
            print_launches(server)
            return
        for _ in range(options.rounds):
            for prompt_tokens, batch in [(p, b) for p in PROMPT_TOKENS for b in BATCHES]:
                new = measure(server, batch, prompt_tokens, options.steps)
                print(prompt_tokens, batch, *(f"{row['part']}={row['median_us']}" for row in new), flush=True)
                for row in new:
                    found[row["part"], row["batch"], row["context_tokens"]].append(row)
            # A round is worth keeping if a later one is cut short.
            write(options.out, [quietest(rounds) for rounds in found.values()], ENGINE, Path(__file__).name)


if __name__ == "__main__":
    main()
