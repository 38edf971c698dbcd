"""How many tokens each head keeps where heads compete: KV-Compress's blocks, AdaKV's pooled layer, PyramidKV's layers.

KV-Compress and AdaKV meet in one search. Heads of a pool (a sequence's heads of all layers; a layer's heads) are asked what
they give at a common threshold T on the sortable image of their scores:

    given(T) = max(0, (count of competing tokens with image <= T, plus offset) // unit)

and T is the least that gives `target` over the pool. KV-Compress (arXiv 2410.00161): unit is the block, offset the empty tail
slots, so that the e-th block of a head costs its (block·e − empty)-th smallest metric, a maximum and not a sum; target is the
blocks to free. AdaKV (arXiv 2407.11550): images are complemented, so that the best scores come first; offset is minus the
tokens that the head keeps anyway by its floor, unit 1; target is what the pool has left above the floors.
Four passes of 256-bin histograms (8 bits of the image each) find T for any number of heads and tokens: no sort, no host.
What T gives too much, because images are equal, is taken back from the highest heads: equal costs fall to the lowest head first.

Each head then keeps its best so many: `select.run` with these budgets.

PyramidKV (arXiv 2406.02069) depends on no data: `pyramid_layer_budgets` is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks
from kvsim.kernels.layouts import generator
from kvsim.kernels.runtime import CompileSpec, launch, next_power_of_2, recorded
from kvsim.kernels.select import sortable_image

NUM_BINS = 256
NUM_PASSES = 4
"""8 bits of a 32-bit image in each pass."""
HEADS_TILE = 8
TOKENS_TILE = 2048
KINDS = ("blocks", "pooled")


@triton.jit
def histogram_kernel(
    scores_ptr, competing_ptr, prefix_ptr, histogram_ptr, heads_per_pool, score_stride,
    SHIFT: tl.constexpr, DESCENDING: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Counts of one row's competing images by the 8 bits at SHIFT, among those whose higher bits are the pool's prefix."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(competing_ptr + row)
    prefix = tl.load(prefix_ptr + row // heads_per_pool).to(tl.uint32)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, end, TILE):
        index = start + tl.arange(0, TILE)
        matches = index < end
        image = sortable_image(tl.load(scores_ptr + row * score_stride + index, mask=matches, other=0.0))
        if DESCENDING:
            image = image ^ 0xFFFFFFFF
        if SHIFT < 24:
            matches = matches & ((image >> (SHIFT + 8)) == prefix)
        counts += tl.histogram(((image >> SHIFT) & 0xFF).to(tl.int32), BINS, mask=matches)
    tl.store(histogram_ptr + row * BINS + tl.arange(0, BINS), counts)


@triton.jit
def digit_kernel(
    histogram_ptr, offsets_ptr, targets_ptr, prefix_ptr, below_ptr, equal_ptr, heads_per_pool, unit,
    BINS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The pool's next 8 bits of T; per head, tokens below the prefix so far (below) and tokens that match it (equal)."""
    pool = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    given = tl.zeros([BINS], tl.int32)
    for start in range(0, heads_per_pool, HEADS):
        head = start + tl.arange(0, HEADS)
        exists = head < heads_per_pool
        row = pool * heads_per_pool + head
        counts = tl.load(
            histogram_ptr + row[:, None] * BINS + bins[None, :], mask=exists[:, None] & (bins[None, :] >= 0), other=0
        )
        below = tl.load(below_ptr + row, mask=exists, other=0) + tl.load(offsets_ptr + row, mask=exists, other=0)
        reached = tl.maximum(below[:, None] + tl.cumsum(counts, 1), 0) // unit
        given += tl.sum(tl.where(exists[:, None], reached, 0), 0)
    enough = given >= tl.load(targets_ptr + pool)
    digit = tl.min(tl.where(enough, bins, BINS - 1), 0)
    tl.store(prefix_ptr + pool, (tl.load(prefix_ptr + pool).to(tl.uint32) * BINS + digit.to(tl.uint32)).to(tl.int64))
    for start in range(0, heads_per_pool, HEADS):
        head = start + tl.arange(0, HEADS)
        exists = head < heads_per_pool
        row = pool * heads_per_pool + head
        counts = tl.load(
            histogram_ptr + row[:, None] * BINS + bins[None, :], mask=exists[:, None] & (bins[None, :] >= 0), other=0
        )
        below = tl.load(below_ptr + row, mask=exists, other=0)
        below += tl.sum(tl.where(bins[None, :] < digit, counts, 0), 1)
        tl.store(below_ptr + row, below, mask=exists)
        tl.store(equal_ptr + row, tl.sum(tl.where(bins[None, :] == digit, counts, 0), 1), mask=exists)


@triton.jit
def share_kernel(
    below_ptr, equal_ptr, offsets_ptr, targets_ptr, given_ptr, heads_per_pool, unit, HEADS: tl.constexpr
):
    """What each head gives: all below T, and of what equals T only what is still wanted, lowest heads first."""
    pool = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    exists = head < heads_per_pool
    row = pool * heads_per_pool + head
    below = tl.load(below_ptr + row, mask=exists, other=0) + tl.load(offsets_ptr + row, mask=exists, other=0)
    equal = tl.load(equal_ptr + row, mask=exists, other=0)
    least = tl.where(exists, tl.maximum(below, 0) // unit, 0)
    most = tl.where(exists, tl.maximum(below + equal, 0) // unit, 0)
    wanted = tl.load(targets_ptr + pool) - tl.sum(least, 0)
    spare = most - least
    before = tl.cumsum(spare, 0) - spare
    tl.store(given_ptr + row, least + tl.minimum(tl.maximum(wanted - before, 0), spare), mask=exists)


def reference(kind: str, scores: torch.Tensor, lengths: torch.Tensor, **options: Any) -> torch.Tensor:
    """Budgets as `run`'s, by sorting."""
    return (_reference_blocks if kind == "blocks" else _reference_pooled)(scores, lengths, **options)


def _reference_blocks(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    *,
    blocks_to_free: torch.Tensor,
    block_size_tokens: int,
    protected_tokens: int = 0,
) -> torch.Tensor:
    """The paper's way: sort each head, the cost of every block it could free, the cheapest blocks of all heads."""
    budgets = lengths.clone()
    for pool in range(scores.shape[0]):
        costs = []
        for head in range(scores.shape[1]):
            length = int(lengths[pool, head])
            ranked = scores[pool, head, : max(0, length - protected_tokens)].double().sort().values.tolist()
            evicted = block_size_tokens - -length % block_size_tokens
            while evicted <= len(ranked):
                costs.append((ranked[evicted - 1], head, length - evicted))
                evicted += block_size_tokens
        # Later blocks of a head cost no less, so its budget ends at its last block taken.
        for _, head, left in sorted(costs, key=lambda cost: cost[:2])[: int(blocks_to_free[pool])]:
            budgets[pool, head] = min(int(budgets[pool, head]), left)
    return budgets


def _reference_pooled(
    scores: torch.Tensor, lengths: torch.Tensor, *, budget_tokens: int, floor_tokens: int, protected_tokens: int = 0
) -> torch.Tensor:
    """Each head's protected tokens and its best up to the floor are safe; the best others of the pool fill its budget."""
    budgets = torch.zeros_like(lengths)
    num_pools, num_heads, _ = scores.shape
    for pool in range(num_pools):
        others = []
        for head in range(num_heads):
            length = int(lengths[pool, head])
            unprotected = max(0, length - protected_tokens)
            floor = min(length, max(floor_tokens, protected_tokens))
            ranked = scores[pool, head, :unprotected].double().sort(descending=True).values.tolist()
            others += [(-score, head) for score in ranked[floor - (length - unprotected) :]]
            budgets[pool, head] = floor
        left = min(budget_tokens * num_heads, int(lengths[pool].sum())) - int(budgets[pool].sum())
        for _, head in sorted(others)[:left]:
            budgets[pool, head] += 1
    return budgets


def run(kind: str, scores: torch.Tensor, lengths: torch.Tensor, **options: Any) -> torch.Tensor:
    """Tokens that each head keeps, [pools, heads] int32: `block_budgets` or `pooled_budgets` by kind."""
    checks.choice("kind", kind, KINDS)
    return (block_budgets if kind == "blocks" else pooled_budgets)(scores, lengths, **options)


def block_budgets(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    *,
    blocks_to_free: torch.Tensor,
    block_size_tokens: int,
    protected_tokens: int = 0,
) -> torch.Tensor:
    """KV-Compress: the tokens each head keeps once `blocks_to_free` of a sequence's blocks, the cheapest, are emptied.

    scores: [sequences, heads of all layers, tokens] fp32 metrics; what lies past a head's length is not used.
    lengths: [sequences, heads] int32. blocks_to_free: [sequences] int32. protected_tokens: newest of each head, never evicted.

    Returns budgets [sequences, heads] int32. Raises ValueError where a sequence has fewer blocks to give, if lengths are on the
    CPU; on a GPU, where that would wait for it, all blocks that can be freed are.
    """
    _check_pools(scores, lengths)
    checks.tensor("blocks_to_free", blocks_to_free, torch.int32, (scores.shape[0],), scores.device)
    checks.integer("block_size_tokens", block_size_tokens, 1)
    checks.integer("protected_tokens", protected_tokens, 0)
    if lengths.device.type == "cpu":
        room = freeable_blocks(lengths, block_size_tokens, protected_tokens).sum(1).tolist()
        for sequence, blocks in enumerate(blocks_to_free.tolist()):
            checks.integer(f"blocks_to_free[{sequence}]", blocks, 0, room[sequence])
    empty_tail = torch.remainder(-lengths, block_size_tokens)
    competing = (lengths - protected_tokens).clamp(min=0)
    freed = _given(scores, competing, empty_tail, blocks_to_free, unit=block_size_tokens, descending=False)
    return lengths - (freed * block_size_tokens - empty_tail).clamp(min=0)


def freeable_blocks(lengths: torch.Tensor, block_size_tokens: int, protected_tokens: int = 0) -> torch.Tensor:
    """Blocks that each head could free at most: whole ones, empty tail slots included, that hold no protected token."""
    kept = lengths.clamp(max=protected_tokens)
    return -(-lengths // block_size_tokens) - -(-kept // block_size_tokens)


def pooled_budgets(
    scores: torch.Tensor, lengths: torch.Tensor, *, budget_tokens: int, floor_tokens: int, protected_tokens: int = 0
) -> torch.Tensor:
    """AdaKV: the tokens each head keeps where the heads of a pool share `budget_tokens` a head.

    scores: [pools, heads, tokens] fp32, a pool being the heads of one layer and sequence. lengths: [pools, heads] int32.
    floor_tokens: what every head keeps at least, its protected tokens included. protected_tokens: newest, always kept.

    Returns budgets [pools, heads] int32, for `select.run` with as many recent tokens; a pool keeps budget_tokens · heads in
    all, or all it has.
    """
    _check_pools(scores, lengths)
    checks.integer("protected_tokens", protected_tokens, 0)
    checks.integer("floor_tokens", floor_tokens, 0)
    checks.integer("budget_tokens", budget_tokens, max(floor_tokens, protected_tokens), scores.shape[2])
    protected = lengths.clamp(max=protected_tokens)
    floors = lengths.clamp(max=max(floor_tokens, protected_tokens))
    pool_budgets = lengths.sum(1, dtype=torch.int32).clamp(max=budget_tokens * scores.shape[1])
    targets = pool_budgets - floors.sum(1, dtype=torch.int32)
    return floors + _given(scores, lengths - protected, protected - floors, targets, unit=1, descending=True)


def _check_pools(scores: torch.Tensor, lengths: torch.Tensor) -> None:
    checks.tensor("scores", scores, torch.float32, (None, None, None))
    checks.tensor("lengths", lengths, torch.int32, tuple(scores.shape[:2]), scores.device)
    if lengths.device.type == "cpu":
        for index, length in enumerate(lengths.flatten().tolist()):
            checks.integer(f"lengths.flatten()[{index}]", length, 0, scores.shape[2])


def _given(
    scores: torch.Tensor,
    competing: torch.Tensor,
    offsets: torch.Tensor,
    targets: torch.Tensor,
    *,
    unit: int,
    descending: bool,
) -> torch.Tensor:
    """Units given by each head, [pools, heads] int32: the search above, 2 · NUM_PASSES + 1 launches."""
    num_pools, num_heads, _ = scores.shape
    num_rows, device = num_pools * num_heads, scores.device
    histogram = torch.empty(num_rows, NUM_BINS, dtype=torch.int32, device=device)
    prefix = torch.zeros(num_pools, dtype=torch.int64, device=device)
    below = torch.zeros(num_rows, dtype=torch.int32, device=device)
    equal = torch.empty(num_rows, dtype=torch.int32, device=device)
    given = torch.empty(num_pools, num_heads, dtype=torch.int32, device=device)
    for shift in range(24, -8, -8):
        launch(
            histogram_kernel, (num_rows,), scores, competing, prefix, histogram, num_heads, scores.stride(1),
            SHIFT=shift, DESCENDING=descending, BINS=NUM_BINS, TILE=TOKENS_TILE, num_warps=8,
        )  # fmt: skip
        launch(
            digit_kernel, (num_pools,), histogram, offsets, targets, prefix, below, equal, num_heads, unit,
            BINS=NUM_BINS, HEADS=HEADS_TILE, num_warps=8,
        )  # fmt: skip
    launch(
        share_kernel, (num_pools,), below, equal, offsets, targets, given, num_heads, unit, HEADS=next_power_of_2(num_heads)
    )
    return given


def pyramid_layer_budgets(
    num_layers: int, budget_tokens: int, *, window_tokens: int, num_tokens: int, beta: float = 20.0
) -> list[int]:
    """PyramidKV: tokens each layer keeps of a prompt of num_tokens, window included; they sum to layers · budget_tokens.

    min = (C − w)/beta, max = 2(C − w) − min, linear from the first layer to the last, + w (arXiv 2406.02069; beta 20: paper
    and code). A prompt shorter than the first layer's share flattens the pyramid until that layer just keeps it, as the
    code does (pyramidkv_utils.py). Budgets are rounded symmetrically about C. A prompt of at most C tokens is kept whole.
    """
    checks.integer("num_layers", num_layers, 1)
    checks.integer("budget_tokens", budget_tokens, 2)
    checks.integer("window_tokens", window_tokens, 0, budget_tokens - 1)
    checks.integer("num_tokens", num_tokens, 0)
    checks.require(beta >= 1, "beta", beta, "be at least 1, which keeps all layers alike", "use 20")
    if num_tokens <= budget_tokens:
        return [num_tokens] * num_layers
    shared = budget_tokens - window_tokens
    most = min(2 * shared - shared / beta, num_tokens - window_tokens)
    half_spread = most - shared
    tilts = [1 - 2 * layer / (num_layers - 1) if num_layers > 1 else 0.0 for layer in range(num_layers)]
    # 1e-6 tokens of float dust go first, so that halves stay halves and round alike on both sides of C.
    return [budget_tokens + round(round(half_spread * tilt, 6)) for tilt in tilts]


@dataclass(frozen=True)
class Shape:
    """num_pools: sequences ("blocks") or layers of sequences ("pooled"), of num_heads heads; kept_frac of the tokens stay."""

    kind: str = "blocks"
    num_pools: int = 1
    num_heads: int = 256
    tokens: int = 8192
    kept_frac: float = 0.25
    block_size_tokens: int = 16
    protected_tokens: int = 32


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Metrics as attention leaves them, larger in some heads than in others; all heads of full length."""
    size = (shape.num_pools, shape.num_heads)
    draws = torch.randn(*size, shape.tokens, generator=generator(rng, device), device=device)
    scores = (2 * draws + draws[..., :1]).exp_()
    lengths = torch.full(size, shape.tokens, dtype=torch.int32, device=device)
    options: dict[str, Any] = {"protected_tokens": min(shape.protected_tokens, shape.tokens)}
    kept = max(int(shape.tokens * shape.kept_frac), options["protected_tokens"])
    if shape.kind == "blocks":
        per_head = (shape.tokens - kept) // shape.block_size_tokens
        blocks = torch.full(size[:1], per_head * shape.num_heads, dtype=torch.int32, device=device)
        options |= {"blocks_to_free": blocks, "block_size_tokens": shape.block_size_tokens}
    else:
        options |= {"budget_tokens": kept, "floor_tokens": options["protected_tokens"]}
    return {"kind": shape.kind, "scores": scores, "lengths": lengths, **options}


def bytes_moved(shape: Shape) -> float:
    """Scores once a pass, and a histogram a head written once and read twice."""
    rows = shape.num_pools * shape.num_heads
    return float(NUM_PASSES * rows * 4 * (shape.tokens + 3 * NUM_BINS))


def flops(shape: Shape) -> float:
    """None: it counts integers."""
    return 0.0


TOLERANCE = {torch.float32: 0.0}
"""Budgets are integers: they equal the reference's."""


def compile_specs() -> list[CompileSpec]:
    specs = []
    for shape in (Shape(tokens=1024), Shape(kind="pooled", num_pools=32, num_heads=8, tokens=1024)):
        inputs = make_inputs(shape, np.random.default_rng(0))
        specs += recorded(shape.kind, lambda inputs=inputs: run(**inputs))
    return specs
