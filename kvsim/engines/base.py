"""What an engine is to the simulator: data (limits, captured graph sizes, host work, memory habits) and a scheduler.

An engine is a frozen pydantic model, one file each, listed in `kvsim/engines/__init__.py`; its fields are the
scenario's `engine:` block. The scheduler is a small class over the engine's state that picks what the next step computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from kvsim.forward import SAMPLER_KERNELS, num_launches_per_step
from kvsim.frozen import Frozen
from kvsim.model import Model
from kvsim.ops import HostWork, Op
from kvsim.policies.base import CacheShape
from kvsim.sampling import passes
from kvsim.workload_fields import Number

if TYPE_CHECKING:
    from kvsim.engines.scheduler import Scheduler
    from kvsim.hardware import Gpu
    from kvsim.policies.compose import CachePlan, Composition
    from kvsim.pool import BlockPool

KvCacheDtype = Literal["auto", "fp32", "fp16", "bf16", "fp8", "int8"]


ACTIVATIONS = "activation peak"
"""Name of the ledger line that policies' buffers share."""


FRONT_END_S = 0.005
"""Of a server. Fitted on the `calibrate` groups of serving on H100s (`kvsim validate silicon`) under vLLM, TensorRT-LLM and SGLang at
once: 2 to 7 ms do alike, 1 and 10 ms are worse for one of them."""


class MemoryLine(NamedTuple):
    """A line of the memory ledger: bytes per GPU. outside: taken from what gpu_memory_utilization leaves."""

    name: str
    num_bytes: int
    note: str
    outside: bool = False


class Engine(Frozen):
    """Base of every engine."""

    kv_cache_dtype: KvCacheDtype = Field("auto", description="element type of the cache; auto: as the activations")
    max_model_len: int | None = Field(None, gt=0, description="longest prompt + output; default: the model's context")
    per_head_kv: bool = Field(
        False, description="models a fork with a block table for each KV head, as KV-Compress built on vLLM 0.6"
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of GPU memory the engine may use")
    enforce_eager: bool = Field(False, description="no CUDA graphs: every kernel is launched from the host")
    front_end_s: Number | None = Field(
        None, ge=0, le=60,
        description="from a request's sending until the scheduler can see it: HTTP, tokenisation, queues between processes; default: "
        f"{FRONT_END_S:g} before a server, 0 before what a program calls (huggingface, flexgen, torch_decoder)",
    )  # fmt: skip
    policy_stream: Literal["inline", "side"] = Field(
        "inline", description="where prompts are compressed: in the step, or on a side stream that shares HBM bandwidth"
    )
    side_stream_hbm_frac: float = Field(
        0.5, gt=0, lt=1, description="HBM bandwidth a busy side stream takes; two streams that both saturate it share alike"
    )

    kernels: ClassVar[str] = "vllm"
    """Whose kernels it launches, as measured profiles name them."""
    serves: ClassVar[bool] = False
    """Requests come over HTTP, through a front end in a process of its own."""
    command: ClassVar[str] = ""
    """What starts a server, the model's path after it; "" where there is none."""
    stock_kv_dtypes: ClassVar[tuple[str, ...]] = ("auto",)
    """Values of kv_cache_dtype that the released engine takes; auto is as the activations."""
    layout: ClassVar[str] = "paged"
    mixes_attention: ClassVar[bool] = True
    """Prompt chunks and decodes share one attention launch."""
    sampler_kernels: ClassVar[tuple[int, ...]] = SAMPLER_KERNELS
    """fp32 values per logit that each kernel of its sampler reads or writes, greedy where engines know more than one way."""
    rotation_passes: ClassVar[int] = 0
    """How often all cached rotary keys are read and written again in a step where a policy moves their positions; 0: attention rotates
    keys as it reads them (FlashInfer's ROPE_LLAMA does), or turns the query in their place, as kvsim's decoder does."""
    captures_chunks: ClassVar[bool] = True
    """Steps that compute prompt chunks replay graphs too, where they are small enough; False: steps that only decode."""
    updates_whole_pool: ClassVar[bool] = True
    """KV-Compress's metrics are updated over the whole block pool in every step, as in its fork of vLLM."""
    host_overlap: ClassVar[Literal["async", "sync"]] = "async"
    """async: the host prepares the next step while the device runs; sync: schedule + max(launch, device) + sample."""
    offloads: ClassVar[bool] = False
    """Weights or cache may live outside the GPU: `kvsim.offload` says what its steps cost."""
    capture_sizes: ClassVar[tuple[int, ...]] = ()
    """Batch sizes captured as CUDA graphs, ascending; a batch is padded to the next one."""

    @property
    def front_end_delay_s(self) -> float:
        """front_end_s, or the engine's default."""
        return (FRONT_END_S if self.serves else 0.0) if self.front_end_s is None else self.front_end_s

    @property
    def block_tokens(self) -> int:
        """Tokens per block of the KV pool."""
        raise NotImplementedError

    def kv_dtype(self, activation_dtype: str = "bf16") -> str:
        return activation_dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    # -- launches and host work -----------------------------------------------------------------------------------

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """`capture_sizes` as this engine's fields have them."""
        return self.capture_sizes

    @property
    def captured_tokens(self) -> int:
        """The most tokens of a step that replays a CUDA graph; 0 where none is captured."""
        return 0 if self.enforce_eager or not self.graph_sizes else self.graph_sizes[-1]

    def captured(self, num_tokens: int) -> bool:
        """Whether a step over so many tokens replays a CUDA graph."""
        return num_tokens <= self.captured_tokens

    def for_gpu(self, gpu: Gpu, tp: int) -> Engine:
        """The engine with the defaults that it takes by what it runs on."""
        return self

    def for_plan(self, plan: CachePlan) -> Engine:
        """The engine as it runs this composition of policies: one that some of them keep from replaying graphs runs eagerly."""
        return self

    def attention_layout(self, composition: Composition) -> str:
        """`layout` of decode attention under these policies."""
        return self.layout

    def chunk_format(self, plan: CachePlan) -> str:
        """`stored` of a prompt's chunks: the cache's format, where they widen it themselves."""
        return ""

    def one_by_one(self, plan: CachePlan) -> frozenset[str]:
        """Policies' kernels that are launched for one sequence of the decoding batch after the other."""
        return frozenset()

    def padded(self, num_tokens: int) -> int:
        """Tokens that linear Ops compute: the next captured size, or the true number where none is captured."""
        if not self.captured(num_tokens):
            return num_tokens
        return next(size for size in self.graph_sizes if size >= num_tokens)

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        """(before, beside, after): host work before the device starts, while it runs, and after it has ended.

        batch: sequences that get a token. num_launches: kernels launched one by one; 0 where a graph is replayed.
        """
        raise NotImplementedError

    def cache_ops(self, plan: CachePlan, batch: int, cache_bytes: float, num_slots: float, num_layers: int) -> Sequence[Op]:
        """What the engine itself does to the cache in a decode step, beside attention.

        cache_bytes: stored over those layers. num_slots: (token, layer, KV head) triples that they hold.
        """
        return ()

    def prompt_ops(self, shape: CacheShape, new_tokens: int, prior_tokens: int) -> Sequence[Op]:
        """What it launches beside attention for a prompt chunk of one sequence, in all layers."""
        return ()

    def sampler_ops(self, rows: int, vocab_size: int, head_bytes: int) -> Iterable[Op]:
        """What turns so many rows of logits into tokens. head_bytes: of an element of the head's output."""
        return passes(self.sampler_kernels, rows, vocab_size, head_bytes)

    def unfused_ops(self, model: Model, tp: int, weight_dtype: str, num_tokens: int) -> Iterable[tuple[int, Op]]:
        """(times launched, Op) of a forward pass beyond those of `kvsim.forward.linear_ops`, whose kernels are fused."""
        return ()

    # -- memory ---------------------------------------------------------------------------------------------------

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        """Everything in GPU memory but weights, policies and the pool itself."""
        raise NotImplementedError

    @property
    def cache_fracs(self) -> tuple[float, float, float]:
        """Of the cache on GPU, in host memory and on disk."""
        return 1.0, 0.0, 0.0

    def gpu_weight_bytes(self, model: Model, tp: int, weight_dtype: str) -> int:
        """Weights that stay on each GPU."""
        return round(model.weight_bytes(weight_dtype, tp))

    def pool_bytes(self, free_gpu_bytes: int, model: Model) -> int:
        """The cache, wherever it lives, that an engine has with so much GPU memory left."""
        return free_gpu_bytes

    def num_launches(self, model: Model, tp: int, weight_dtype: str) -> int:
        """Kernels of one forward pass."""
        return num_launches_per_step(model, tp, weight_dtype)

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        """A scheduler with an empty queue over this pool."""
        raise NotImplementedError

    @property
    def ignores_positions(self) -> bool:
        """Sequences may be longer than the model's context: positions are left out, and answers are nonsense."""
        return False

    def check(self, model: Model, tp: int) -> None:
        """Raises InputError where the fields contradict each other or the model."""

    def flags(self, model: Model, tp: int) -> tuple[str, ...]:
        """Options of `command` that make a released engine run as it was simulated; what has no option is a line "# ..."."""
        return ()

    def fork_lines(self) -> tuple[str, ...]:
        """Comment lines for settings that no released engine has."""
        lines = []
        if self.per_head_kv and self.layout == "paged":
            lines.append("# per_head_kv: takes a fork with a block table for each KV head")
        if self.policy_stream == "side":
            lines.append("# policy_stream side: takes a fork that compresses on a stream of its own")
        if self.kv_cache_dtype not in self.stock_kv_dtypes:
            lines.append(f"# kv_cache_dtype {self.kv_cache_dtype}: no option of the released engine")
        return tuple(lines)

    def notes(self) -> tuple[str, ...]:
        return ()
