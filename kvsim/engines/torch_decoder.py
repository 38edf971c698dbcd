"""kvsim's own decoder (`kvsim.calibrate.decoder`) as an engine: what `kvsim calibrate serve` puts beside a simulation.

Scheduling is vLLM V1's, and the very class: a live run asks the simulator's scheduler. What differs is what a step launches:
kernels one by one from Python, or a CUDA graph for a step that only decodes, and the host waits for each step. Decode attention is
one launch a layer for the whole batch; what policies do to single caches is done to one sequence after the other.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PrivateAttr

from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.scheduler import Scheduler
from kvsim.engines.vllm_memory import forward_bytes
from kvsim.engines.vllm_v1 import V1Scheduler
from kvsim.model import Model
from kvsim.ops import HostWork
from kvsim.policies.compose import CachePlan, Composition
from kvsim.pool import BlockPool

OWN_STEPS = {
    "kv_compress": "blocks of its heads change hands in every step, and block tables with them",
    "fp8": "elements are converted as they are written",
    "scissorhands": "positions and counts grow with the cache, and are copied when they do",
}
"""Policies, or formats, whose steps take half as long again on the host, or more, for work that no Op counts: host work of their own.
Steps that compute chunks alone are priced with it too."""
_LOGIT_BYTES = 4
"""The decoder's logits are fp32."""
NOT_CAPTURED = {
    "keyformer": "its temperature changes with every step and is an argument of the launch",
    "kivi": "its rings are copied beside each other, and groups of keys become codes inside the step",
    "streaming_llm": "the query is turned by another angle in every step for the sinks, one sequence after the other",
}
"""Policies under which no step replays a CUDA graph, and why. All others do their work on single caches between replays."""


class TorchDecoder(Engine):
    """kvsim's own decoder, with continuous batching and chunked prefill."""

    kind: Literal["torch_decoder"] = "torch_decoder"
    max_num_seqs: int = Field(16, gt=0, description="most sequences in a batch")
    max_num_batched_tokens: int = Field(512, gt=0, description="most tokens computed in a step, prompts and decodes")
    block_size_tokens: int = Field(16, gt=0, description="tokens of a KV block")
    num_gpu_blocks: int | None = Field(None, gt=0, description="the engine's own number of blocks, in place of the ledger's")
    attention: Literal["torch", "triton"] = Field(
        "torch", description="what decodes attend with: torch, or the Triton kernels (GPU), under which CUDA graphs are captured too"
    )
    per_head_kv: bool = Field(True, description="blocks belong to KV heads, which may hold different numbers of tokens")

    kernels: ClassVar[str] = "torch_decoder"
    mixes_attention: ClassVar[bool] = False
    captures_chunks: ClassVar[bool] = False
    capture_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, *range(8, 257, 8))
    """As vLLM's first ones; only under attention=triton."""
    updates_whole_pool: ClassVar[bool] = False
    host_overlap: ClassVar[Literal["async", "sync"]] = "sync"

    _own_steps: str = PrivateAttr("")
    """Of OWN_STEPS, those of the plan."""

    @property
    def block_tokens(self) -> int:
        return self.block_size_tokens

    @property
    def captured_tokens(self) -> int:
        """Torch's attention groups caches on the host, so that no step is the same twice."""
        return 0 if self.attention == "torch" else super().captured_tokens

    def why_eager(self, plan: CachePlan) -> str:
        """Why no step under this plan replays a graph; "" where steps that only decode do."""
        if self.attention == "torch":
            return "attention=torch groups caches on the host"
        if self.enforce_eager:
            return "enforce_eager is set"
        return next((f"{kind}: {NOT_CAPTURED[kind]}" for kind in _kinds(plan) if kind in NOT_CAPTURED), "")

    def for_plan(self, plan: CachePlan) -> TorchDecoder:
        own_steps = "+".join(sorted({*_kinds(plan), plan.code_format} & OWN_STEPS.keys()))
        eager = self.enforce_eager or bool(self.why_eager(plan))
        if (own_steps, eager) == (self._own_steps, self.enforce_eager):
            return self
        engine = self.model_copy(update={"enforce_eager": eager})
        engine._own_steps = own_steps
        return engine

    def attention_layout(self, composition: Composition) -> str:
        """Torch attends heads of a cache up to the longest of them, and turns the query for tokens whose positions move."""
        if self.attention == "torch" and composition.per_head_lengths:
            return "padded"
        return "turned" if self.attention == "torch" and composition.moves_positions else self.layout

    def chunk_format(self, plan: CachePlan) -> str:
        """Torch widens the codes of earlier tokens in the attention of every chunk."""
        return plan.code_format if plan.code_format != plan.kv_dtype else ""

    def one_by_one(self, plan: CachePlan) -> frozenset[str]:
        """Choosing and moving slots; writing KIVI's rings; and torch's scores, since only small and alike caches are attended together."""
        rings = {"kv_quantize"} if plan.window_tokens else set()
        scores = {"decode_attention_scored"} if self.attention == "torch" else set()
        return frozenset({"select", "compact", "rerotate"} | rings | scores)

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        """On a CPU launches are part of what Ops take, and its profile says that they cost nothing beside."""
        step = HostWork("torch_decoder", "step", batch, self._own_steps)
        return (step,), (HostWork("torch_decoder", "eager_launch", num_launches),), ()

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        logits = _LOGIT_BYTES * self.max_num_seqs * model.vocab_size
        tokens = self.max_num_batched_tokens
        return (MemoryLine(ACTIVATIONS, forward_bytes(model, tp, tokens) + logits, f"a step of {tokens} tokens, and its logits"),)

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        return V1Scheduler(pool, plan, self.max_num_seqs, self.max_num_batched_tokens, reserve_full_prompt=True)


def _kinds(plan: CachePlan) -> list[str]:
    return [str(getattr(policy, "kind", "")) for policy in plan.composition.policies]
