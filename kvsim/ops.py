"""The vocabulary every room shares: an Op is pure data, a name and a shape.

A model lists the Ops of a step, a policy lists those it adds, an engine decides which are launched, a profile answers each
with seconds, and the report breaks time down by Op `kind`. Heads, channels and weights are always *per GPU*; an Op is one
launch on one layer unless it says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Gemm:
    """``[m, k] @ [k, n]`` with weights stored in `weight_dtype` (activations 16 bit unless both sides are 8 bit)."""

    kind: ClassVar[str] = "gemm"
    m: int
    n: int
    k: int
    weight_dtype: str


@dataclass(frozen=True, slots=True)
class PrefillAttention:
    """Causal attention of `new_tokens` queries over themselves and `prior_tokens` of cache, one layer.

    num_sequences: equal sequences in one launch; simulations launch one at a time. stored: format of the prior tokens, where an engine
    widens them in the same launch.
    """

    kind: ClassVar[str] = "prefill_attention"
    new_tokens: int
    prior_tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    num_sequences: int = 1
    stored: str = ""

    @property
    def flops(self) -> float:
        """QKᵀ and PV over the causal half of the new block and all of the prior cache."""
        pairs = self.new_tokens * self.prior_tokens + self.new_tokens * (self.new_tokens + 1) / 2
        return 4.0 * self.num_sequences * self.q_heads * self.head_dim * pairs


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """One query token per sequence over the cache, one layer.

    kv_slots: (token, KV head) pairs read, summed over sequences and heads, so per-head lengths need no special case.
    max_kv_tokens: the longest (sequence, head). slot_bytes: K and V bytes of one slot, scales included.
    kv_format: element format of the cache ("bf16", "fp8", "int4", "kivi2", "bf16+think80", ...). layout: "paged"|"contiguous", or a way of
    attending that an engine takes under some policies, whose launches have tables of their own.
    """

    kind: ClassVar[str] = "decode_attention"
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    kv_slots: int
    max_kv_tokens: int
    slot_bytes: float
    kv_format: str = "bf16"
    layout: str = "paged"

    @property
    def bytes_moved(self) -> float:
        """The cache once, plus queries and outputs in 16 bits."""
        return self.kv_slots * self.slot_bytes + 4.0 * self.batch * self.q_heads * self.head_dim

    @property
    def flops(self) -> float:
        return 4.0 * self.kv_slots * self.head_dim * self.q_heads / self.kv_heads


@dataclass(frozen=True, slots=True)
class MixedAttention:
    """A prefill chunk and a decode batch in one launch, one layer: not the sum of the two (docs/design.md)."""

    kind: ClassVar[str] = "mixed_attention"
    prefill: PrefillAttention
    decode: DecodeAttention


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Norms, rotary embedding, activation functions, residual additions: bound by `bytes_moved`."""

    kind: ClassVar[str] = "elementwise"
    name: str
    bytes_moved: int


@dataclass(frozen=True, slots=True)
class LogitFilter:
    """Top-k, top-p or both over each of `rows` rows of `vocab_size` fp32 logits.

    library: "pytorch", which sorts every row; "triton", vLLM's search for a threshold; "flashinfer", which also draws the token.
    which: "top_k", "top_p" or "top_k_top_p".
    """

    kind: ClassVar[str] = "sampling"
    library: str
    which: str
    rows: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Collective:
    """`name` is "all_reduce" or "all_gather"; message_bytes per rank over num_gpus in one node. eager: outside a CUDA graph."""

    kind: ClassVar[str] = "collective"
    name: str
    message_bytes: int
    num_gpus: int
    eager: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes over a link: "hbm" (device to device, read and written once each) or "host" (PCIe or NVLink-C2C, one direction)."""

    kind: ClassVar[str] = "copy"
    link: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PolicyKernel:
    """A compression kernel (`kernels/` holds the real ones): bytes and FLOPs of `num_launches` launches together.

    owner: "policy", or "engine" for what an engine does to its cache whatever the policy (concatenation, beam reorder).
    variant: which of a kernel's statistics, where they differ in more than bytes: drawing noise takes longer than adding up.
    dependent_loads: loads of which each waits for the one before, as where a single thread walks a list.
    """

    kind: ClassVar[str] = "policy"
    kernel: str
    bytes_moved: float
    flops: float = 0.0
    num_launches: int = 1
    owner: str = "policy"
    variant: str = ""
    dependent_loads: float = 0.0


@dataclass(frozen=True, slots=True)
class HostWork:
    """Time on the CPU per engine step: scheduling, input preparation, sampling, output processing.

    variant: what policies make of the part, where that is measured apart.
    """

    kind: ClassVar[str] = "host"
    engine: str
    part: str
    batch: int
    variant: str = ""


Op = (
    Gemm | PrefillAttention | DecodeAttention | MixedAttention | Elementwise | LogitFilter | Collective | Copy | PolicyKernel | HostWork
)
"""Any Op. `kind` names the row of the report in which its time appears."""
