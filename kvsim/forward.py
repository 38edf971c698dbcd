"""The Ops of a forward pass besides attention: what a model launches on one GPU for a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

from kvsim.dtypes import activation_bytes, activation_dtype
from kvsim.model import Model
from kvsim.ops import Collective, Elementwise, Gemm, Op

SAMPLER_KERNELS = (3,)
"""fp32 values that each kernel of a greedy sampler reads or writes per logit: one cast, then two reads for softmax and argmax."""

QUANTISED_ACTIVATIONS = ("fp8", "int8")
"""Weights before whose products activations are quantised, by a kernel of its own; tables of such products hold its time."""


def linear_ops(model: Model, tp: int, weight_dtype: str, num_tokens: int, eager: bool = False) -> Iterator[tuple[int, Op]]:
    """(times launched, Op) for all layers over `num_tokens` tokens: GEMMs, norms, rotary embedding, activation, all-reduces."""
    layers, hidden, size = model.num_layers, model.hidden_size, activation_bytes(weight_dtype)
    for weight in model.gemms(tp):
        yield layers, Gemm(num_tokens, weight.n, weight.k, weight_dtype)
    row = num_tokens * hidden * size
    # A norm with its residual addition reads the branch and the residual and writes both.
    yield layers * model.norms_per_layer, Elementwise("norm", 4 * row)
    heads = model.q_heads_per_gpu(tp) + 2 * model.kv_heads_per_gpu(tp)
    if model.qk_norm:  # over each head of queries, and of keys
        for normed in (model.q_heads_per_gpu(tp), model.kv_heads_per_gpu(tp)):
            yield layers, Elementwise("qk_norm", 2 * num_tokens * normed * model.head_dim * size)
    rotate_and_store = 2 * num_tokens * heads * model.head_dim * size
    yield layers, Elementwise("rope_and_kv_write", rotate_and_store)
    wide = num_tokens * -(-model.intermediate_size // tp) * size
    yield layers, Elementwise("activation", (3 if model.gated_mlp else 2) * wide)
    yield 1, Elementwise("embedding", 2 * row)
    if tp > 1:
        # One after attention and one after the MLP; a model that runs both in parallel adds them first.
        yield layers * model.norms_per_layer, Collective("all_reduce", row, tp, eager)


def head_ops(model: Model, tp: int, num_sampled: int, eager: bool = False, weight_dtype: str = "bf16") -> Iterator[tuple[int, Op]]:
    """(times launched, Op) to turn the last hidden states of `num_sampled` sequences into logits on every GPU: lm_head, gather."""
    head = model.lm_head(tp)
    # Quantised checkpoints keep the head in 16 bits.
    yield 1, Gemm(num_sampled, head.n, head.k, "fp32" if activation_dtype(weight_dtype) == "fp32" else "bf16")
    if tp > 1:
        yield 1, Collective("all_gather", num_sampled * head.n * activation_bytes(weight_dtype), tp, eager)


def num_launches_per_step(model: Model, tp: int, weight_dtype: str) -> int:
    """Kernels a forward pass of one compiled engine launches: what a step without CUDA graphs pays host time for."""
    per_layer = len(model.gemms(tp)) + model.norms_per_layer + 3 + (model.norms_per_layer if tp > 1 else 0)
    per_layer += 2 * model.qk_norm
    if weight_dtype in QUANTISED_ACTIVATIONS:
        per_layer += len(model.gemms(tp))
    return model.num_layers * per_layer + 6
