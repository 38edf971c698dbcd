"""vLLM's V1 engine: one token budget a step for decodes and prompt chunks alike, paged blocks, recompute preemption.

Scheduling follows `vllm/v1/core/sched/scheduler.py`: running sequences first, in order of admission; where blocks run out the
one admitted last is preempted; where none was, the queue's head is admitted while budget, blocks and max_num_seqs allow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from kvsim.batch import Sequence
from kvsim.cost_types import Chunk
from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.scheduler import Scheduler, Step
from kvsim.engines.vllm_flags import STOCK_KV_DTYPES, shared_flags
from kvsim.engines.vllm_memory import collective_line, forward_bytes
from kvsim.errors import InputError
from kvsim.model import Model
from kvsim.ops import HostWork, Op
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool, PrefixPool
from kvsim.sampling import Passes, RequestedSampling, Sampling, backend_on, by_clients, greedy_note, sampler_ops
from kvsim.units import GIB

if TYPE_CHECKING:
    from kvsim.hardware import Gpu

_SAMPLER_BYTES_PER_LOGIT = 26
"""Profile run of the V1 sampler with top-k and top-p (vllm/v1/sample): bf16 logits 2, fp32 copy 4, sorted values 4 and int64
indices 8, softmax 4, cumulative sum 4."""
_PENALTIES: Passes = (2, 2.25, 2, 2.25, 2.5, 3, 3, 1.25, 3)
"""All three where one acts (vllm/model_executor/layers/utils.py of 0.12): zeroed int64 counts and their mask for the prompt, the same for
the answer, the repetition kernel, counts times the frequency penalty, their subtraction, the mask times the presence penalty, and its
subtraction. Scatters of the tokens themselves are not counted."""
_BACKENDS = {
    "flashinfer": "VLLM_USE_FLASHINFER_SAMPLER=1, the default since April 2026",
    "triton": "VLLM_USE_FLASHINFER_SAMPLER=0, since February 2026",
    "pytorch": "as releases before February 2026 have them",
}
_NON_TORCH_BYTES = int(0.25 * GIB)
"""cuBLAS workspaces, loaded kernels: engine logs of "non-torch memory" lie between 0.1 and 0.4 GiB; assumed."""
_GRAPH_BYTES = int(0.5 * GIB)
"""Captured graphs up to batch 512, as engine logs of "Graph capturing finished ... took 0.5 GiB" for 7-8B models; assumed."""


class VllmV1(Engine):
    """vLLM with its V1 engine (0.8 and later)."""

    kind: Literal["vllm_v1"] = "vllm_v1"
    max_num_seqs: int = Field(256, gt=0, description="most sequences in a batch")
    max_num_batched_tokens: int = Field(2048, gt=0, description="most tokens computed in a step, prompts and decodes")
    block_size_tokens: int = Field(16, gt=0, description="tokens of a KV block")
    num_gpu_blocks: int | None = Field(None, gt=0, description="the engine's own number of blocks, in place of the ledger's")
    enable_prefix_caching: bool = Field(True, description="acts where the trace has prefix hashes")
    reserve_full_prompt: bool = Field(
        True,
        description="admit a prompt only if all of it fits, as vLLM's scheduler_reserve_full_isl (pull request 37307); "
        "False: as before, only the first chunk must fit",
    )

    async_scheduling: bool = Field(
        True,
        description="the host decides on a step and prepares it while the device runs the one before, as vLLM does by default "
        "since 0.14: who arrives meanwhile waits for one more; "
        "False: schedule and prepare, then the device, then process outputs",
    )

    sampling: RequestedSampling = Sampling()
    sampling_backend: Literal["flashinfer", "triton", "pytorch"] = Field(
        "flashinfer", description="what searches for top-k and top-p: FlashInfer by default since April 2026 (pull request 40376), Triton "
        "from 8 sequences on since February 2026 (33538), PyTorch's sort before; triton where it is left out on another vendor's GPU"
    )  # fmt: skip

    sampler_kernels: ClassVar[tuple[int, ...]] = (1, 1)
    serves: ClassVar[bool] = True
    command: ClassVar[str] = "vllm serve"
    stock_kv_dtypes: ClassVar[tuple[str, ...]] = STOCK_KV_DTYPES
    # vLLM captures 1, 2, 4, then every 8 up to 256 and every 16 up to 512 (vllm/config: cudagraph_capture_sizes).
    capture_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))

    @model_validator(mode="after")
    def _budget_covers_batch(self) -> VllmV1:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least max_num_seqs={self.max_num_seqs}; "
                "raise the budget or lower max_num_seqs"
            )
        return self

    @property
    def block_tokens(self) -> int:
        return self.block_size_tokens

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        before, beside, after = (
            [HostWork("vllm_v1", part, batch) for part in parts]
            for parts in (("schedule", "prepare"), ("launch",), ("sample", "process"))
        )
        if num_launches:
            # Without a graph it runs what torch.compile has made of the layers, unless told not to.
            beside.append(HostWork("vllm_v1", "eager_launch" if self.enforce_eager else "compiled_launch", num_launches))
        if self.async_scheduling:
            return (), (*before, *beside, *after), ()
        return tuple(before), tuple(beside), tuple(after)

    def for_gpu(self, gpu: Gpu, tp: int) -> VllmV1:
        is_said = "sampling_backend" in self.model_fields_set
        backend = backend_on(gpu, self.sampling_backend, ("triton", "pytorch"), is_said=is_said)
        return self if backend == self.sampling_backend else self.model_copy(update={"sampling_backend": backend})

    def sampler_ops(self, rows: int, vocab_size: int, head_bytes: int) -> Iterable[Op]:
        penalties = _PENALTIES if self.sampling.num_penalties else ()
        return sampler_ops(self.sampling, self.sampling_backend, self.sampler_kernels, penalties, rows, vocab_size, head_bytes)

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        tokens = self.max_num_batched_tokens
        sampler = min(self.max_num_seqs, tokens) * model.vocab_size * _SAMPLER_BYTES_PER_LOGIT
        sampler += 2 * tokens * model.hidden_size * 2
        forward = forward_bytes(model, tp, tokens)
        which = "forward pass" if forward > sampler else "sampler"
        return (
            MemoryLine(
                ACTIVATIONS, max(forward, sampler),
                f"profile run: {which} at {tokens} tokens, {self.max_num_seqs} sequences",
            ),
            MemoryLine("non-torch memory", _NON_TORCH_BYTES, "assumed: 0.1-0.4 GiB in engine logs"),
            *collective_line(tp),
            MemoryLine("CUDA graphs", 0 if self.enforce_eager else _GRAPH_BYTES, "assumed; outside the utilization", True),
        )  # fmt: skip

    def flags(self, model: Model, tp: int) -> tuple[str, ...]:
        """Of vLLM 0.14 and later; before, `--async-scheduling` and `--no-scheduler-reserve-full-isl` do not exist."""
        longest = self.max_model_len or model.max_context_tokens
        return (
            *shared_flags(self, tp, longest, self.max_num_seqs, self.block_size_tokens, self.num_gpu_blocks),
            f"--max-num-batched-tokens {self.max_num_batched_tokens}",
            "--enable-prefix-caching" if self.enable_prefix_caching else "--no-enable-prefix-caching",
            "--async-scheduling" if self.async_scheduling else "--no-async-scheduling",
            *(() if self.reserve_full_prompt else ("--no-scheduler-reserve-full-isl",)),
            *self.sampling_flags(),
            *self.fork_lines(),
        )

    def sampling_flags(self) -> tuple[str, ...]:
        """What answers are drawn by where clients say nothing; they may say otherwise."""
        sampling, backend = self.sampling, self.sampling_backend
        lines = [] if backend == "flashinfer" and not sampling.acts else [f"# top-k and top-p: {_BACKENDS[backend]}"]
        if sampling.acts:
            chosen = {"temperature": sampling.temperature, "top_k": sampling.top_k or -1, "top_p": sampling.top_p,
                      "repetition_penalty": sampling.repetition_penalty}  # fmt: skip
            lines += ["--generation-config vllm", f"--override-generation-config '{json.dumps(chosen)}'"]
        if sampling.presence_penalty or sampling.frequency_penalty:
            lines.append(f"# clients must ask for: {by_clients(sampling, 'presence_penalty', 'frequency_penalty')}")
        return tuple(lines)

    def notes(self) -> tuple[str, ...]:
        return greedy_note(self.sampling)

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        recalls = self.enable_prefix_caching and plan.composition.blocks_shareable and plan.prefill_units_per_block == 1
        made = V1Scheduler(
            pool, plan, self.max_num_seqs, self.max_num_batched_tokens, self.reserve_full_prompt,
            recall_block_tokens=self.block_size_tokens if recalls else 0,
        )  # fmt: skip
        made.ahead = self.async_scheduling
        return made


_NO_CHUNKS: list[tuple[Sequence, Chunk]] = []


class V1Scheduler(Scheduler):
    """One budget of tokens a step, decodes first.

    chunked: whether a prompt may be split over steps. recall_block_tokens: block size of a prefix cache in which a preempted
    sequence finds again what has not been overwritten; 0 without one.
    """

    def __init__(
        self, pool: BlockPool, plan: CachePlan, max_num_seqs: int, budget_tokens: int, reserve_full_prompt: bool,
        chunked: bool = True, recall_block_tokens: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(pool, plan, max_num_seqs)
        self.budget, self.reserve_full_prompt, self.chunked = budget_tokens, reserve_full_prompt, chunked
        self.recall_block_tokens = recall_block_tokens
        self.partial: Sequence | None = None  # the one prefill that has not ended; always the last admitted

    def pick(self) -> Step | None:
        batch = self.batch
        before = self.num_preemptions
        growth = batch.next_units()
        while growth > self.pool.free_units:
            if self.preempt_last() is self.partial:
                self.partial = None
            growth = batch.next_units()
        pool = self.pool
        open_to_arrivals = False
        if self.partial is not None or self.waiting:
            if growth:  # decodes take their blocks, known or not, before the queue looks for hits
                pool.take(growth)
                self.prepaid_units = growth
            chunks = self._fill(pool.free_units, self.num_preemptions > before)
            if chunks:
                return Step(chunks, batch.size > 0, 1, True)
        else:
            open_to_arrivals = len(self.running) < self.max_num_seqs
        if not batch.size:
            # If everything running was preempted, the queue's head fits the empty pool: the next pick admits it.
            return self.pick() if self.waiting else None
        stuck = self.waiting and self.num_preemptions > before  # the queue is looked at again in the next step
        return Step(_NO_CHUNKS, True, 1 if stuck else self.decode_horizon(), open_to_arrivals)

    def _fill(self, free: int, preempted: bool) -> list[tuple[Sequence, Chunk]]:
        """Prompt chunks beside the decodes: the rest of the prefill under way, then what queue, budget and pool admit."""
        budget = self.budget - self.batch.size
        chunks: list[tuple[Sequence, Chunk]] = []
        partial, prefill_units = self.partial, self.plan.prefill_units
        if partial is not None and budget:
            chunk = min(budget, partial.prefill_tokens - partial.computed_tokens)
            units = prefill_units(partial.computed_tokens + chunk) - partial.held_units
            if units > free:
                self.preempt_last()
                self.partial, preempted = None, True
            else:
                free, budget = free - units, budget - chunk
                self._schedule(partial, chunk, partial.held_units + units, chunks)
        waiting, pool = self.waiting, self.pool  # which a preemption may have exchanged
        while waiting and budget and not preempted and len(self.running) < self.max_num_seqs:
            sequence = waiting[0]
            whole, hit = sequence.prefill_tokens, 0
            cached = min(sequence.request.cached_prompt_tokens, whole - 1)
            if pool.shares:
                hit = pool.match(sequence)
                cached = max(cached, hit)
            chunk = min(budget, whole - cached)
            units = taken = prefill_units(cached + chunk)
            needed = prefill_units(whole) if self.reserve_full_prompt and cached + chunk < whole else units
            if hit:
                taken = pool.units_to_admit(sequence, units)
                needed -= units - taken
            if not self.chunked and chunk < whole - cached:
                self._check_budget(sequence, whole - cached)
                break
            if not self.fits(sequence, needed, free):
                break
            if hit:
                pool.admit(sequence)
                sequence.held_units = len(sequence.shared_blocks)
            self.admit(sequence, cached)
            free, budget = free - taken, budget - chunk
            self._schedule(sequence, chunk, units, chunks)
        return chunks

    def _check_budget(self, sequence: Sequence, num_tokens: int) -> None:
        if num_tokens > self.budget:
            raise InputError(
                f"workload: request {sequence.request.index}: prompt tokens", num_tokens,
                f"must be at most the engine's {self.budget} tokens a step, since prompts are not split",
                "raise engine.max_num_tokens or set engine.chunked_context: true",
            )  # fmt: skip

    def preempt_last(self) -> Sequence:
        """From the first preemption on it matters what free blocks hold: then hardly any is free whose past was not watched."""
        if self.recall_block_tokens and not self.pool.shares:
            self.pool = PrefixPool.taking_over(self.pool, self.recall_block_tokens)
        return super().preempt_last()

    def fits(self, sequence: Sequence, needed_units: int, free_units: int) -> bool:
        """Whether the queue's head is admitted."""
        return needed_units <= free_units

    def _schedule(self, sequence: Sequence, chunk: int, units: int, chunks: list[tuple[Sequence, Chunk]]) -> None:
        """The next `chunk` tokens of a prefill, which then holds `units`."""
        prior = sequence.computed_tokens
        self.pool.take(units - sequence.held_units)
        sequence.held_units = units
        chunks.append((sequence, Chunk(chunk, prior)))
        self.partial = sequence if prior + chunk < sequence.prefill_tokens else None
