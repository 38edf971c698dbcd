"""SGLang: prefill batches before decode batches, admission by an estimate of what running requests will still need.

After `python/sglang/srt/managers/scheduler.py` and `schedule_policy.py` (memory: `server_args.py`, where mem_fraction_static is
reckoned): while requests wait and fit, the next batch is a prefill of
up to chunked_prefill_size tokens and decodes stall (no mixed chunks by default); a prompt that does not fit whole goes on in the next
prefill. A request fits when the pool covers it beside new_token_ratio of what the running ones may still generate; the ratio decays
with every decode step, and jumps when the pool runs dry and requests are retracted (recomputed later). With overlap scheduling
(event_loop_overlap) requests are received, and a batch is chosen and launched, before the result of the one that runs is awaited.

Simplified: requests are retracted last admitted first (SGLang: fewest generated tokens first), and a queue that did not fit is
looked at again when a request finishes or every 8 decode steps (SGLang: every step).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.batch import Sequence
from kvsim.cost_types import Chunk
from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.scheduler import Scheduler, Step
from kvsim.model import Model
from kvsim.ops import HostWork
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool
from kvsim.requests import Request
from kvsim.units import GIB, MIB

_INITIAL_RATIO, _LEAST_RATIO, _DECAY_STEPS = 0.7, 0.098, 600
"""SGLANG_INIT_NEW_TOKEN_RATIO 0.7, times SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR 0.14 at least, over 600 decode steps
(python/sglang/global_config.py)."""
_CLIP_TOKENS = 4096
"""CLIP_MAX_NEW_TOKENS_ESTIMATION: no request is thought to generate more than this when others are admitted."""
_CONTEXT_BYTES = int(0.5 * GIB)
"""0.4-0.6 GiB in nvidia-smi for an idle PyTorch process; assumed. model_runner.py takes the pool from the memory that is free after
the weights, less (1 - mem_fraction_static) of what was free before them, both beside the context."""


class SgLang(Engine):
    """SGLang's runtime with overlap scheduling."""

    kind: Literal["sglang"] = "sglang"
    max_running_requests: int = Field(256, gt=0, description="most requests in a decode batch")
    chunked_prefill_size_tokens: int = Field(8192, gt=0, description="most prompt tokens of a prefill batch")
    page_size_tokens: int = Field(1, gt=0, description="tokens of a KV page")
    num_gpu_blocks: int | None = Field(None, gt=0, description="the engine's own number of pages, in place of the ledger's")
    gpu_memory_utilization: float = Field(
        1.0, gt=0, le=1, description="of GPU memory; mem_fraction_static follows from what the engine reserves"
    )
    overlap_schedule: bool = Field(True, description="the host prepares a batch while the device runs the one before")

    capture_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, *range(8, 257, 8))
    mixes_attention: ClassVar[bool] = False
    command: ClassVar[str] = "python -m sglang.launch_server --model-path"
    stock_kv_dtypes: ClassVar[tuple[str, ...]] = ("auto", "bf16", "fp16", "fp8")
    kernels: ClassVar[str] = "sglang"

    @property
    def block_tokens(self) -> int:
        return self.page_size_tokens

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        work = [HostWork("sglang", part, batch) for part in ("schedule", "prepare", "launch", "process")]
        if num_launches:
            work.append(HostWork("sglang", "eager_launch", num_launches))
        if self.overlap_schedule:
            return (), tuple(work), ()
        return tuple(work[:2]), (work[2], *work[4:]), (work[3],)

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        mib = 512 + 1.5 * max(self.chunked_prefill_size_tokens, 2048) + 2 * self.capture_sizes[-1] + 128 * tp
        note = "SGLang's own reckoning: 512 MiB, 1.5 MiB a token of a prefill batch, 2 MiB a captured batch size, 128 MiB a GPU"
        return (
            MemoryLine("CUDA context", _CONTEXT_BYTES, "assumed; SGLang reckons with what is free once it is there"),
            MemoryLine(ACTIVATIONS, int(mib * MIB), note),
        )

    def flags(self, model: Model, tp: int) -> tuple[str, ...]:
        """Server arguments of SGLang 0.5 (docs.sglang.io, "Server Arguments")."""
        static = "# mem_fraction_static: left to SGLang, whose own reckoning is simulated"
        if self.gpu_memory_utilization < 1:
            static = "# gpu_memory_utilization: lower --mem-fraction-static until the log shows the KV pool of `kvsim show`"
        pages = self.num_gpu_blocks
        return (
            f"--tp-size {tp}", f"--context-length {self.max_model_len or model.max_context_tokens}",
            f"--max-running-requests {self.max_running_requests}", f"--chunked-prefill-size {self.chunked_prefill_size_tokens}",
            f"--page-size {self.page_size_tokens}", f"--kv-cache-dtype {'fp8_e4m3' if self.kv_cache_dtype == 'fp8' else 'auto'}",
            "--disable-radix-cache",
            *(() if pages is None else (f"--max-total-tokens {pages * self.page_size_tokens}",)),
            *(() if self.overlap_schedule else ("--disable-overlap-schedule",)),
            *(("--disable-cuda-graph",) if self.enforce_eager else (f"--cuda-graph-max-bs {self.capture_sizes[-1]}",)),
            static, *self.fork_lines(),
        )  # fmt: skip

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        made = _SgLangScheduler(self, pool, plan)
        made.ahead = self.overlap_schedule
        return made


class _SgLangScheduler(Scheduler):
    def __init__(self, engine: SgLang, pool: BlockPool, plan: CachePlan) -> None:
        super().__init__(pool, plan, engine.max_running_requests)
        self.chunk_tokens = engine.chunked_prefill_size_tokens
        self.partial: Sequence | None = None  # the one prompt that goes on in the next prefill batch
        self._ratio, self._ratio_step = _INITIAL_RATIO, 0  # of the last retraction
        self._look = False  # something has changed for the queue

    @property
    def ratio(self) -> float:
        """Of what running requests may still generate, the part that is kept free."""
        steps = self.batch.step - self._ratio_step
        return max(_LEAST_RATIO, self._ratio - steps * (_INITIAL_RATIO - _LEAST_RATIO) / _DECAY_STEPS)

    def arrive(self, request: Request) -> None:
        self._look = self._look or not self.waiting
        super().arrive(request)

    def finish(self, sequence: Sequence) -> None:
        super().finish(sequence)
        self._look = True

    def pick(self) -> Step | None:
        batch = self.batch
        if self._look or self.partial is not None or not batch.size or batch.step % _RETRY_STEPS == 0:
            self._look = False
            chunks = self._prefill()
            if chunks:
                self._look = True
                return Step(chunks, False, 1, True)
        before = self.num_preemptions
        while batch.size > 1 and batch.next_units() > self.pool.free_units:
            self.preempt_last()
        if self.num_preemptions > before:
            self._ratio, self._ratio_step = min(1.0, self._estimated_ratio()), batch.step
        if not batch.size:
            return None
        horizon, room = self.decode_horizon(), len(self.running) < self.max_num_seqs
        if self.waiting and room:
            horizon = min(horizon, _RETRY_STEPS - batch.step % _RETRY_STEPS)
        return Step([], True, horizon, not self.waiting and room)

    def _estimated_ratio(self) -> float:
        """After a retraction: what the running requests have generated, and 20 steps more, over what they may generate."""
        done = sum(self._generated(sequence) + 20 for sequence in self.running)
        return done / max(1, sum(sequence.output_tokens for sequence in self.running))

    def _generated(self, sequence: Sequence) -> int:
        decoding = sequence in self.batch.members
        return sequence.generated + (self.batch.step - sequence.join_step if decoding else 0)

    def _still_tokens(self, sequence: Sequence) -> int:
        """What a request may still generate, as the engine reckons."""
        return min(sequence.output_tokens - self._generated(sequence), _CLIP_TOKENS)

    def _prefill(self) -> list[tuple[Sequence, Chunk]]:
        chunks: list[tuple[Sequence, Chunk]] = []
        budget, partial, pool, units_of = self.chunk_tokens, self.partial, self.pool, self.plan.prefill_units
        if partial is not None:
            chunk = min(budget, partial.prefill_tokens - partial.computed_tokens)
            chunks.append((partial, Chunk(chunk, partial.computed_tokens)))
            budget -= chunk
            if partial.computed_tokens + chunk == partial.prefill_tokens:
                self.partial = None
        if not self.waiting:
            return chunks
        ratio = self.ratio
        reserved = sum(units_of(int(self._still_tokens(sequence) * ratio)) for sequence in self.running)
        while self.waiting and budget and self.partial is None and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            cached = min(sequence.request.cached_prompt_tokens, sequence.prefill_tokens - 1)
            still = self._still_tokens(sequence)
            # An idle engine takes what fits at all.
            if self.running and units_of(sequence.prefill_tokens + still) > pool.free_units - reserved:
                break
            chunk = min(budget, sequence.prefill_tokens - cached)
            self.admit(sequence, cached)
            self.reserve(sequence, sequence.prefill_tokens)  # pages of the whole prompt, so that its next chunk has them
            reserved += units_of(int(still * ratio))
            budget -= chunk
            chunks.append((sequence, Chunk(chunk, cached)))
            if cached + chunk < sequence.prefill_tokens:
                self.partial = sequence
        return chunks


_RETRY_STEPS = 8
"""Decode steps after which a queue that did not fit is looked at again."""
