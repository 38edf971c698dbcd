"""`decode_attention` that also adds each step's statistic of the probabilities to a score per (sequence, KV head, slot).

| statistic | added to a slot's score | policy |
|---|---|---|
| `sum` | Σ α over the query heads of the group | H2O (arXiv 2306.14048) |
| `squared_sum` | Σ α² over the group | KV-Compress (arXiv 2410.00161) |
| `threshold_count` | query heads of the group with α > 1/t | Scissorhands (arXiv 2305.17118) |
| `gumbel` | Σ softmax((x + ζ)/τ) over the group, x the logit | Keyformer (arXiv 2403.09054) |

K is read once. A probability is known only when all of a row's splits are joined, so the attention kernel leaves
exp(logit − running maximum) in fp16 and the maximum of each tile of tokens, and a second small kernel multiplies by
exp(maximum − log-sum-exp) and adds up: 4 bytes a query head and token instead of the 8 of fp32 logits. Gumbel noise changes the
softmax, so there the scratch is fp32 logits, and two passes over it make the noisy log-sum-exp and the scores; noise is drawn
from a counter in both (`kvsim.kernels.noise`: slot, step, query head), so none is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks, decode_attention
from kvsim.kernels.layouts import tokens_of, view_kv
from kvsim.kernels.noise import gumbel_noise, gumbel_reference
from kvsim.kernels.runtime import CompileSpec, ceil_div, launch, next_power_of_2, specs_of
from kvsim.kernels.splits import LOG2_E, check_arguments

STATISTICS = ("sum", "squared_sum", "threshold_count", "gumbel")
SUM, SQUARED_SUM, THRESHOLD_COUNT, GUMBEL = (tl.constexpr(i) for i in range(4))
CHUNK_TOKENS = 256
"""Tokens of a program of the small kernels."""
TOLERANCE = decode_attention.TOLERANCE
"""Of the attention output."""
SCORE_TOLERANCE = (2**-9, 2**-20)
"""(relative, absolute) of scores: fp16 numbers below 1 are within 2^-11 (2^-25 absolute where subnormal), squared twice that, and
fp32 logits within 2e-6. A count may differ where α·t is within 2^-10 of 1."""


@triton.jit
def accumulate_kernel(
    scratch_ptr, tile_max_ptr, lse_ptr, lengths_ptr, num_seen_ptr, scores_ptr, kv_heads, max_slots, score_slots,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, STATISTIC: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores of CHUNK slots of one KV head, from un-normalised probabilities."""
    pair = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + pair)
    start = tl.program_id(0) * CHUNK
    if start >= length:
        return
    slot, member = start + tl.arange(0, CHUNK), tl.arange(0, GROUP_PADDED)
    in_group, exists = member < GROUP, slot < length
    mask = in_group[:, None] & exists[None, :]
    rows = (pair * GROUP + member)[:, None]
    p = tl.load(scratch_ptr + rows * max_slots + slot[None, :], mask=mask, other=0.0).to(tl.float32)
    maxima = tl.load(tile_max_ptr + rows * (max_slots // TILE) + slot[None, :] // TILE, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + pair * GROUP + member, mask=in_group, other=0.0) * LOG2_E
    alpha = p * tl.exp2(maxima - lse[:, None])
    if STATISTIC == SUM:
        added = tl.sum(alpha, 0)
    elif STATISTIC == SQUARED_SUM:
        added = tl.sum(alpha * alpha, 0)
    else:
        num_seen = length if num_seen_ptr is None else tl.load(num_seen_ptr + pair // kv_heads)
        added = tl.sum(tl.where(alpha * num_seen.to(tl.float32) > 1.0, 1.0, 0.0), 0)
    pointers = scores_ptr + pair * score_slots + slot
    old = tl.load(pointers, mask=exists, other=0)
    tl.store(pointers, old + added.to(old.dtype), mask=exists)


@triton.jit
def _noisy_logits(
    scratch_ptr, pair, slot, member, exists, seed, step, inverse_temperature, max_slots,
    GROUP: tl.constexpr,
):  # fmt: skip
    """(x + ζ)/τ times log2(e), −inf where there is no slot or query head."""
    mask = (member < GROUP)[:, None] & exists[None, :]
    rows = (pair * GROUP + member)[:, None]
    logits = tl.load(scratch_ptr + rows * max_slots + slot[None, :], mask=mask, other=0.0)
    noise = gumbel_noise(seed, slot[None, :], step, rows)
    return tl.where(mask, (logits + noise * LOG2_E) * inverse_temperature, float("-inf"))


@triton.jit(do_not_specialize=["seed", "step"])
def noisy_lse_kernel(
    scratch_ptr, parts_ptr, lengths_ptr, seed, step, inverse_temperature, max_slots, num_chunks,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """log2-sum-exp of the noisy logits of CHUNK slots, for each query head of one KV head."""
    pair, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    length = tl.load(lengths_ptr + pair)
    if chunk * CHUNK >= length:
        return
    slot, member = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, GROUP_PADDED)
    logits = _noisy_logits(
        scratch_ptr, pair, slot, member, slot < length, seed, step, inverse_temperature, max_slots, GROUP
    )
    maximum = tl.where(member < GROUP, tl.max(logits, 1), 0.0)
    total = tl.sum(tl.exp2(logits - maximum[:, None]), 1)
    pointers = parts_ptr + (pair * num_chunks + chunk) * GROUP + member
    tl.store(pointers, maximum + tl.log2(tl.where(member < GROUP, total, 1.0)), mask=member < GROUP)


@triton.jit(do_not_specialize=["seed", "step"])
def gumbel_kernel(
    scratch_ptr, parts_ptr, lengths_ptr, scores_ptr, seed, step, inverse_temperature, max_slots, num_chunks, score_slots,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, PARTS_TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores of CHUNK slots: the noisy softmax, summed over the group."""
    pair, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    length = tl.load(lengths_ptr + pair)
    if chunk * CHUNK >= length:
        return
    slot, member = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, GROUP_PADDED)
    used = tl.cdiv(length, CHUNK)
    maximum = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    for first in range(0, used, PARTS_TILE):
        part = first + tl.arange(0, PARTS_TILE)
        mask = (part < used)[None, :] & (member < GROUP)[:, None]
        pointers = parts_ptr + (pair * num_chunks + part)[None, :] * GROUP + member[:, None]
        lses = tl.load(pointers, mask=mask, other=float("-inf"))
        new_maximum = tl.where(member < GROUP, tl.maximum(maximum, tl.max(lses, 1)), 0.0)
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(tl.exp2(lses - new_maximum[:, None]), 1)
        maximum = new_maximum
    lse = maximum + tl.log2(tl.where(member < GROUP, total, 1.0))
    logits = _noisy_logits(
        scratch_ptr, pair, slot, member, slot < length, seed, step, inverse_temperature, max_slots, GROUP
    )
    added = tl.sum(tl.exp2(logits - lse[:, None]), 0)
    pointers = scores_ptr + pair * score_slots + slot
    old = tl.load(pointers, mask=slot < length, other=0.0)
    tl.store(pointers, old + added, mask=slot < length)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor, statistic: str,
    block_table: torch.Tensor | None = None, scale: float | None = None, num_seen: torch.Tensor | None = None,
    temperature: float = 1.0, seed: int = 0, step: int = 0, max_length: int | None = None, num_splits: int | None = None,
    attended: Callable[[], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention; each head's statistic of this step is added to `scores` in place.

    q, k, v, lengths, block_table, scale, max_length, returns: as in `decode_attention.run`.
    scores: `[batch, kv_heads, slots]`, at least as many slots as the cache has; fp32, for counts int16 or int32. Slots past a length stay.
    statistic: one of STATISTICS. num_seen: t of α > 1/t, int32 `[batch]`; the length of each head by default.
    attended: called when attention has been launched and the statistic has not: for timing them apart.
    temperature, seed, step: τ, and the key and counter of the noise ζ (Keyformer). Raises ValueError before any launch, TritonUnavailable.
    """  # fmt: skip
    view = view_kv(k, v, lengths, block_table)
    group, scale, length = check_arguments(q, view, k.dtype, k.device, scale, max_length, num_splits)
    checks.choice("statistic", statistic, STATISTICS)
    counts = statistic == "threshold_count"
    score_dtypes = (torch.int16, torch.int32) if counts else (torch.float32,)
    checks.tensor("scores", scores, score_dtypes, (view.batch, view.kv_heads, None), q.device)
    slots = scores.shape[2]
    checks.require(slots >= view.max_tokens, "scores.shape[2]", slots, f"be at least the cache's {view.max_tokens}", "enlarge it")
    if num_seen is not None:
        checks.tensor("num_seen", num_seen, torch.int32, (view.batch,), q.device)
    checks.positive("temperature", temperature)
    checks.integer("seed", seed, 0, 2**63 - 1)
    checks.integer("step", step, 0, 2**31 - 1)

    pairs, tile = view.batch * view.kv_heads, decode_attention.tile_tokens(view.head_dim)
    max_slots = ceil_div(view.max_tokens, tile) * tile
    noisy = statistic == "gumbel"
    scratch = torch.empty(pairs, group, max_slots, dtype=torch.float32 if noisy else torch.float16, device=q.device)
    tile_max = None if noisy else torch.empty(pairs, group, max_slots // tile, dtype=torch.float32, device=q.device)
    out, lse = decode_attention.attend(
        q, k, v, lengths, block_table, view, scale, length, num_splits, scratch, tile_max
    )  # fmt: skip
    if attended is not None:
        attended()
    chunks = ceil_div(view.max_tokens, CHUNK_TOKENS)
    sizes = {"GROUP": group, "GROUP_PADDED": next_power_of_2(group), "CHUNK": CHUNK_TOKENS}
    if not noisy:
        launch(
            accumulate_kernel, (chunks, pairs), scratch, tile_max, lse, lengths, num_seen, scores, view.kv_heads,
            max_slots, slots, STATISTIC=STATISTICS.index(statistic), TILE=tile, **sizes,
        )  # fmt: skip
        return out, lse
    parts = torch.empty(pairs, chunks, group, dtype=torch.float32, device=q.device)
    noise = (seed, step, 1 / temperature, max_slots, chunks)
    launch(noisy_lse_kernel, (chunks, pairs), scratch, parts, lengths, *noise, **sizes)
    launch(gumbel_kernel, (chunks, pairs), scratch, parts, lengths, scores, *noise, slots, PARTS_TILE=32, **sizes)
    return out, lse


def logits_reference(
    q: torch.Tensor, k: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor | None, scale: float | None
) -> dict[tuple[int, int], torch.Tensor]:
    """float64 logits `[group, length]` of each (sequence, KV head)."""
    group = q.shape[1] // lengths.shape[1]
    found = {}
    for batch, head in np.ndindex(*lengths.shape):
        keys = tokens_of(k, block_table, batch, head, int(lengths[batch, head])).double()
        found[batch, head] = q[batch, head * group : (head + 1) * group].double() @ keys.T * (scale or q.shape[2] ** -0.5)
    return found


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor, statistic: str,
    block_table: torch.Tensor | None = None, scale: float | None = None, num_seen: torch.Tensor | None = None,
    temperature: float = 1.0, seed: int = 0, step: int = 0, **_unused: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp and new scores in float64; `scores` itself is left alone."""  # fmt: skip
    out, lse = decode_attention.reference(q, k, v, lengths, block_table, scale)
    scores = scores.double().clone()
    group = q.shape[1] // lengths.shape[1]
    for (batch, head), logits in logits_reference(q, k, lengths, block_table, scale).items():
        length = logits.shape[1]
        alpha = logits.softmax(1)
        if statistic == "sum":
            added = alpha.sum(0)
        elif statistic == "squared_sum":
            added = alpha.square().sum(0)
        elif statistic == "threshold_count":
            seen = length if num_seen is None else int(num_seen[batch])
            added = (alpha * seen > 1).sum(0)
        else:
            slot = torch.arange(length, device=q.device)[None, :]
            rows = batch * q.shape[1] + head * group + torch.arange(group, device=q.device)[:, None]
            noise = gumbel_reference(seed, slot, torch.full_like(slot, step), rows)
            added = ((logits + noise) / temperature).softmax(1).sum(0)
        scores[batch, head, :length] += added
    return out, lse, scores


@dataclass(frozen=True, kw_only=True)
class Shape(decode_attention.Shape):
    """A cache, its query heads and the statistic."""

    statistic: str = "sum"


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device) -> dict[str, Any]:
    """Inputs of decode attention, scores to add to, a temperature and a seed (Keyformer: τ goes from 1 to 2)."""
    inputs = decode_attention.make_inputs(shape, rng, device)
    slots = inputs["k"].shape[2] if inputs["block_table"] is None else inputs["block_table"].shape[-1] * shape.block_size
    dims = (shape.batch, shape.kv_heads, slots)
    counts = shape.statistic == "threshold_count"
    old = torch.from_numpy(rng.integers(0, 100, dims)).to(torch.int16 if counts else torch.float32).to(device)
    noise = {"temperature": 1.5, "seed": int(rng.integers(2**31)), "step": 7} if shape.statistic == "gumbel" else {}
    return {**inputs, "scores": old, "statistic": shape.statistic, **noise}


def bytes_moved(shape: Shape) -> int:
    """Decode attention's, scratch written once and read once (gumbel twice), scores read and written."""
    slots = sum(shape.pair_lengths())
    if shape.statistic == "gumbel":
        scratch = slots * shape.group * 4 * 3
        scratch += 2 * 4 * shape.group * sum(ceil_div(n, CHUNK_TOKENS) for n in shape.pair_lengths())
    else:
        tile = decode_attention.tile_tokens(shape.head_dim)
        scratch = slots * shape.group * 2 * 2 + 2 * 4 * shape.group * sum(ceil_div(n, tile) for n in shape.pair_lengths())
    return decode_attention.bytes_moved(shape) + scratch + 2 * slots * (2 if shape.statistic == "threshold_count" else 4)


def flops(shape: Shape) -> int:
    """Those of decode attention; the statistic's few operations an element are not matrix work."""
    return decode_attention.flops(shape)


def compile_specs() -> list[CompileSpec]:
    """Launches to compile ahead of time: each statistic, both kinds of layout, groups 1 to 16."""
    cases = (
        ("sum", 128, "bfloat16", "paged", 4), ("squared_sum", 128, "float16", "paged_per_head", 8),
        ("threshold_count", 64, "float16", "contiguous", 1), ("gumbel", 128, "bfloat16", "contiguous", 1),
        ("gumbel", 80, "float16", "paged", 4), ("sum", 256, "bfloat16", "contiguous", 16),
    )  # fmt: skip
    shapes = [
        Shape(batch=2, kv_heads=8, tokens=1024, statistic=statistic, head_dim=dim, dtype=dtype, layout=layout, group=group)
        for statistic, dim, dtype, layout, group in cases
    ]
    return [spec for shape in shapes for spec in specs_of(_label(shape), run, make_inputs, shape)]


def _label(shape: Shape) -> str:
    return f"{shape.statistic} {shape.dtype} d{shape.head_dim} {shape.layout} group {shape.group}"
