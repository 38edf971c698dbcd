"""The Ops of a forward pass besides attention: what a model launches on one GPU for a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

from kvsim.model import Model
from kvsim.ops import Collective, Elementwise, Gemm, Op

ACTIVATION_BYTES = 2
"""Activations are 16 bit whatever the weights."""
LOGIT_BYTES = 4
"""Logits are sampled in fp32."""


def linear_ops(model: Model, tp: int, weight_dtype: str, num_tokens: int, eager: bool = False) -> Iterator[tuple[int, Op]]:
    """(times launched, Op) for all layers over `num_tokens` tokens: GEMMs, norms, rotary embedding, activation, all-reduces."""
    layers, hidden = model.num_layers, model.hidden_size
    for weight in model.gemms(tp):
        yield layers, Gemm(num_tokens, weight.n, weight.k, weight_dtype)
    row = num_tokens * hidden * ACTIVATION_BYTES
    # A norm with its residual addition reads the branch and the residual and writes both.
    yield layers * model.norms_per_layer, Elementwise("norm", 4 * row)
    heads = model.q_heads_per_gpu(tp) + 2 * model.kv_heads_per_gpu(tp)
    if model.qk_norm:  # over each head of queries, and of keys
        for normed in (model.q_heads_per_gpu(tp), model.kv_heads_per_gpu(tp)):
            yield layers, Elementwise("qk_norm", 2 * num_tokens * normed * model.head_dim * ACTIVATION_BYTES)
    rotate_and_store = 2 * num_tokens * heads * model.head_dim * ACTIVATION_BYTES
    yield layers, Elementwise("rope_and_kv_write", rotate_and_store)
    wide = num_tokens * -(-model.intermediate_size // tp) * ACTIVATION_BYTES
    yield layers, Elementwise("activation", (3 if model.gated_mlp else 2) * wide)
    yield 1, Elementwise("embedding", 2 * row)
    if tp > 1:
        # One after attention and one after the MLP; a model that runs both in parallel adds them first.
        yield layers * model.norms_per_layer, Collective("all_reduce", row, tp, eager)


def head_ops(model: Model, tp: int, num_sampled: int, eager: bool = False) -> Iterator[tuple[int, Op]]:
    """(times launched, Op) to turn the last hidden states of `num_sampled` sequences into tokens: lm_head, gather, sampler."""
    head = model.lm_head(tp)
    yield 1, Gemm(num_sampled, head.n, head.k, "bf16")  # quantised checkpoints keep the head in 16 bits
    if tp > 1:
        yield 1, Collective("all_gather", num_sampled * head.n * ACTIVATION_BYTES, tp, eager)
    # Cast to fp32, then two reads for softmax and argmax.
    yield 1, Elementwise("sampler", num_sampled * model.vocab_size * (ACTIVATION_BYTES + 3 * LOGIT_BYTES))


def num_launches_per_step(model: Model, tp: int) -> int:
    """Kernels a forward pass of one compiled engine launches: what a step without CUDA graphs pays host time for."""
    per_layer = len(model.gemms(tp)) + model.norms_per_layer + 3 + (model.norms_per_layer if tp > 1 else 0)
    per_layer += 2 * model.qk_norm
    return model.num_layers * per_layer + 6
