"""What FlexGen launches in a layer, counted in its pytorch_backend.py (mha, mha_gen, mlp, decompress): Ops, no time.

rows: tokens of one GPU batch that a launch computes. Lists are of one layer and one GPU batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kvsim.dtypes import BYTES_16_BIT
from kvsim.engines.flexgen import FlexGen
from kvsim.engines.flexgen_weights import LayerWeights
from kvsim.model import Model
from kvsim.ops import Copy, DecodeAttention, Elementwise, Gemm, Op, PolicyKernel
from kvsim.policies.compose import CachePlan

SCORE_BYTES = 12.0
"""Of one fp16 score in eager attention: written by a bmm, read and written by mask and softmax, read by the second bmm."""
WIDEN_BYTES = 9.0
"""Of one 4-bit element widened by decompress: packed read twice, bytes written, divided into fp16, the minimum added."""
COLUMN_SUM_BYTES = 2.0
"""A policy that wants all prompt queries' scores finds the score matrix there and reads it once more."""


def attention_linear_ops(model: Model, engine: FlexGen, weights: LayerWeights, rows: int, weight_dtype: str) -> list[Op]:
    """Projections apart for queries, keys and values, their rearrangement, and the residual."""
    row = rows * model.hidden_size * BYTES_16_BIT
    qkv, o = model.gemms(1)[:2]
    kv_width = model.num_kv_heads * model.head_dim
    matrices = [Gemm(rows, n, qkv.k, weight_dtype) for n in (qkv.n - 2 * kv_width, kv_width, kv_width)]
    return [
        Elementwise("norm", 4 * row), *matrices, Gemm(rows, o.n, o.k, weight_dtype), Elementwise("scale_and_permute", 4 * row),
        Elementwise("kv_write", 4 * rows * kv_width * BYTES_16_BIT), *_between(engine, row), *_widened(engine, weights),
    ]  # fmt: skip


def mlp_ops(model: Model, engine: FlexGen, weights: LayerWeights, rows: int, weight_dtype: str) -> list[Op]:
    row, wide = rows * model.hidden_size * BYTES_16_BIT, rows * model.intermediate_size * BYTES_16_BIT
    matrices = [Gemm(rows, w.n, w.k, weight_dtype) for w in model.gemms(1)[2:]]
    activation = Elementwise("activation", (3 if model.gated_mlp else 2) * wide)
    return [Elementwise("norm", 4 * row), *matrices, activation, *_between(engine, row), *_widened(engine, weights)]


def _widened(engine: FlexGen, weights: LayerWeights) -> list[Op]:
    return [PolicyKernel("widen_weights", WIDEN_BYTES * weights.elements, 0.0, 4, "engine")] if engine.compress_weight else []


def _between(engine: FlexGen, row_bytes: int) -> list[Op]:
    """Hidden states that wait elsewhere come and go on the compute stream."""
    return [Copy("host", row_bytes)] * 2 if engine.activations_on != "gpu" else []


def outer_ops(model: Model, rows: int, num_sampled: int, weight_dtype: str) -> list[Op]:
    """Embeddings at both ends; logits of every row, as opt_output_embed computes them."""
    row, head = rows * model.hidden_size * BYTES_16_BIT, model.lm_head(1)
    return [
        Elementwise("embedding", 2 * row), Elementwise("norm", 4 * row), Gemm(rows, head.n, head.k, weight_dtype),
        Elementwise("argmax", num_sampled * head.n * BYTES_16_BIT),
    ]  # fmt: skip


def decode_attention_ops(plan: CachePlan, op: DecodeAttention, gpu_frac: float) -> list[Op]:
    """The share of the cache that the GPU attends to: widened where it is compressed, then two bmm with eager scores between.

    op: the plan's attention over all of it.
    """
    slots = round(op.kv_slots * gpu_frac)
    dense = DecodeAttention(
        op.batch, op.q_heads, op.kv_heads, op.head_dim, slots, op.max_kv_tokens, plan.shape.slot_bytes, plan.kv_dtype, plan.layout
    )
    ops: list[Op] = [dense, PolicyKernel("score_matrix", SCORE_BYTES * slots * plan.shape.group, 0.0, 2, "engine")]
    if not plan.is_plain or plan.kv_format != plan.kv_dtype:
        ops.append(PolicyKernel("widen_cache", WIDEN_BYTES * slots * 2 * op.head_dim, 0.0, 8, "engine"))
    return ops


def prefill_attention_ops(model: Model, plan: CachePlan, batch: int, tokens: int, weight_dtype: str) -> list[Op]:
    """Two batched products over whole score matrices, mask and softmax between them; no causal half is saved."""
    rows, scores = batch * model.num_q_heads * tokens, float(batch * model.num_q_heads * tokens * tokens)
    ops: list[Op] = [
        Gemm(rows, tokens, model.head_dim, weight_dtype), Gemm(rows, model.head_dim, tokens, weight_dtype),
        Elementwise("mask", round(4 * scores) + batch * tokens * tokens), Elementwise("softmax", round(4 * scores)),
    ]  # fmt: skip
    return ops + list(_prompt_policy_ops(plan, batch, tokens, scores))


def _prompt_policy_ops(plan: CachePlan, batch: int, tokens: int, scores: float) -> Iterable[Op]:
    for op in plan.prefill_ops(tokens, 0):
        assert isinstance(op, PolicyKernel)
        if op.kernel == "prefill_scores":
            yield PolicyKernel("score_column_sums", COLUMN_SUM_BYTES * scores, 0.0, 1, "engine")
        else:  # of one sequence and all layers
            share = batch / plan.shape.num_layers
            yield replace(op, bytes_moved=op.bytes_moved * share, flops=op.flops * share, num_launches=1)
