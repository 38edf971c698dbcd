"""kvsim's own decoder (`kvsim.calibrate.decoder`) as an engine: what `kvsim calibrate serve` puts beside a simulation.

Scheduling is vLLM V1's, and the very class: a live run asks the simulator's scheduler. What differs is what a step launches:
every kernel by itself from Python, attention one sequence after the other, and the host waits for each step.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.scheduler import Scheduler
from kvsim.engines.vllm_memory import forward_bytes
from kvsim.engines.vllm_v1 import V1Scheduler
from kvsim.model import Model
from kvsim.ops import HostWork
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool

_LOGIT_BYTES = 4
"""The decoder's logits are fp32."""


class TorchDecoder(Engine):
    """kvsim's own decoder, with continuous batching and chunked prefill."""

    kind: Literal["torch_decoder"] = "torch_decoder"
    max_num_seqs: int = Field(16, gt=0, description="most sequences in a batch")
    max_num_batched_tokens: int = Field(512, gt=0, description="most tokens computed in a step, prompts and decodes")
    block_size_tokens: int = Field(16, gt=0, description="tokens of a KV block")
    num_gpu_blocks: int | None = Field(None, gt=0, description="the engine's own number of blocks, in place of the ledger's")
    per_head_kv: bool = Field(True, description="blocks belong to KV heads, which may hold different numbers of tokens")

    kernels: ClassVar[str] = "torch_decoder"
    mixes_attention: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = True
    updates_whole_pool: ClassVar[bool] = False
    host_overlap: ClassVar[Literal["async", "sync"]] = "sync"

    @property
    def block_tokens(self) -> int:
        return self.block_size_tokens

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        """On a CPU launches are part of what Ops take, and its profile says that they cost nothing beside."""
        return (HostWork("torch_decoder", "step", batch),), (HostWork("torch_decoder", "eager_launch", num_launches),), ()

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        logits = _LOGIT_BYTES * self.max_num_seqs * model.vocab_size
        tokens = self.max_num_batched_tokens
        return (MemoryLine(ACTIVATIONS, forward_bytes(model, tp, tokens) + logits, f"a step of {tokens} tokens, and its logits"),)

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        return V1Scheduler(pool, plan, self.max_num_seqs, self.max_num_batched_tokens, reserve_full_prompt=True)
