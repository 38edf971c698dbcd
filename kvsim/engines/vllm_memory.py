"""Memory that vLLM's engines take beside weights and KV pool."""

from __future__ import annotations

from kvsim.engines.base import MemoryLine
from kvsim.model import Model
from kvsim.units import MIB

_NCCL_BYTES = 512 * MIB
"""NCCL channels and the custom all-reduce buffers of a tensor-parallel rank; assumed from engine logs (0.3-0.8 GiB)."""


def forward_bytes(model: Model, tp: int, num_tokens: int) -> int:
    """Peak of one layer's activations in 16 bits: residual, hidden, and the wider of MLP and attention intermediates."""
    inter = -(-model.intermediate_size // tp)
    mlp = (3 if model.gated_mlp else 2) * inter
    heads = (2 * model.q_heads_per_gpu(tp) + 2 * model.kv_heads_per_gpu(tp)) * model.head_dim
    return 2 * num_tokens * (2 * model.hidden_size + max(mlp, heads))


def reserved_bytes(model: Model, tp: int, weight_dtype: str, num_tokens: int) -> int:
    """What the allocator has reserved after a forward pass: every intermediate of a layer keeps a block of its own.

    fp8 weights: inputs of the GEMMs are quantised into buffers of a byte an element (vLLM's apply_fp8_linear), one as wide as
    the MLP and one as the hidden state, which the allocator hands out again.
    """
    inter = -(-model.intermediate_size // tp)
    mlp = (3 if model.gated_mlp else 2) * inter
    qkv = (model.q_heads_per_gpu(tp) + 2 * model.kv_heads_per_gpu(tp)) * model.head_dim
    attention = model.q_heads_per_gpu(tp) * model.head_dim
    quantised = inter + model.hidden_size if weight_dtype == "fp8" else 0
    return num_tokens * (2 * (3 * model.hidden_size + mlp + qkv + attention) + quantised)


def collective_line(tp: int) -> tuple[MemoryLine, ...]:
    if tp == 1:
        return ()
    return (MemoryLine("communication buffers", _NCCL_BYTES, "assumed: NCCL and custom all-reduce, 0.3-0.8 GiB in logs"),)
