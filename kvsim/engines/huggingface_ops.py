"""What transformers launches that a compiled engine fuses or does not do, counted in its code: Ops, no time.

`modeling_llama.py` (LlamaRMSNorm, apply_rotary_pos_emb, LlamaMLP, repeat_kv, eager_attention_forward) and `cache_utils.py`
(DynamicCache, QuantizedCache). Passes are reads and writes of the tensor in 16 bits; fp32 counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvsim.dtypes import activation_bytes
from kvsim.model import Model
from kvsim.ops import Elementwise, Op, PolicyKernel
from kvsim.policies.base import CacheShape
from kvsim.policies.compose import CachePlan

RMS_NORM_PASSES = 18
"""To fp32 1+2, squares 2+2, mean 2, times the root 2+2, to 16 bits 2+1, times the weight 1+1."""
LAYER_NORM_PASSES = 2
"""torch's own kernel."""
RESIDUAL_PASSES = 3
ROTARY_PASSES = 10
"""x·cos 1+1, rotate_half: negation of a half ½+½ and concatenation 1+1, times sin 1+1, sum 2+1."""
ACTIVATION_PASSES, GATE_PASSES = 2, 3
"""The function, and its product with the other branch."""
SCORE_BYTES = 24.0
"""Of one 16-bit score of an eager prompt: written by QKᵀ 2, scaled 4, masked 4, softmax into fp32 6, back to 16 bits 6, read by PV 2."""
WIDEN_BYTES = 8.0
"""Of one element that quanto widens, beside reading its codes: bytes written 1 and read 1, scaled into 16 bits 2, read 2 and less the
shift 2."""
_FLOAT32_BYTES = 4


def unfused_ops(model: Model, tp: int, weight_dtype: str, num_tokens: int) -> Iterator[tuple[int, Op]]:
    """(times launched, Op): what norms, rotary embedding, activation and residuals move beyond the fused kernels of `linear_ops`."""
    layers, size = model.num_layers, activation_bytes(weight_dtype)
    row = num_tokens * model.hidden_size * size
    norm = RMS_NORM_PASSES if model.norm == "rms" else LAYER_NORM_PASSES
    yield layers * model.norms_per_layer, Elementwise("norm_chain", (norm + RESIDUAL_PASSES - 4) * row)
    q_heads, kv_heads = model.q_heads_per_gpu(tp), model.kv_heads_per_gpu(tp)
    head = num_tokens * model.head_dim * size
    if model.qk_norm:
        yield layers, Elementwise("norm_chain", (RMS_NORM_PASSES - 2) * (q_heads + kv_heads) * head)
    if model.position == "rope":
        passes = ROTARY_PASSES * (q_heads + kv_heads) - 2 * (q_heads + 2 * kv_heads)
        yield layers, Elementwise("rotary_chain", max(0, passes) * head)
    if model.gated_mlp:
        inter = num_tokens * -(-model.intermediate_size // tp) * size
        yield layers, Elementwise("activation_chain", (ACTIVATION_PASSES + GATE_PASSES - 3) * inter)


def eager_prompt_ops(shape: CacheShape, new_tokens: int, prior_tokens: int) -> tuple[Op, ...]:
    """Scores of a prompt written out and passed on, and the half of the square that a causal kernel leaves out; all layers."""
    scores = float(new_tokens * (prior_tokens + new_tokens) * shape.q_heads * shape.num_layers)
    return (PolicyKernel("score_matrix", SCORE_BYTES * scores, 2.0 * scores * shape.head_dim, 5 * shape.num_layers, "engine"),)


def decode_ops(plan: CachePlan, cache_bytes: float, num_slots: float, num_layers: int, eager: bool, repeats: bool) -> list[Op]:
    """Both caches are copied to append a token; a quantised one is widened before; eager scores pass through a chain.

    cache_bytes: as stored; num_slots: (token, layer, KV head) triples.
    """
    shape = plan.shape
    ops: list[Op] = []
    if plan.widens_in_torch:
        elements = num_slots * 2 * shape.head_dim
        cache_bytes = elements * shape.element_bytes
        # Codes are read here and 16 bits by attention, which is priced by the codes: both together are the 16 bits.
        ops.append(PolicyKernel("widen_cache", WIDEN_BYTES * elements + cache_bytes, 0.0, 6 * num_layers, "engine"))
    half = cache_bytes / 2
    ops += [PolicyKernel("cat_innermost" if eager else "cat_token", 2 * half, 0.0, num_layers, "engine"),
            PolicyKernel("cat_token", 2 * half, 0.0, num_layers, "engine")]  # fmt: skip
    if eager:
        # Scale, mask, cast, softmax and cast back: each reads and writes the scores of every query head.
        scores = num_slots * shape.group * _FLOAT32_BYTES
        ops.append(PolicyKernel("softmax_chain", 2 * 5 * scores, 0.0, 5 * num_layers, "engine"))
    if repeats:
        ops += repeat_kv_ops(shape, num_slots, num_layers)
    return ops


def repeat_kv_ops(shape: CacheShape, num_slots: float, num_layers: int) -> tuple[Op, ...]:
    """repeat_kv: a copy of the cache for every query head, and the products read it."""
    if shape.group == 1:
        return ()
    return (PolicyKernel("repeat_kv", 2.0 * shape.group * num_slots * shape.slot_bytes, 0.0, 2 * num_layers, "engine"),)
