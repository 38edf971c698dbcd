"""SGLang: prefill batches before decode batches, admission by an estimate of what running requests will still need.

After `python/sglang/srt/managers/scheduler.py` and `schedule_policy.py`: while requests wait and fit, the next batch is a prefill of
up to chunked_prefill_size tokens and decodes stall (no mixed chunks by default); a prompt that does not fit whole goes on in the next
prefill. A request fits when the pool covers it beside new_token_ratio of what the running ones may still generate; the ratio decays
with every decode step, and jumps when the pool runs dry and requests are retracted (recomputed later).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.batch import Sequence
from kvsim.cost_types import Chunk
from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.scheduler import Scheduler, Step
from kvsim.engines.vllm_memory import collective_line, forward_bytes
from kvsim.model import Model
from kvsim.ops import HostWork
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool
from kvsim.units import GIB

_LOGIT_BYTES = 10
_NON_TORCH_BYTES = int(0.5 * GIB)
"""cuBLAS workspaces, FlashInfer buffers (384 MiB by default), loaded kernels; assumed."""
_GRAPH_BYTES = int(1.0 * GIB)
"""Captured decode graphs: start-up logs of 8B models say 0.9-1.5 GiB; assumed."""
_INITIAL_RATIO, _LEAST_RATIO, _DECAY_STEPS = 0.7, 0.098, 600
"""SGLANG_INIT_NEW_TOKEN_RATIO 0.7, times SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR 0.14 at least, over 600 decode steps
(python/sglang/global_config.py)."""
_CLIP_TOKENS = 4096
"""CLIP_MAX_NEW_TOKENS_ESTIMATION: no request is thought to generate more than this when others are admitted."""


class SgLang(Engine):
    """SGLang's runtime with overlap scheduling."""

    kind: Literal["sglang"] = "sglang"
    max_running_requests: int = Field(256, gt=0, description="most requests in a decode batch")
    chunked_prefill_size_tokens: int = Field(8192, gt=0, description="most prompt tokens of a prefill batch")
    page_size_tokens: int = Field(1, gt=0, description="tokens of a KV page")
    num_gpu_blocks: int | None = Field(None, gt=0, description="the engine's own number of pages, in place of the ledger's")
    overlap_schedule: bool = Field(True, description="the host prepares a batch while the device runs the one before")

    capture_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, *range(8, 257, 8))
    mixes_attention: ClassVar[bool] = False
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
        tokens = self.chunked_prefill_size_tokens
        logits = self.max_running_requests * model.vocab_size * _LOGIT_BYTES
        return (
            MemoryLine(ACTIVATIONS, forward_bytes(model, tp, tokens) + logits, f"a prefill batch of {tokens} tokens, and logits"),
            MemoryLine("non-torch memory", _NON_TORCH_BYTES, "assumed"),
            *collective_line(tp),
            MemoryLine("CUDA graphs", 0 if self.enforce_eager else _GRAPH_BYTES, "assumed; outside the utilization", True),
        )

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        return _SgLangScheduler(self, pool, plan)


class _SgLangScheduler(Scheduler):
    def __init__(self, engine: SgLang, pool: BlockPool, plan: CachePlan) -> None:
        super().__init__(pool, plan, engine.max_running_requests)
        self.chunk_tokens = engine.chunked_prefill_size_tokens
        self.partial: Sequence | None = None  # the one prompt that goes on in the next prefill batch
        self.ratio, self.ratio_step = _INITIAL_RATIO, 0

    def pick(self) -> Step | None:
        self._decay()
        chunks = self._prefill()
        if chunks:
            return Step(chunks, False, 1, True)
        batch, before = self.batch, self.num_preemptions
        while batch.size > 1 and batch.next_units() > self.pool.free_units:
            self.preempt_last()
        if self.num_preemptions > before:
            self.ratio, self.ratio_step = min(1.0, self._estimated_ratio()), batch.step
        if not batch.size:
            return None
        retry = bool(self.waiting) and len(self.running) < self.max_num_seqs
        # A waiting request may fit when the ratio has decayed: it is looked at again after some steps, as often as one may finish.
        horizon = min(self.decode_horizon(), _RETRY_STEPS) if retry else self.decode_horizon()
        return Step([], True, horizon, not self.waiting and len(self.running) < self.max_num_seqs)

    def _decay(self) -> None:
        steps = self.batch.step - self.ratio_step
        self.ratio = max(_LEAST_RATIO, self.ratio - steps * (_INITIAL_RATIO - _LEAST_RATIO) / _DECAY_STEPS)
        self.ratio_step = self.batch.step

    def _estimated_ratio(self) -> float:
        """After a retraction: what the running requests have generated, and 20 steps more, over what they may generate."""
        done = sum(self._generated(sequence) + 20 for sequence in self.running)
        return done / max(1, sum(sequence.output_tokens for sequence in self.running))

    def _generated(self, sequence: Sequence) -> int:
        decoding = sequence in self.batch.members
        return sequence.generated + (self.batch.step - sequence.join_step if decoding else 0)

    def _reserved_units(self) -> int:
        """What the running requests are thought to need still."""
        still = sum(min(s.output_tokens - self._generated(s), _CLIP_TOKENS) * self.ratio for s in self.running)
        return self.plan.prefill_units(int(still)) if still else 0

    def _prefill(self) -> list[tuple[Sequence, Chunk]]:
        chunks: list[tuple[Sequence, Chunk]] = []
        budget = self.chunk_tokens
        partial = self.partial
        if partial is None and not self.waiting:
            return chunks
        if partial is not None:
            chunk = min(budget, partial.prefill_tokens - partial.computed_tokens)
            self.reserve(partial, partial.computed_tokens + chunk)
            chunks.append((partial, Chunk(chunk, partial.computed_tokens)))
            budget -= chunk
            self.partial = partial if partial.computed_tokens + chunk < partial.prefill_tokens else None
        reserved = self._reserved_units() if self.waiting else 0
        while self.waiting and budget and self.partial is None and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            cached = min(sequence.request.cached_prompt_tokens, sequence.prefill_tokens - 1)
            expected = min(sequence.output_tokens - sequence.generated, _CLIP_TOKENS)
            whole = self.plan.prefill_units(sequence.prefill_tokens)
            if self.plan.prefill_units(sequence.prefill_tokens + expected) > self.pool.free_units - reserved and (
                self.running or whole > self.pool.free_units  # an idle engine takes what fits at all
            ):
                break
            chunk = min(budget, sequence.prefill_tokens - cached)
            self.admit(sequence, cached)
            self.reserve(sequence, sequence.prefill_tokens)  # pages of the whole prompt, so that the next chunk has them
            reserved += self.plan.prefill_units(int(expected * self.ratio))
            budget -= chunk
            chunks.append((sequence, Chunk(chunk, cached)))
            self.partial = sequence if cached + chunk < sequence.prefill_tokens else None
        return chunks


_RETRY_STEPS = 8
"""Decode steps after which waiting requests are looked at again; the engine does so at every step, which a run of steps cannot."""
