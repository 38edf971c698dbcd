"""vLLM's V0 engine (2023-2025): prefills first, whole prompts, decodes stall meanwhile; recompute or swap preemption.

Scheduling follows `vllm/core/scheduler.py` (`_schedule_default`): the queue is admitted while prompt tokens fit the budget and
blocks stay above the 1 % watermark; only when nothing was admitted do the running sequences decode, each of which must
find a free block at its turn; swapped sequences come back when nobody had to leave.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.batch import Sequence
from kvsim.cost_types import Chunk
from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.scheduler import Scheduler, Step
from kvsim.engines.vllm_flags import STOCK_KV_DTYPES, shared_flags
from kvsim.engines.vllm_memory import collective_line, reserved_bytes
from kvsim.errors import InputError
from kvsim.model import Model
from kvsim.ops import HostWork
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool
from kvsim.units import GIB

_SAMPLER_BYTES_PER_LOGIT = 10
"""Profile run of the V0 sampler: bf16 logits 2, fp32 probabilities 4 and log-probabilities 4
(vllm/model_executor/layers/sampler)."""
_GRAPH_BYTES = int(0.35 * GIB)
"""Captured decode graphs up to batch 256: the documentation speaks of 1-3 GiB at most, logs of 7-8B models of 0.3; assumed."""


class VllmV0(Engine):
    """vLLM with its V0 engine (up to 0.7 by default)."""

    kind: Literal["vllm_v0"] = "vllm_v0"
    max_num_seqs: int = Field(256, gt=0, description="most sequences in a batch")
    max_num_batched_tokens: int | None = Field(None, gt=0, description="default: max(max_model_len, 2048), as vLLM")
    block_size_tokens: int = Field(16, gt=0, description="tokens of a KV block")
    num_gpu_blocks: int | None = Field(None, gt=0, description="the engine's own number of blocks, in place of the ledger's")
    watermark_frac: float = Field(0.01, ge=0, lt=1, description="blocks that admission leaves free")
    preemption: Literal["recompute", "swap"] = Field("recompute", description="what a sequence that must leave loses")
    swap_space_gib: float = Field(4.0, ge=0, description="host memory for swapped blocks; recompute where it is full")

    serves: ClassVar[bool] = True
    command: ClassVar[str] = "vllm serve"
    stock_kv_dtypes: ClassVar[tuple[str, ...]] = STOCK_KV_DTYPES
    capture_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, *range(8, 257, 8))
    sampler_kernels: ClassVar[tuple[int, ...]] = (1, 2, 2, 2, 2, 1, 3, 1)
    """Sampler.forward at a temperature, without top-p: to fp32, division, softmax, log-softmax, probabilities gathered, exponential noise,
    division by it, argmax. 58 bytes per logit of 16 bits, if softmax finds its rows again in the L2."""
    mixes_attention: ClassVar[bool] = False
    host_overlap: ClassVar[Literal["async", "sync"]] = "sync"

    @property
    def block_tokens(self) -> int:
        return self.block_size_tokens

    def prefill_budget(self, model: Model) -> int:
        return self.max_num_batched_tokens or max(self.max_model_len or model.max_context_tokens, 2048)

    def check(self, model: Model, tp: int) -> None:
        budget, longest = self.prefill_budget(model), self.max_model_len or model.max_context_tokens
        if self.max_num_batched_tokens and budget < longest:
            raise InputError(
                "engine.max_num_batched_tokens", budget, f"must be at least max_model_len={longest}: prompts are not chunked",
                f"raise it, or set engine.max_model_len to at most {budget}",
            )  # fmt: skip

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        kind = "vllm_v0"
        beside = [HostWork(kind, "launch", batch)]
        if num_launches:
            beside.append(HostWork(kind, "eager_launch", num_launches))
        before = (HostWork(kind, "schedule", batch), HostWork(kind, "prepare", batch))
        return before, tuple(beside), (HostWork(kind, "sample", batch), HostWork(kind, "process", batch))

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        tokens = self.prefill_budget(model)
        activations = reserved_bytes(model, tp, weight_dtype, tokens)
        activations += min(self.max_num_seqs, tokens) * model.vocab_size * _SAMPLER_BYTES_PER_LOGIT
        return (
            MemoryLine(
                ACTIVATIONS, activations,
                f"profile run at {tokens} tokens, {self.max_num_seqs} sequences; what the allocator has reserved counts",
            ),
            *collective_line(tp),
            MemoryLine("CUDA graphs", 0 if self.enforce_eager else _GRAPH_BYTES, "assumed; outside the utilization", True),
        )  # fmt: skip

    def flags(self, model: Model, tp: int) -> tuple[str, ...]:
        """Of vLLM 0.6 and 0.7; the watermark is a constant there."""
        longest = self.max_model_len or model.max_context_tokens
        watermark = () if self.watermark_frac == 0.01 else (f"# watermark_frac {self.watermark_frac:g}: 0.01 in vLLM, no option",)
        return (
            *shared_flags(self, tp, longest, self.max_num_seqs, self.block_size_tokens, self.num_gpu_blocks),
            f"--max-num-batched-tokens {self.prefill_budget(model)}",
            "--enable-chunked-prefill=false", "--no-enable-prefix-caching",
            f"--preemption-mode {self.preemption}", f"--swap-space {self.swap_space_gib:g}",
            *watermark, *self.fork_lines(),
        )  # fmt: skip

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        return _V0Scheduler(self, pool, plan, model)


class _V0Scheduler(Scheduler):
    def __init__(self, engine: VllmV0, pool: BlockPool, plan: CachePlan, model: Model) -> None:
        super().__init__(pool, plan, engine.max_num_seqs)
        self.budget = engine.prefill_budget(model)
        self.watermark = int(engine.watermark_frac * pool.capacity_units)
        self.swaps = engine.preemption == "swap"
        self.swap_units = int(engine.swap_space_gib * GIB) // plan.unit_bytes
        self.spare = plan.prefill_units_per_block  # every sequence must find a free block, whether it needs one or not

    def pick(self) -> Step | None:
        chunks = self._admit() if not self.swapped else []
        if chunks:
            return Step(chunks, False, 1, True)
        batch, before = self.batch, self.num_preemptions
        moved = self._make_room()
        if self.num_preemptions == before:
            moved += self._swap_in()
        if not batch.size:
            return None
        waits = bool(self.waiting or self.swapped)
        stuck = waits and self.num_preemptions > before
        horizon = 1 if stuck or moved else self.decode_horizon(self.spare if batch.size > 1 else 0)
        return Step([], True, horizon, not waits and len(self.running) < self.max_num_seqs, moved)

    def _make_room(self) -> int:
        """Preempts until everyone finds a free block at its turn, in order of admission; returns units moved to the host."""
        batch = self.batch
        if batch.size <= 1 or batch.next_units() + self.spare <= self.pool.free_units:
            return 0
        moved, order = 0, list(self.running)
        needs = {sequence: batch.next_units_of(sequence) for sequence in order}
        free, place = self.pool.free_units, 0
        while place < len(order):
            sequence = order[place]
            while max(self.spare, needs[sequence]) > free and len(order) > 1:
                victim = order.pop()
                free += batch.held(victim)
                moved += self._evict()
                if victim is sequence:
                    return moved
            free -= needs[sequence]
            place += 1
        return moved

    def _admit(self) -> list[tuple[Sequence, Chunk]]:
        chunks: list[tuple[Sequence, Chunk]] = []
        budget = self.budget
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            cached = min(sequence.request.cached_prompt_tokens, sequence.prefill_tokens - 1)
            tokens = sequence.prefill_tokens - cached
            units = self.plan.prefill_units(sequence.prefill_tokens)
            # The watermark keeps a little room for those that decode; an idle engine admits whatever fits.
            low = self.watermark if self.running else 0
            if tokens > budget or units > self.pool.free_units - low:
                break
            self.admit(sequence, cached)
            self.reserve(sequence, sequence.prefill_tokens)
            budget -= tokens
            chunks.append((sequence, Chunk(tokens, cached)))
        return chunks

    def _evict(self) -> int:
        """Preempts the sequence admitted last; returns units moved to the host."""
        sequence = next(reversed(self.running))
        units = self.batch.held(sequence)
        if not self.swaps or units > self.swap_units:
            self.preempt_last()
            return 0
        self.swap_units -= units
        del self.running[sequence]
        sequence.decode_steps = self.batch.step - sequence.decode_start
        self.pool.release(sequence, self._leave(sequence))
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.swapped.appendleft((sequence, units))
        return units

    def _swap_in(self) -> int:
        moved = 0
        while self.swapped and len(self.running) < self.max_num_seqs:
            sequence, units = self.swapped[0]
            segment = self.plan.segment(sequence.prompt_tokens, sequence.prefill_tokens, sequence.decode_steps + 1)
            # Beside others it must leave the watermark and two blocks; an idle engine takes what fits.
            room = self.watermark + self.batch.next_units() + 2 * self.spare
            if not self.running:
                room = self.plan.lane_held(segment.tokens, segment.d_tokens, 1) - segment.held_units
            if segment.held_units > self.pool.free_units - room:
                break
            self.swapped.popleft()
            self.swap_units += units
            self.running[sequence] = None
            self.pool.take(self.batch.join(sequence, sequence.decode_steps))
            moved += units
        return moved
