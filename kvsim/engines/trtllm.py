"""TensorRT-LLM's in-flight batching (PyTorch flow): context and generation requests in one iteration, nothing is ever evicted.

After its documentation ("Scheduler", "Overlap Scheduler") and `tensorrt_llm/_torch/pyexecutor`: the capacity scheduler admits a
request only when all it may ever hold is free beside what was promised to others (GUARANTEED_NO_EVICT); the micro-batch scheduler
takes generation requests first, then whole prompts while they fit max_num_tokens, or chunks of them. Context and generation
attention are separate launches; iterations without prompts replay CUDA graphs. With the overlap scheduler (`py_executor.py`,
_executor_loop_overlap) new requests are fetched, and an iteration is scheduled and launched, before the outputs of the one that
runs are awaited.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvsim.batch import Sequence
from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.scheduler import Scheduler
from kvsim.engines.vllm_memory import collective_line, forward_bytes
from kvsim.engines.vllm_v1 import V1Scheduler
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.model import Model
from kvsim.ops import HostWork
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool
from kvsim.requests import Request
from kvsim.units import GIB

_LOGIT_BYTES = 10
"""bf16 logits, an fp32 copy and probabilities of the sampler (TorchSampler)."""
_NON_TORCH_BYTES = int(0.5 * GIB)
"""cuBLAS and MPI workspaces, loaded kernels; assumed."""
_GRAPH_BYTES = int(0.5 * GIB)
"""Captured generation graphs; assumed, as for vLLM."""


class TensorRtLlm(Engine):
    """TensorRT-LLM with its PyTorch flow and in-flight batching."""

    kind: Literal["trtllm"] = "trtllm"
    max_batch_size: int = Field(2048, gt=0, description="most requests in an iteration")
    max_num_tokens: int = Field(8192, gt=0, description="most tokens computed in an iteration, prompts and generation")
    tokens_per_block: int = Field(32, gt=0, description="tokens of a KV block")
    num_gpu_blocks: int | None = Field(None, gt=0, description="the engine's own number of blocks, in place of the ledger's")
    chunked_context: bool = Field(False, description="enable_chunked_prefill: prompts may be split over iterations")
    capacity_policy: Literal["guaranteed_no_evict", "max_utilization"] = Field(
        "guaranteed_no_evict",
        description="admit what can run to its end, or whatever fits now and preempt (recompute) when it no longer does",
    )
    kv_cache_free_frac: float = Field(
        0.9, gt=0, le=1, description="free_gpu_memory_fraction: of what is free beside weights and activations, the KV pool's share"
    )
    gpu_memory_utilization: float = Field(1.0, gt=0, le=1, description="share of GPU memory the process may use")
    cuda_graph_max_batch_size: int = Field(128, gt=0, description="largest batch captured as a CUDA graph (cuda_graph_config)")
    overlap_scheduler: bool = Field(True, description="the host prepares an iteration while the device runs the one before")

    # CudaGraphConfig._generate_cuda_graph_batch_sizes with padding: 1, 2, 4, steps of 8 up to 128, then powers of two.
    capture_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, *range(8, 129, 8), *(2**i for i in range(8, 14)))
    captures_chunks: ClassVar[bool] = False
    mixes_attention: ClassVar[bool] = False
    rotation_passes: ClassVar[int] = 1
    """`invokeShiftKCache` of its attention operator, which reads the cached keys and writes rotated ones beside them."""
    command: ClassVar[str] = "trtllm-serve"
    stock_kv_dtypes: ClassVar[tuple[str, ...]] = ("auto", "bf16", "fp16", "fp8")
    serves: ClassVar[bool] = True
    kernels: ClassVar[str] = "trtllm"

    @property
    def block_tokens(self) -> int:
        return self.tokens_per_block

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        largest = self.cuda_graph_max_batch_size
        return (*(size for size in self.capture_sizes if size < largest), largest)

    def pool_bytes(self, free_gpu_bytes: int, model: Model) -> int:
        return int(self.kv_cache_free_frac * free_gpu_bytes)

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        work = [HostWork("trtllm", part, batch) for part in ("schedule", "prepare", "launch", "process")]
        if num_launches:
            work.append(HostWork("trtllm", "eager_launch", num_launches))
        if self.overlap_scheduler:
            return (), tuple(work), ()
        return tuple(work[:2]), (work[2], *work[4:]), (work[3],)

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        tokens = self.max_num_tokens
        logits = min(self.max_batch_size, tokens) * model.vocab_size * _LOGIT_BYTES
        return (
            MemoryLine(ACTIVATIONS, forward_bytes(model, tp, tokens) + logits, f"profile run at {tokens} tokens"),
            MemoryLine("non-torch memory", _NON_TORCH_BYTES, "assumed"),
            *collective_line(tp),
            MemoryLine("CUDA graphs", 0 if self.enforce_eager else _GRAPH_BYTES, "assumed; captured when the pool is there", True),
        )

    def flags(self, model: Model, tp: int) -> tuple[str, ...]:
        """Options of `trtllm-serve` 1.0 and later; what has none goes into the YAML file of --extra_llm_api_options."""
        max_tokens = "" if self.num_gpu_blocks is None else f", max_tokens: {self.num_gpu_blocks * self.tokens_per_block}"
        dtype = "fp8" if self.kv_cache_dtype == "fp8" else "auto"
        shared: tuple[str, ...] = ()
        if self.gpu_memory_utilization < 1:
            shared = ("# gpu_memory_utilization: lower the fraction until the log shows the KV pool of `kvsim show`",)
        graphs = "null" if self.enforce_eager else f"{{enable_padding: true, max_batch_size: {self.cuda_graph_max_batch_size}}}"
        return (
            "--backend pytorch", f"--tp_size {tp}", f"--max_batch_size {self.max_batch_size}",
            f"--max_num_tokens {self.max_num_tokens}", f"--max_seq_len {self.max_model_len or model.max_context_tokens}",
            "--extra_llm_api_options extra.yaml",
            f"# extra.yaml: kv_cache_config: {{tokens_per_block: {self.tokens_per_block}, dtype: {dtype}, "
            f"enable_block_reuse: false{max_tokens}}}",
            f"# extra.yaml: scheduler_config: {{capacity_scheduler_policy: {self.capacity_policy.upper()}}}",
            f"# extra.yaml: enable_chunked_prefill: {str(self.chunked_context).lower()}",
            f"# extra.yaml: disable_overlap_scheduler: {str(not self.overlap_scheduler).lower()}",
            f"# extra.yaml: cuda_graph_config: {graphs}",
            f"--kv_cache_free_gpu_memory_fraction {self.kv_cache_free_frac:g}",
            *shared,
            *self.fork_lines(),
        )  # fmt: skip

    def for_gpu(self, gpu: Gpu, tp: int) -> TensorRtLlm:
        if gpu.compute_capability is None:
            raise InputError("engine.kind", "trtllm", f"must be vllm_v1 or sglang on {gpu.name}", "TensorRT-LLM is for CUDA")
        return self

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        made = (
            V1Scheduler(pool, plan, self.max_batch_size, self.max_num_tokens, False, self.chunked_context)
            if self.capacity_policy == "max_utilization"
            else _NoEvictScheduler(self, pool, plan)
        )
        made.ahead = self.overlap_scheduler
        return made


class _NoEvictScheduler(V1Scheduler):
    """Admits a request only when what it may hold until its end is not promised to others."""

    def __init__(self, engine: TensorRtLlm, pool: BlockPool, plan: CachePlan) -> None:
        super().__init__(pool, plan, engine.max_batch_size, engine.max_num_tokens, False, engine.chunked_context)
        self.promised_units = 0
        self._peaks: dict[tuple[int, int], int] = {}

    def fits(self, sequence: Sequence, needed_units: int, free_units: int) -> bool:
        """Generation lengths are known to the engine as max_tokens, and here they are exactly that."""
        return self.promised_units + self._peak(sequence.request) <= self.pool.capacity_units and needed_units <= free_units

    def _peak(self, request: Request) -> int:
        key = (request.prompt_tokens, request.output_tokens)
        found = self._peaks.get(key)
        if found is None:
            found = self._peaks[key] = self.plan.peak_units(*key)
        return found

    def admit(self, sequence: Sequence, cached_tokens: int) -> None:
        super().admit(sequence, cached_tokens)
        self.promised_units += self._peak(sequence.request)

    def finish(self, sequence: Sequence) -> None:
        super().finish(sequence)
        self.promised_units -= self._peak(sequence.request)


