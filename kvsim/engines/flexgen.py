"""FlexGen (arXiv 2303.06865): blocks of equal requests, weights, cache and activations split over GPU, host memory and disk.

After flexgen/flex_opt.py and pytorch_backend.py of github.com/FMInference/FlexGen, and the fork h2o_flexgen of
github.com/FMInference/H2O. A block is `num_gpu_batches` GPU batches of `gpu_batch_size` prompts, padded alike. For every token and
layer the GPU batches follow one another (zig-zag), so that weights loaded once serve all of them; with `overlap` the next
weights and caches load while a GPU batch computes, and both are waited for. What a step costs is in `kvsim/offload.py`.
FlexGen's --compress-cache is the policy {kind: kv_quant, dtype: int4}, its fork's --hh-ratio {kind: h2o, variant: flexgen}.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvsim.cost_types import Chunk
from kvsim.engines.base import ACTIVATIONS, Engine, MemoryLine
from kvsim.engines.flexgen_weights import LayerWeights, placed
from kvsim.engines.scheduler import Scheduler, Step
from kvsim.errors import DoesNotFitError, InputError
from kvsim.model import Model
from kvsim.ops import HostWork
from kvsim.policies.compose import CachePlan
from kvsim.pool import BlockPool
from kvsim.units import GIB, format_bytes

CONTEXT = "CUDA context"
_CONTEXT_BYTES = int(0.5 * GIB)
"""CUDA context and cuBLAS workspaces of a PyTorch process; 0.4-0.6 GiB in nvidia-smi for an idle process; assumed."""
_ATTENTION_LAUNCHES, _MLP_LAUNCHES, _OUTER_LAUNCHES = 14, 5, 9
"""Kernels of mha_gen (norm, four linears, scaling, two cache writes, two bmm, mask, softmax, residual), of mlp and of both embeddings."""
_POLICY_LAUNCHES = 12
"""What the H2O fork adds to a layer: scores added (2), argmin, and three replacements of clone, scatter and copy each."""


class FlexGen(Engine):
    """FlexGen's offline block schedule with offloading."""

    kind: Literal["flexgen"] = "flexgen"
    gpu_batch_size: int = Field(4, gt=0, description="prompts that one launch computes (--gpu-batch-size)")
    num_gpu_batches: int = Field(1, gt=0, description="GPU batches of a block (--num-gpu-batches)")
    prompt_tokens: int = Field(512, gt=0, description="length that prompts are padded to (--prompt-len)")
    weight_gpu_frac: float = Field(1.0, ge=0, le=1, description="share of weights on the GPU (--percent, 1st)")
    weight_cpu_frac: float = Field(0.0, ge=0, le=1, description="share of weights in host memory (2nd); the rest lies on disk")
    cache_gpu_frac: float = Field(1.0, ge=0, le=1, description="share of the cache on the GPU (3rd)")
    cache_cpu_frac: float = Field(0.0, ge=0, le=1, description="share of the cache in host memory (4th); the rest lies on disk")
    activations_on: Literal["gpu", "cpu", "disk"] = Field("gpu", description="where hidden states wait between layers (5th and 6th)")
    compress_weight: bool = Field(False, description="weights in 4 bits, groups of 64, widened before each use (--compress-weight)")
    cpu_cache_compute: bool = Field(False, description="attention over what is not on the GPU runs on the CPU (--cpu-cache-compute)")
    overlap: bool = Field(True, description="transfers run beside compute (--overlap)")
    long_sequences: bool = Field(
        False, description="no position embedding, so that max_model_len may exceed the model's context (--hh-long-seq)"
    )
    host_memory_gib: float = Field(208.0, gt=0, description="host memory; default: the machine of FlexGen's paper")
    host_memory_gb_per_s: float = Field(
        100.0, gt=0, description="what CPU attention reaches of host memory; assumed: 0.8 of six channels of DDR4-2666"
    )
    disk_gib: float = Field(1500.0, gt=0, description="disk space; default: the machine of FlexGen's paper")
    disk_read_gb_per_s: float = Field(2.0, gt=0, description="disk to host; default: the SSD of FlexGen's paper")
    disk_write_gb_per_s: float = Field(1.0, gt=0, description="host to disk; default: the SSD of FlexGen's paper")
    gpu_memory_utilization: float = Field(1.0, gt=0, le=1, description="share of GPU memory the process may use")

    kernels: ClassVar[str] = "torch"
    layout: ClassVar[str] = "contiguous"
    mixes_attention: ClassVar[bool] = False
    offloads: ClassVar[bool] = True

    @model_validator(mode="after")
    def _shares_add_up(self) -> FlexGen:
        for name in ("weight", "cache"):
            on_gpu, in_host = getattr(self, f"{name}_gpu_frac"), getattr(self, f"{name}_cpu_frac")
            if on_gpu + in_host > 1 + 1e-9:
                raise ValueError(f"must have {name}_gpu_frac={on_gpu:g} + {name}_cpu_frac={in_host:g} at most 1; try lowering one")
        return self

    @property
    def block_tokens(self) -> int:
        return 1

    @property
    def cache_fracs(self) -> tuple[float, float, float]:
        return self.cache_gpu_frac, self.cache_cpu_frac, max(0.0, 1.0 - self.cache_gpu_frac - self.cache_cpu_frac)

    @property
    def ignores_positions(self) -> bool:
        return self.long_sequences

    def gpu_batches(self, num_sequences: int) -> tuple[int, int]:
        """(number, size) of the GPU batches that so many sequences are computed in."""
        number = -(-num_sequences // self.gpu_batch_size)
        return number, -(-num_sequences // number)

    def check(self, model: Model, tp: int) -> None:
        if tp != 1:
            raise InputError("tensor_parallel", tp, "must be 1 under flexgen", "it offloads in place of splitting")
        if self.kv_cache_dtype in ("fp8", "int8"):
            raise InputError(
                "engine.kv_cache_dtype", self.kv_cache_dtype, "must be a 16-bit type under flexgen",
                "its 4-bit cache is the policy {kind: kv_quant, dtype: int4}",
            )  # fmt: skip

    # -- weights --------------------------------------------------------------------------------------------------

    def layer_weights(self, model: Model) -> tuple[LayerWeights, LayerWeights]:
        """Of attention and of the MLP."""
        qkv, o, *mlp = model.gemms(1)
        kv_width = model.num_kv_heads * model.head_dim
        rows = (qkv.n - 2 * kv_width, kv_width, kv_width)
        return self._placed([n * qkv.k for n in rows] + [o.n * o.k]), self._placed([w.n * w.k for w in mlp])

    def outer_weights(self, model: Model) -> tuple[LayerWeights, LayerWeights]:
        """Of the input embedding and of the output one, which FlexGen keeps apart even where a checkpoint ties them."""
        table = model.vocab_size * model.hidden_size
        return self._placed([table, model.num_learned_positions * model.hidden_size]), self._placed([table])

    def _placed(self, sizes: SequenceOf[int]) -> LayerWeights:
        return placed(sizes, self.weight_gpu_frac, self.weight_cpu_frac, self.compress_weight)

    def _everything(self, model: Model) -> list[tuple[int, LayerWeights]]:
        """(how many alike, weights)."""
        return [*((model.num_layers, w) for w in self.layer_weights(model)), *((1, w) for w in self.outer_weights(model))]

    # -- memory ---------------------------------------------------------------------------------------------------

    def gpu_weight_bytes(self, model: Model, tp: int, weight_dtype: str) -> int:
        """Matrices that live on the GPU; norms and biases always do."""
        if weight_dtype not in ("fp16", "bf16"):
            fix = "set engine.compress_weight: true for 4 bits"
            raise InputError("weight_dtype", weight_dtype, "must be fp16 or bf16 under flexgen", fix)
        vectors = model.weight_bytes("fp16") - 2 * sum(n * w.elements for n, w in self._everything(model))
        vectors += 2 * model.vocab_size * model.hidden_size if model.tied_embeddings else 0
        return round(sum(n * w.gpu_bytes for n, w in self._everything(model)) + vectors)

    def memory_lines(self, model: Model, tp: int, weight_dtype: str) -> tuple[MemoryLine, ...]:
        attention, mlp = self.layer_weights(model)
        streamed = sum(w.cpu_bytes + w.disk_bytes for w in (attention, mlp))
        # Two layers are in flight: one computes while the next is loaded.
        buffers = streamed + (2 * max(attention.elements, mlp.elements) if self.compress_weight else 0)
        return (
            MemoryLine(CONTEXT, _CONTEXT_BYTES, "assumed: 0.4-0.6 GiB for a PyTorch process"),
            MemoryLine("weight buffers", round(buffers), "two layers being loaded, and a layer widened to 16 bits"),
            MemoryLine(ACTIVATIONS, self._activation_bytes(model), self._activation_note()),
        )

    def _activation_note(self) -> str:
        return f"prefill of {self.gpu_batch_size} x {self.prompt_tokens} tokens: two fp16 score matrices, or the widest MLP or logits"

    def _activation_bytes(self, model: Model) -> int:
        """Tensors alive at once in mha, mlp and opt_output_embed, counted in the code."""
        batch, tokens = self.gpu_batch_size, self.prompt_tokens
        hidden = 2 * batch * tokens * model.hidden_size
        scores = 2 * batch * model.num_q_heads * tokens * tokens
        masks = (batch + 1) * tokens * tokens
        wide = 2 * batch * tokens * model.intermediate_size * (2 if model.gated_mlp else 1)
        logits = 2 * batch * tokens * model.vocab_size
        # With overlap the next GPU batch's hidden states are there already, the last one's and its K and V not yet gone.
        moving = 4 * hidden if self.overlap and self.num_gpu_batches > 1 else 0
        return max(2 * scores + 5 * hidden + masks, wide + 2 * hidden, logits + 2 * hidden) + moving

    def pool_bytes(self, free_gpu_bytes: int, model: Model) -> int:
        """The cache that the three devices hold together, each its share of it; a GPU too small for the rest has none."""
        if free_gpu_bytes < 0:
            return free_gpu_bytes
        weights = [n * (w.cpu_bytes, w.disk_bytes)[i] for i in (0, 1) for n, w in self._everything(model)]
        half = len(weights) // 2
        free = (
            free_gpu_bytes, self.host_memory_gib * GIB - sum(weights[:half]), self.disk_gib * GIB - sum(weights[half:]),
        )  # fmt: skip
        return int(min(room / share for room, share in zip(free, self.cache_fracs, strict=True) if share > 1e-9))

    # -- launches -------------------------------------------------------------------------------------------------

    def num_launches(self, model: Model, tp: int, weight_dtype: str) -> int:
        """Of one GPU batch in a decode step."""
        return model.num_layers * (_ATTENTION_LAUNCHES + _MLP_LAUNCHES) + _OUTER_LAUNCHES

    def policy_launches(self, model: Model) -> int:
        """Of one GPU batch in a decode step in which a policy keeps scores."""
        return model.num_layers * _POLICY_LAUNCHES

    def host_ops(self, batch: int, num_launches: int) -> tuple[tuple[HostWork, ...], ...]:
        """Eager PyTorch, as under Hugging Face."""
        return (), (HostWork("huggingface", "launch", num_launches * self.gpu_batches(max(batch, 1))[0]),), ()

    def scheduler(self, pool: BlockPool, plan: CachePlan, model: Model) -> Scheduler:
        if self.cpu_cache_compute and plan.kv_format != plan.kv_dtype:
            raise InputError(
                "engine.cpu_cache_compute", True, "must be false where the cache is stored in another format than 16 bits",
                "FlexGen widens a compressed cache on the GPU",
            )  # fmt: skip
        return _BlockScheduler(self, pool, plan)

    def notes(self) -> tuple[str, ...]:
        return (
            "static blocks: prompts are padded to engine.prompt_tokens, everyone is answered when the longest output is done",
            "FlexGen waits for the GPU after every half layer; launches are taken to hide behind it all the same",
            *(("host memory is taken as pinned: FlexGen's unpinned caches cross the link more slowly",) if self.cache_gpu_frac < 1 else ()),
        )  # fmt: skip


class _BlockScheduler(Scheduler):
    """One block at a time; its cache is allocated as a whole, at its final size, before the prompts are computed."""

    def __init__(self, engine: FlexGen, pool: BlockPool, plan: CachePlan) -> None:
        super().__init__(pool, plan, engine.gpu_batch_size * engine.num_gpu_batches)
        self.engine = engine

    def pick(self) -> Step | None:
        if self.batch.size:
            return Step([], True, self.decode_horizon(), False)
        if not self.waiting:
            return None
        members = [self.waiting[i] for i in range(min(self.max_num_seqs, len(self.waiting)))]
        prompt, output = self.engine.prompt_tokens, max(sequence.request.output_tokens for sequence in members)
        for sequence in members:
            if sequence.request.prompt_tokens > prompt:
                raise InputError(
                    "engine.prompt_tokens", prompt,
                    f"must be at least the longest prompt; request {sequence.request.index} has {sequence.request.prompt_tokens} tokens",
                    f"try {sequence.request.prompt_tokens}",
                )  # fmt: skip
            sequence.prompt_tokens = sequence.prefill_tokens = prompt
            sequence.output_tokens = output
        units = self.plan.peak_units(prompt, output, whole_prompt=False)
        if len(members) * units > self.pool.capacity_units:
            have, need = (n * self.plan.unit_bytes for n in (self.pool.capacity_units, len(members) * units))
            raise DoesNotFitError(
                f"a block of {len(members)} requests runs out of memory: the cache of {prompt} + {output} tokens needs "
                f"{format_bytes(need)}, {format_bytes(have)} are free where engine.cache_gpu_frac and cache_cpu_frac put it; "
                "lower gpu_batch_size or num_gpu_batches, or move more of the cache off the GPU"
            )
        for sequence in members:
            self.admit(sequence, 0)
            self.pool.take(units)
            sequence.held_units = units
        return Step([(sequence, Chunk(prompt, 0)) for sequence in members], False, 1, False)
