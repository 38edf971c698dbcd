"""Decoding Ops of eager Hugging Face MPT-7B with Keyformer, beam search; K is stored [b, h, d, s], V [b, h, s, d].

Expressions follow ``models/mpt-keyformer-lib/attention_keyformer_old_bias.py`` of github.com/d-matrix-ai/keyformer-llm.
Names: b = batch (beams x prompts), h = q_heads = kv_heads = 32, d = head_dim = 128, S = kv_tokens, one query token.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from kvsim.calibrate.bench import EAGER, GRAPH, ISSUE, Bench, Inputs, Maker, Shape, grid, no_flops

BATCHES = (4, 8)  # beam 4, one and two prompts
TOKENS = (512, 1024, 2048, 4096, 8192)
ALIGNED_OR_NOT = tuple(s + offset for s, offset in product(TOKENS, (0, 1)))
ANY_ALIGNMENT = tuple(s + offset for s, offset in product(TOKENS, (0, 1, 2, 4)))
"""S modulo 8 is 0, 1, 2 or 4: how wide a load of 16-bit elements may be depends on it."""
TAU = 1.5  # middle of Keyformer's schedule 1 → 2; it does not change the work
HEADS: dict[str, tuple[int, ...]] = {"q_heads": (32,)}
CACHE: dict[str, tuple[int, ...]] = {"kv_heads": (32,), "head_dim": (128,)}
TINY_HEADS: dict[str, tuple[int, ...]] = {"q_heads": (4,)}
TINY_CACHE: dict[str, tuple[int, ...]] = {"kv_heads": (4,), "head_dim": (16,)}
CHAIN = (EAGER, GRAPH, ISSUE)
"""Chains of small kernels: what the host needs to issue them (`issue`) is as telling as the device time."""


def cache_elements(s: Shape) -> int:
    return s["batch"] * s["kv_heads"] * s["head_dim"] * s["kv_tokens"]


def column_elements(s: Shape) -> int:
    return s["batch"] * s["kv_heads"] * s["head_dim"]


def scores(s: Shape) -> int:
    return s["batch"] * s["q_heads"] * s["kv_tokens"]


def k_cache(s: Shape, make: Maker) -> torch.Tensor:
    return make.normal(s["batch"], s["kv_heads"], s["head_dim"], s["kv_tokens"])


def v_cache(s: Shape, make: Maker) -> torch.Tensor:
    return make.normal(s["batch"], s["kv_heads"], s["kv_tokens"], s["head_dim"])


# --- growing and reordering the cache ---------------------------------------------------------------------------------
def cat_innermost_inputs(s: Shape, make: Maker) -> Inputs:
    """contiguous=0: K as a compaction leaves it, a transposed view of [b, h, s, d]."""
    k = k_cache(s, make) if s["contiguous"] else v_cache(s, make).transpose(2, 3)
    return k, make.normal(s["batch"], s["kv_heads"], s["head_dim"], 1), 3


def cat_token_inputs(s: Shape, make: Maker) -> Inputs:
    return v_cache(s, make), make.normal(s["batch"], s["kv_heads"], 1, s["head_dim"]), 2


def cat(inputs: Inputs) -> Any:
    cache, new, dim = inputs
    return torch.cat([cache, new], dim=dim)


def cat_bytes(s: Shape, e: int) -> int:
    """Read the cache and the new column, write both."""
    return 2 * e * (cache_elements(s) + column_elements(s))


def beams_inputs(s: Shape, make: Maker) -> Inputs:
    """Every beam survives once, so that each byte is read once; real steps repeat some beams."""
    return k_cache(s, make), make.permutation(s["batch"])


def select_beams(inputs: Inputs) -> Any:
    cache, beam_idx = inputs
    return cache.index_select(0, beam_idx)


# --- attention of one token -------------------------------------------------------------------------------------------
def qk_inputs(s: Shape, make: Maker) -> Inputs:
    return make.normal(s["batch"], s["kv_heads"], 1, s["head_dim"]), k_cache(s, make)


def pv_inputs(s: Shape, make: Maker) -> Inputs:
    return make.normal(s["batch"], s["kv_heads"], 1, s["kv_tokens"]), v_cache(s, make)


def bmm(inputs: Inputs) -> Any:
    left, right = inputs
    return left.matmul(right)


def bmm_bytes(s: Shape, e: int) -> int:
    """The cache, the vector of head_dim and the vector of kv_tokens."""
    return e * (cache_elements(s) + column_elements(s) + s["batch"] * s["kv_heads"] * s["kv_tokens"])


def softmax_inputs(s: Shape, make: Maker) -> Inputs:
    b, h, tokens = s["batch"], s["q_heads"], s["kv_tokens"]
    keep = torch.ones(b, tokens, dtype=torch.bool, device=make.device)
    keep[:, : tokens // 16] = False  # left padding
    return make.normal(b, h, 1, tokens), make.normal(1, h, 1, tokens), keep, bool(s["fp32"])


def softmax_chain(inputs: Inputs) -> Any:
    """Scale, ALiBi bias, padding mask, softmax; fp32=1 as Hugging Face's MPT, fp32=0 as Keyformer's code."""
    logits, bias, keep, fp32 = inputs
    b, _, _, tokens = logits.shape
    weights = logits * (128**-0.5)
    weights = weights + bias
    weights = weights.masked_fill(~keep.view(b, 1, 1, tokens), torch.finfo(logits.dtype).min)
    if fp32:
        return torch.softmax(weights.float(), dim=-1).to(logits.dtype)
    return torch.softmax(weights, dim=-1)


def softmax_bytes(s: Shape, e: int) -> int:
    """Eager passes over the scores: scale 2, bias 2 (plus the bias), mask 2 (plus masks of 1 byte), softmax."""
    softmax = 2 * e if not s["fp32"] or e == 4 else (e + 4) + 8 + (4 + e)  # cast up, softmax, cast down
    mask = 3 * s["batch"] * s["kv_tokens"]  # read, write ~keep; read it
    return scores(s) * (6 * e + softmax) + e * s["q_heads"] * s["kv_tokens"] + mask


# --- Keyformer's score and eviction -----------------------------------------------------------------------------------
def gumbel_inputs(s: Shape, make: Maker) -> Inputs:
    h, tokens = s["q_heads"], s["kv_tokens"]
    return make.normal(s["batch"], h, 1, tokens), make.normal(h, tokens - 1).abs()


def gumbel_softmax_chain(inputs: Inputs) -> Any:
    """Score of each token: softmax of (logits + Gumbel noise) / tau, summed over the batch, added to the last score."""
    logits, score = inputs
    new_score = F.gumbel_softmax(logits, tau=TAU, hard=False, dim=-1).sum(0).sum(1)
    new_score[:, :-1] += score
    return new_score


def gumbel_bytes(s: Shape, e: int) -> int:
    """Passes over [b, h, S]: exponential 1, log 2, negate 2, add 3, divide 2, softmax 2, batch sum 1 = 13.

    Passes over [h, S]: batch sum 1, query sum 2, accumulate 3 (on S-1 tokens) = 6.
    """
    return e * (13 * scores(s) + s["q_heads"] * (3 * s["kv_tokens"] + 3 * (s["kv_tokens"] - 1)))


def topk_inputs(s: Shape, make: Maker) -> Inputs:
    return make.normal(s["batch"] * s["q_heads"], s["kv_tokens"]), s["kept_tokens"]


def topk(inputs: Inputs) -> Any:
    score, kept = inputs
    return score.topk(kept, dim=-1)


def topk_bytes(s: Shape, e: int) -> int:
    """Read the scores once, write values and int64 indices; a real top-k makes more passes."""
    return s["batch"] * s["q_heads"] * (s["kv_tokens"] * e + s["kept_tokens"] * (e + 8))


def gather_inputs(s: Shape, make: Maker) -> Inputs:
    """All beams of a prompt keep the same tokens; heads differ."""
    h = s["kv_heads"]
    index = make.kept_tokens(h, s["kv_tokens"], kept=s["kept_tokens"])
    if s["k_cache"]:
        return k_cache(s, make), index.view(1, h, 1, -1), 3
    return v_cache(s, make), index.view(1, h, -1, 1), 2


def gather(inputs: Inputs) -> Any:
    cache, index, dim = inputs
    b, h, rows, columns = cache.shape
    return cache.gather(dim, index.expand(b, h, rows, -1) if dim == 3 else index.expand(b, h, -1, columns))


def gather_bytes(s: Shape, e: int) -> int:
    """Read and write the kept tokens; the int64 index of one head and token once."""
    kept = column_elements(s) * s["kept_tokens"]
    return 2 * e * kept + 8 * s["kv_heads"] * s["kept_tokens"]


def mask_inputs(s: Shape, make: Maker) -> Inputs:
    index = make.kept_tokens(s["kv_heads"], s["kv_tokens"], kept=s["kept_tokens"])
    mask = torch.zeros(s["kv_heads"], s["kv_tokens"], dtype=torch.bool, device=make.device).scatter_(1, index, True)
    return (k_cache(s, make) if s["k_cache"] else v_cache(s, make)), mask, bool(s["k_cache"])


def mask_select(inputs: Inputs) -> Any:
    """How the reference evicts: boolean indexing over [b, h, s, d]; the host waits for the count."""
    cache, mask, is_k = inputs
    b, h = cache.shape[:2]
    token_rows = cache.transpose(2, 3) if is_k else cache
    kept = token_rows[mask.repeat(b, 1, 1)].view(b, h, -1, token_rows.shape[-1])
    return kept.transpose(2, 3) if is_k else kept


def mask_bytes(s: Shape, e: int) -> int:
    """Read and write the kept tokens; the mask written and read by repeat, read twice more to count and to list."""
    masks = s["kv_heads"] * s["kv_tokens"] * (1 + 3 * s["batch"])
    listed = 2 * 8 * 3 * s["batch"] * s["kv_heads"] * s["kept_tokens"]  # three int64 indices, written and read
    return 2 * e * column_elements(s) * s["kept_tokens"] + masks + listed


# --- StreamingLLM's positions inside the cache ------------------------------------------------------------------------
def rotate_inputs(s: Shape, make: Maker) -> Inputs:
    """Keys as they are cached before rotation, [b, h, s, d], and cosines and sines of every place, [1, 1, s, d]."""
    angles = (make.normal(1, 1, s["kv_tokens"], s["head_dim"]) for _ in range(2))
    return v_cache(s, make), *angles


def rotate_chain(inputs: Inputs) -> Any:
    """x·cos + rotate_half(x)·sin over all keys: `apply_rotary_pos_emb_single` of github.com/mit-han-lab/streaming-llm."""
    keys, cos, sin = inputs
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_bytes(s: Shape, e: int) -> int:
    """Passes over the keys: negate half 1, concatenate 2, two products 2 each, a sum 3 = 10; cosines and sines read once."""
    return e * (10 * cache_elements(s) + 2 * s["kv_tokens"] * s["head_dim"])


def kept(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Keyformer at 50 %."""
    return tuple(s | {"kept_tokens": s["kv_tokens"] // 2} for s in shapes)


def two_products(s: Shape) -> int:
    return 2 * cache_elements(s)


TINY = {"batch": (4,), "kv_tokens": (64, 65)}
BATCH_S = {"batch": BATCHES, "kv_tokens": ALIGNED_OR_NOT}
BATCH_ANY_S = {"batch": BATCHES, "kv_tokens": ANY_ALIGNMENT}

HF_OPS = (
    Bench(
        "cat_innermost", grid(**BATCH_ANY_S, **CACHE, contiguous=(1, 0)), grid(**TINY, **TINY_CACHE, contiguous=(1, 0)),
        cat_innermost_inputs, cat, cat_bytes, no_flops,
    ),
    Bench(
        "cat_token", grid(**BATCH_S, **CACHE), grid(**TINY, **TINY_CACHE), cat_token_inputs, cat, cat_bytes, no_flops,
    ),
    Bench(
        "index_select_beams", grid(**BATCH_S, **CACHE), grid(**TINY, **TINY_CACHE), beams_inputs, select_beams,
        bytes_moved=lambda s, e: 2 * e * cache_elements(s) + 8 * s["batch"], flops=no_flops,
    ),
    Bench("bmm_qk", grid(**BATCH_ANY_S, **CACHE), grid(**TINY, **TINY_CACHE), qk_inputs, bmm, bmm_bytes, two_products),
    Bench("bmm_pv", grid(**BATCH_ANY_S, **CACHE), grid(**TINY, **TINY_CACHE), pv_inputs, bmm, bmm_bytes, two_products),
    Bench(
        "softmax_chain", grid(**BATCH_S, **HEADS, fp32=(1, 0)), grid(**TINY, **TINY_HEADS, fp32=(1, 0)),
        softmax_inputs, softmax_chain, softmax_bytes, flops=lambda s: 6 * scores(s), modes=CHAIN,
    ),
    Bench(
        "gumbel_softmax_chain", grid(**BATCH_S, **HEADS), grid(**TINY, **TINY_HEADS),
        gumbel_inputs, gumbel_softmax_chain, gumbel_bytes, flops=lambda s: 9 * scores(s), modes=CHAIN,
    ),
    Bench(
        "topk", kept(grid(batch=(1, *BATCHES), kv_tokens=ALIGNED_OR_NOT, **HEADS)), kept(grid(**TINY, **TINY_HEADS)),
        topk_inputs, topk, topk_bytes, no_flops, modes=CHAIN,
    ),
    Bench(
        "gather_kv", kept(grid(**BATCH_S, **CACHE, k_cache=(1, 0))), kept(grid(**TINY, **TINY_CACHE, k_cache=(1, 0))),
        gather_inputs, gather, gather_bytes, no_flops,
    ),
    Bench(
        "rotate_chain", grid(**BATCH_S, **CACHE), grid(**TINY, **TINY_CACHE),
        rotate_inputs, rotate_chain, rotate_bytes, flops=lambda s: 3 * cache_elements(s), modes=CHAIN,
    ),
    Bench(
        "mask_select_kv", kept(grid(**BATCH_S, **CACHE, k_cache=(1, 0))),
        kept(grid(**TINY, **TINY_CACHE, k_cache=(1, 0))),
        mask_inputs, mask_select, mask_bytes, no_flops, modes=(EAGER,),
    ),
)
