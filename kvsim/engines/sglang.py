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

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from kvsim.batch import Sequence
from kvsim.cost_types import Chunk
from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.scheduler import Scheduler, Step
from kvsim.model import Model
from kvsim.ops import HostWork, Op
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool
from kvsim.requests import Request
from kvsim.sampling import RequestedSampling, Sampling, backend_on, by_clients, greedy_note, sampler_ops
from kvsim.units import GIB, MIB

if TYPE_CHECKING:
    from kvsim.hardware import Gpu

_INITIAL_RATIO, _LEAST_RATIO, _DECAY_STEPS = 0.7, 0.098, 600
"""SGLANG_INIT_NEW_TOKEN_RATIO 0.7, times SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR 0.14 at least, over 600 decode steps
(python/sglang/global_config.py)."""
_CLIP_TOKENS = 4096
"""CLIP_MAX_NEW_TOKENS_ESTIMATION: no request is thought to generate more than this when others are admitted."""
_CONTEXT_BYTES = int(0.5 * GIB)
"""0.4-0.6 GiB in nvidia-smi for an idle PyTorch process; assumed. model_runner.py takes the pool from the memory that is free after
the weights, less (1 - mem_fraction_static) of what was free before them, both beside the context."""


class _Defaults(NamedTuple):
    """below_gib: GPUs with less memory take these. graph_batch: of tensor_parallel below 4, and from 4 on."""

    below_gib: float
    prefill_tokens: int
    graph_batch: tuple[int, int]


_LARGE = _Defaults(90.0, 8192, (256, 512))
_BY_MEMORY = (
    _Defaults(20.0, 2048, (8, 8)), _Defaults(35.0, 2048, (24, 80)), _Defaults(60.0, 4096, (32, 160)), _LARGE,
    _Defaults(160.0, 8192, (256, 512)), _Defaults(float("inf"), 16384, (512, 512)),
)  # fmt: skip
"""ServerArgs._handle_gpu_memory_settings (python/sglang/srt/server_args.py, 0.5.5)."""


_PENALTY = (3,)
"""fp32 values per logit: what has gathered so far is applied to the logits in place, each penalty by itself (sampling/penaltylib)."""


class SgLang(Engine):
    """SGLang's runtime with overlap scheduling."""

    kind: Literal["sglang"] = "sglang"
    max_running_requests: int | None = Field(
        None, gt=0, description="most requests in a decode batch; default: 512 of the longest that the pool holds, 2048 to 4096"
    )
    chunked_prefill_size_tokens: int | None = Field(
        None, gt=0, description="most prompt tokens of a prefill batch; default: 2048 to 16384 by the GPU's memory"
    )
    cuda_graph_max_bs: int | None = Field(
        None, gt=0, description="largest batch captured as a CUDA graph; default: 24 to 512 by the GPU's memory and tensor_parallel"
    )
    page_size_tokens: int = Field(1, gt=0, description="tokens of a KV page")
    num_gpu_blocks: int | None = Field(None, gt=0, description="the engine's own number of pages, in place of the ledger's")
    gpu_memory_utilization: float = Field(
        1.0, gt=0, le=1, description="of GPU memory; mem_fraction_static follows from what the engine reserves"
    )
    overlap_schedule: bool = Field(True, description="the host prepares a batch while the device runs the one before")

    sampling: RequestedSampling = Sampling()
    sampling_backend: Literal["flashinfer", "pytorch"] = Field(
        "flashinfer", description="what searches for top-k and top-p; pytorch: a sort, priced as vLLM's, and what is taken where this is "
        "left out on another vendor's GPU"
    )

    capture_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
    captures_chunks: ClassVar[bool] = False
    mixes_attention: ClassVar[bool] = False
    command: ClassVar[str] = "python -m sglang.launch_server --model-path"
    stock_kv_dtypes: ClassVar[tuple[str, ...]] = ("auto", "bf16", "fp16", "fp8")
    serves: ClassVar[bool] = True
    kernels: ClassVar[str] = "sglang"

    @property
    def block_tokens(self) -> int:
        return self.page_size_tokens

    def for_gpu(self, gpu: Gpu, tp: int) -> SgLang:
        defaults = next(row for row in _BY_MEMORY if gpu.usable_bytes < row.below_gib * GIB)
        found = {"chunked_prefill_size_tokens": defaults.prefill_tokens, "cuda_graph_max_bs": defaults.graph_batch[tp >= 4]}
        update: dict[str, Any] = {name: value for name, value in found.items() if getattr(self, name) is None}
        is_said = "sampling_backend" in self.model_fields_set
        backend = backend_on(gpu, self.sampling_backend, ("pytorch",), is_said=is_said)
        if backend != self.sampling_backend:
            update["sampling_backend"] = backend
        return self.model_copy(update=update)

    @property
    def prefill_tokens(self) -> int:
        return self.chunked_prefill_size_tokens or _LARGE.prefill_tokens

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        largest = self.cuda_graph_max_bs or _LARGE.graph_batch[0]
        return (*(size for size in self.capture_sizes if size < largest), largest)

    def running_requests(self, pool_tokens: int, context_tokens: int) -> int:
        """Most requests in a decode batch (ModelRunner.init_memory_pool)."""
        return self.max_running_requests or min(max(int(pool_tokens / context_tokens * 512), 2048), 4096)

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        work = [HostWork("sglang", part, batch) for part in ("schedule", "prepare", "launch", "process")]
        if num_launches:
            work.append(HostWork("sglang", "eager_launch", num_launches))
        if self.overlap_schedule:
            return (), tuple(work), ()
        return tuple(work[:2]), (work[2], *work[4:]), (work[3],)

    def sampler_ops(self, rows: int, vocab_size: int, head_bytes: int) -> Iterable[Op]:
        penalties = _PENALTY * self.sampling.num_penalties
        return sampler_ops(self.sampling, self.sampling_backend, self.sampler_kernels, penalties, rows, vocab_size, head_bytes)

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        mib = 512 + 1.5 * max(self.prefill_tokens, 2048) + 2 * self.graph_sizes[-1] + 128 * tp
        note = "SGLang's own reckoning: 512 MiB, 1.5 MiB a token of a prefill batch, 2 MiB a captured batch size, 128 MiB a GPU"
        return (
            MemoryLine("CUDA context", _CONTEXT_BYTES, "assumed; SGLang reckons with what is free once it is there"),
            MemoryLine(ACTIVATIONS, int(mib * MIB), note),
        )

    def notes(self) -> tuple[str, ...]:
        return greedy_note(self.sampling)

    def flags(self, model: Model, tp: int) -> tuple[str, ...]:
        """Server arguments of SGLang 0.5 (docs.sglang.io, "Server Arguments")."""
        static = "# mem_fraction_static: left to SGLang, whose own reckoning is simulated"
        if self.gpu_memory_utilization < 1:
            static = "# gpu_memory_utilization: lower --mem-fraction-static until the log shows the KV pool of `kvsim show`"
        pages = self.num_gpu_blocks
        return (
            f"--tp-size {tp}", f"--context-length {self.max_model_len or model.max_context_tokens}",
            *(() if self.max_running_requests is None else (f"--max-running-requests {self.max_running_requests}",)),
            f"--chunked-prefill-size {self.prefill_tokens}",
            f"--page-size {self.page_size_tokens}", f"--kv-cache-dtype {'fp8_e4m3' if self.kv_cache_dtype == 'fp8' else 'auto'}",
            "--disable-radix-cache",
            *(() if pages is None else (f"--max-total-tokens {pages * self.page_size_tokens}",)),
            *(() if self.overlap_schedule else ("--disable-overlap-schedule",)),
            *(() if self.sampling_backend == "flashinfer" else (f"--sampling-backend {self.sampling_backend}",)),
            *((f"# clients must ask for: {by_clients(self.sampling)}",) if self.sampling.acts else ()),
            *(("--disable-cuda-graph",) if self.enforce_eager else (f"--cuda-graph-max-bs {self.graph_sizes[-1]}",)),
            static, *self.fork_lines(),
        )  # fmt: skip

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        pool_tokens = pool.capacity_units // plan.prefill_units_per_block * self.page_size_tokens
        made = _SgLangScheduler(self, pool, plan, self.running_requests(pool_tokens, self.max_model_len or model.max_context_tokens))
        made.ahead = self.overlap_schedule
        return made


class _SgLangScheduler(Scheduler):
    def __init__(self, engine: SgLang, pool: BlockPool, plan: CachePlan, max_running_requests: int) -> None:
        super().__init__(pool, plan, max_running_requests)
        self.chunk_tokens = engine.prefill_tokens
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
