"""Hugging Face `generate`: static batches or beams, a contiguous cache grown by concatenation, kernels launched one by one.

A batch is formed of what waits when the engine is idle, padded to its longest prompt, and runs until its longest output is
done; everyone gets their answer then. A step's time is the larger of what the host launches and what the device computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import ClassVar, Literal

from pydantic import Field

from kvsim.batch import Sequence
from kvsim.cost_types import Chunk
from kvsim.dtypes import activation_bytes
from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.huggingface_ops import decode_ops, eager_prompt_ops, repeat_kv_ops, unfused_ops
from kvsim.engines.scheduler import Scheduler, Step
from kvsim.errors import DoesNotFitError
from kvsim.model import Model
from kvsim.ops import HostWork, Op, PolicyKernel
from kvsim.policies.base import CacheShape
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool
from kvsim.units import GIB, format_bytes

_CONTEXT_BYTES = int(0.5 * GIB)
"""CUDA context and cuBLAS workspaces of a PyTorch process; 0.4-0.6 GiB in nvidia-smi for an idle process; assumed."""
_LAUNCHES_PER_LAYER = 42
"""Kernels of one decoder layer, counted in transformers' Llama with sdpa: 7 matrix products, 2 norms of 8, rotary embedding 10, two
concatenations, activation 2, residuals 2, attention and a copy of its output 3. Eager attention has 46 in Llama and fewer than 42 in
families without rotary embedding (MPT 20): 42 stands for both. `repeat_kv` adds two where queries share heads."""
_LAUNCHES_PER_STEP = 30
"""Embedding, final norm, lm_head, and generate's own logits processing and stopping checks; assumed."""


class HuggingFace(Engine):
    """transformers' generate loop, without compilation."""

    kind: Literal["huggingface"] = "huggingface"
    batch_size: int = Field(1, gt=0, description="most requests in one static batch")
    num_beams: int = Field(1, gt=0, description="beams of each request; the cache holds every beam")
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] = Field(
        "sdpa",
        description="transformers' attn_implementation; eager writes all scores out and repeats shared heads, and is what runs under a "
        "policy that needs the probabilities of decoding",
    )
    repeat_kv: bool = Field(
        False,
        description="copy shared KV heads for every query head before sdpa or flash_attention_2 too, as older releases of transformers do "
        "(up to 4.47, Qwen2's modeling_qwen2.py under both); eager always does",
    )
    fit_batch: bool = Field(True, description="shrink a batch to what memory holds; False: out of memory is an error")
    gpu_memory_utilization: float = Field(1.0, gt=0, le=1, description="share of GPU memory the process may use")
    per_head_kv: bool = Field(True, description="a contiguous cache may hold a length of its own for each head")
    max_prefill_tokens: int = Field(4096, gt=0, description="prompt tokens of one batch that the ledger keeps room for")

    kernels: ClassVar[str] = "torch"
    layout: ClassVar[str] = "contiguous"
    mixes_attention: ClassVar[bool] = False
    host_overlap: ClassVar[Literal["async", "sync"]] = "async"
    rotation_passes: ClassVar[int] = 5
    """x·cos + rotate_half(x)·sin over the whole cache, in StreamingLLM's code for Llama: negation of a half (½ pass), concatenation (1),
    two products (1 each), a sum of two (1½): five launches."""

    @property
    def block_tokens(self) -> int:
        return 1

    def for_plan(self, plan: CachePlan) -> HuggingFace:
        eager = any(policy.needs == "decode_probabilities" for policy in plan.composition.policies)
        return self.model_copy(update={"attn_implementation": "eager"}) if eager and self.attn_implementation != "eager" else self

    @property
    def _eager(self) -> bool:
        return self.attn_implementation == "eager"

    @property
    def _repeats(self) -> bool:
        return self._eager or self.repeat_kv

    def num_launches(self, model: Model, tp: int, weight_dtype: str) -> int:
        repeats = 2 if self._repeats and model.q_heads_per_gpu(tp) > model.kv_heads_per_gpu(tp) else 0
        return model.num_layers * (_LAUNCHES_PER_LAYER + repeats) + _LAUNCHES_PER_STEP

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        return (), (HostWork("huggingface", "launch", num_launches),), ()

    def cache_ops(self, plan: CachePlan, batch: int, cache_bytes: float, num_slots: float, num_layers: int) -> SequenceOf[Op]:
        ops = decode_ops(plan, cache_bytes, num_slots, num_layers, self._eager, self._repeats)
        if self.num_beams > 1:
            ops.append(PolicyKernel("index_select_beams", 2 * cache_bytes, 0.0, 2 * num_layers, "engine"))
        return ops

    def prompt_ops(self, shape: CacheShape, new_tokens: int, prior_tokens: int) -> SequenceOf[Op]:
        repeated = repeat_kv_ops(shape, (prior_tokens + new_tokens) * shape.num_pairs, shape.num_layers) if self._repeats else ()
        return (*(eager_prompt_ops(shape, new_tokens, prior_tokens) if self._eager else ()), *repeated)

    def unfused_ops(self, model: Model, tp: int, weight_dtype: str, num_tokens: int) -> Iterable[tuple[int, Op]]:
        return unfused_ops(model, tp, weight_dtype, num_tokens)

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        tokens, size = self.max_prefill_tokens, activation_bytes(weight_dtype)
        inter = -(-model.intermediate_size // tp)
        mlp = size * tokens * (3 if model.gated_mlp else 2) * inter
        # Logits and probabilities of one sequence, one layer.
        scores = size * model.q_heads_per_gpu(tp) * tokens * tokens * 2 if self._eager else 0
        hidden = size * tokens * 4 * model.hidden_size
        return (
            MemoryLine("CUDA context", _CONTEXT_BYTES, "assumed: 0.4-0.6 GiB for a PyTorch process"),
            MemoryLine(
                ACTIVATIONS, hidden + max(mlp, scores),
                f"one layer of a prefill of {tokens} tokens: " + ("the wider of MLP and attention scores" if self._eager else "its MLP"),
            ),
        )  # fmt: skip

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        return _StaticScheduler(self, pool, plan)

    def notes(self) -> tuple[str, ...]:
        return ("static batches: every request of a batch is answered when its longest output is done",)


class _StaticScheduler(Scheduler):
    def __init__(self, engine: HuggingFace, pool: BlockPool, plan: CachePlan) -> None:
        super().__init__(pool, plan, engine.batch_size * engine.num_beams)
        self.engine = engine

    def pick(self) -> Step | None:
        if self.batch.size:
            return Step([], True, self.decode_horizon(), False)
        if not self.waiting:
            return None
        members, size = self._form()
        chunks = []
        for sequence in members:
            self.admit(sequence, 0)
            self.reserve(sequence, sequence.prefill_tokens)
            chunks.append((sequence, Chunk(sequence.prefill_tokens, 0)))
            for _ in range(self.engine.num_beams - 1):
                beam = Sequence(sequence.request)
                beam.is_beam = True
                beam.prompt_tokens = beam.prefill_tokens = sequence.prefill_tokens
                beam.output_tokens = sequence.output_tokens
                self.running[beam] = None
                self.reserve(beam, beam.prefill_tokens)
                chunks.append((beam, Chunk(beam.prefill_tokens, 0)))
        assert len(chunks) == size * self.engine.num_beams
        return Step(chunks, False, 1, False)

    def _form(self) -> tuple[list[Sequence], int]:
        """The next batch, padded alike: as many of those who wait as the engine takes and memory holds."""
        size = min(self.engine.batch_size, len(self.waiting))
        while True:
            members = [self.waiting[i] for i in range(size)]
            prompt = max(sequence.request.prompt_tokens for sequence in members)
            output = max(sequence.request.output_tokens for sequence in members)
            units = size * self.engine.num_beams * self.plan.peak_units(prompt, output)
            if units <= self.pool.capacity_units:
                break
            if size == 1 or not self.engine.fit_batch:
                have, need = (n * self.plan.unit_bytes for n in (self.pool.capacity_units, units))
                raise DoesNotFitError(
                    f"engine.batch_size={size} with num_beams={self.engine.num_beams} runs out of GPU memory: the cache of "
                    f"{prompt} + {output} tokens needs {format_bytes(need)}, {format_bytes(have)} are free; "
                    f"{format_bytes(need - have)} short: lower batch_size or set fit_batch: true"
                )
            size -= 1
        for sequence in members:
            sequence.prompt_tokens = sequence.prefill_tokens = prompt
            sequence.output_tokens = output
        return members, size
