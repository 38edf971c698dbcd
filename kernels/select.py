"""Top-k of each head's scores: which tokens a policy keeps, ascending, beside protected sinks and recent tokens.

Rows are (layer, sequence, KV head) in any number: one launch may serve all layers of a step. Three searches find the same
thing, the k-th largest score of the tokens that compete:

* `resident` (exact, rows up to RESIDENT_TOKENS): a row is read once into the registers of one program, and the sortable
  image of its k-th largest score is bisected between the smallest and the largest, one count a step. No scores move, no
  shared-memory atomics, and no dependence on how scores are spread; about 20 steps for scores that differ.
* `streamed` (exact, rows of any length): radix selection. Each pass over the row counts 256 equal slices of the range that
  is left, so four passes at most meet the k-th largest; the first starts from the row's own range.
* `threshold`: the streamed search stopped after one slicing. Tokens of the boundary slice count as equal, so exactly k
  tokens stay, but they may differ from the exact ones within that slice.

Order: scores compare by their *sortable image*, the uint32 that orders as the float does (negative: all bits flipped;
else: sign bit flipped; -0 is +0). Of equal scores the lowest index wins. A NaN ranks above +inf or below -inf by its sign.
Source of the rule kept: SnapKV (arXiv 2404.14469), H2O (arXiv 2306.14048), Keyformer (arXiv 2403.09054).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvsim.kernels import checks
from kvsim.kernels.layouts import generator
from kvsim.kernels.runtime import CompileSpec, launch, next_power_of_2, recorded

RESIDENT_TOKENS = 32768
"""Longest row held in registers: 32 keys in each of 1024 threads, beyond which the compiler spills (compiled for sm_90)."""
NUM_SLICES = 256
"""Slices of one radix pass: 8 bits a pass, so four passes over 32-bit images (kvsim/policies/kernels.py, `select`)."""
WRITE_TILE = 2048
MIN_ROW, KEYS_PER_WARP = 16, 512
METHODS = ("exact", "threshold")


@triton.jit
def sortable_image(scores):
    """uint32 that orders as the fp32 scores do; -0 and +0 are one."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _row_limits(lengths_ptr, budgets_ptr, row, num_sink, num_recent):
    """Tokens of the row, the range [first, last) that competes, and how many of it are wanted."""
    length = tl.load(lengths_ptr + row)
    budget = tl.minimum(tl.load(budgets_ptr + row), length)
    first = tl.minimum(num_sink, length)
    last = tl.maximum(length - num_recent, first)
    num_protected = length - (last - first)
    return length, first, last, tl.maximum(budget - num_protected, 0)


@triton.jit
def _write_kept(
    scores_ptr, kept_ptr, num_kept_ptr, row, length, first, last, low, high, num_ties, max_budget, score_stride,
    TILE: tl.constexpr,
):  # fmt: skip
    """Indices of protected tokens, of images above `high`, and of the first num_ties in [low, high]; then -1."""
    offsets = tl.arange(0, TILE)
    written = 0
    ties_seen = 0
    for start in range(0, length, TILE):
        index = start + offsets
        competes = (index >= first) & (index < last)
        image = sortable_image(tl.load(scores_ptr + row * score_stride + index, mask=competes, other=0.0))
        tie = competes & (image >= low) & (image <= high)
        sure = ((index < length) & ~competes) | (competes & (image > high))
        # One scan serves both counts: a tile has under 2^16 tokens, so each fits half a word.
        scan = tl.cumsum((sure.to(tl.uint32) << 16) + tie.to(tl.uint32), 0)
        sure_so_far = (scan >> 16).to(tl.int32)
        ties_so_far = (scan & 0xFFFF).to(tl.int32)
        tie_rank = ties_seen + ties_so_far
        kept_ties = tl.minimum(tie_rank, num_ties) - tl.minimum(ties_seen, num_ties)
        slot = written + sure_so_far + kept_ties - 1
        keep = sure | (tie & (tie_rank <= num_ties))
        tl.store(kept_ptr + row * max_budget + slot, index, mask=keep & (slot < max_budget))
        num_ties_here = tl.sum(tie.to(tl.int32), 0)
        written += tl.sum(sure.to(tl.int32), 0)
        written += tl.minimum(ties_seen + num_ties_here, num_ties) - tl.minimum(ties_seen, num_ties)
        ties_seen += num_ties_here
    for start in range(written, max_budget, TILE):
        slot = start + offsets
        tl.store(kept_ptr + row * max_budget + slot, tl.full([TILE], -1, tl.int32), mask=slot < max_budget)
    tl.store(num_kept_ptr + row, written)


@triton.jit
def resident_kernel(
    scores_ptr, lengths_ptr, budgets_ptr, kept_ptr, num_kept_ptr, num_sink, num_recent, max_budget, score_stride,
    ROW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    length, first, last, wanted = _row_limits(lengths_ptr, budgets_ptr, row, num_sink, num_recent)
    index = tl.arange(0, ROW)
    competes = (index >= first) & (index < last)
    image = sortable_image(tl.load(scores_ptr + row * score_stride + index, mask=competes, other=0.0))
    # Whatever does not compete has image 0, below every threshold tried: those are at least 1.
    image = tl.where(competes, tl.maximum(image, 1), 0)
    low = tl.maximum(tl.min(tl.where(competes, image, 0xFFFFFFFF), 0), 1)
    high = tl.maximum(tl.max(image, 0), low)
    while low < high:  # the k-th largest is in [low, high]
        middle = low + (high - low) // 2 + 1
        count = tl.sum((image >= middle).to(tl.int32), 0)
        low = tl.where(count >= wanted, middle, low)
        high = tl.where(count > wanted, high, tl.where(count == wanted, middle, middle - 1))
    num_ties = wanted - tl.sum((image > low).to(tl.int32), 0)
    _write_kept(
        scores_ptr, kept_ptr, num_kept_ptr, row, length, first, last, low, low, num_ties, max_budget, score_stride, TILE
    )


@triton.jit
def streamed_kernel(
    scores_ptr, lengths_ptr, budgets_ptr, kept_ptr, num_kept_ptr, num_sink, num_recent, max_budget, score_stride,
    EXACT: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    length, first, last, wanted = _row_limits(lengths_ptr, budgets_ptr, row, num_sink, num_recent)
    offsets = tl.arange(0, TILE)
    slices = tl.arange(0, SLICES)
    lows = tl.full([TILE], 0xFFFFFFFF, tl.uint32)
    highs = tl.full([TILE], 0, tl.uint32)
    for start in range(0, length, TILE):
        index = start + offsets
        competes = (index >= first) & (index < last)
        image = sortable_image(tl.load(scores_ptr + row * score_stride + index, mask=competes, other=0.0))
        lows = tl.minimum(lows, tl.where(competes, image, 0xFFFFFFFF))
        highs = tl.maximum(highs, tl.where(competes, image, 0))
    low = tl.min(lows, 0)
    high = tl.max(highs, 0)
    above = 0  # tokens with an image above `high`
    refining = low < high
    while refining:
        shift = 0
        while ((high - low) >> shift) >= SLICES:
            shift += 1
        counts = tl.zeros([SLICES], tl.int32)
        for start in range(0, length, TILE):
            index = start + offsets
            competes = (index >= first) & (index < last)
            image = sortable_image(tl.load(scores_ptr + row * score_stride + index, mask=competes, other=0.0))
            competes = competes & (image >= low) & (image <= high)
            counts += tl.histogram(((image - low) >> shift).to(tl.int32), SLICES, mask=competes)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        in_range = slices <= ((high - low) >> shift).to(tl.int32)
        boundary = tl.max(tl.where(in_range & (above + at_least >= wanted), slices, 0), 0)
        above += tl.sum(tl.where(slices > boundary, counts, 0), 0)
        low = low + (boundary.to(tl.uint32) << shift)
        width_less_one = (tl.full([], 1, tl.uint32) << shift) - 1
        high = tl.where(high - low > width_less_one, low + width_less_one, high)
        refining = (low < high) & EXACT
    _write_kept(
        scores_ptr, kept_ptr, num_kept_ptr, row, length, first, last, low, high, wanted - above, max_budget,
        score_stride, TILE,
    )  # fmt: skip


def reference(
    scores: torch.Tensor,
    budgets: int | torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    max_budget_tokens: int | None = None,
    num_sink: int = 0,
    num_recent: int = 0,
    method: str = "exact",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by a stable sort, row by row. `threshold` counts images of the boundary slice as equal, in integers."""
    num_rows, num_tokens = scores.shape
    wanted_rows = [budgets] * num_rows if isinstance(budgets, int) else budgets.tolist()
    lengths_rows = [num_tokens] * num_rows if lengths is None else lengths.tolist()
    width = max(wanted_rows) if max_budget_tokens is None else max_budget_tokens
    kept = torch.full((num_rows, width), -1, dtype=torch.int32, device=scores.device)
    for row in range(num_rows):
        length = lengths_rows[row]
        sinks = range(min(num_sink, length))
        recent = range(max(length - num_recent, len(sinks)), length)
        others = list(range(len(sinks), recent.start))
        wanted = min(wanted_rows[row], length) - len(sinks) - len(recent)
        value = scores[row].double().tolist()
        if method == "threshold" and others and wanted > 0:
            value = _sliced([_image(v) for v in scores[row, :length].float().tolist()], others, wanted)
        first = {token: (-value[token], token) for token in others}
        best = sorted(others, key=first.__getitem__)[: max(0, wanted)]
        tokens = sorted([*sinks, *best, *recent])
        kept[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32, device=scores.device)
    return kept, (kept >= 0).sum(1).to(torch.int32)


def _image(score: float) -> int:
    bits = int.from_bytes(struct.pack(">f", score + 0.0), "big")
    return bits ^ 0xFFFFFFFF if bits >> 31 else bits | 0x80000000


def _sliced(images: Sequence[int], others: Sequence[int], wanted: int) -> list[int]:
    """Images, those of the slice that holds the wanted-th largest made equal."""
    low, high = min(images[i] for i in others), max(images[i] for i in others)
    shift = 0
    while (high - low) >> shift >= NUM_SLICES:
        shift += 1
    nth = sorted((images[i] for i in others), reverse=True)[wanted - 1]
    boundary = (nth - low) >> shift
    return [low + (boundary << shift) if (image - low) >> shift == boundary else image for image in images]


def run(
    scores: torch.Tensor,
    budgets: int | torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    max_budget_tokens: int | None = None,
    num_sink: int = 0,
    num_recent: int = 0,
    method: str = "exact",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept tokens of each row: its first num_sink, its last num_recent and the best of the rest, budget in all.

    scores: [rows, tokens] fp32, each row dense; scores past a row's length are not used.
    budgets: tokens kept by each row, an int or [rows] int32. lengths: tokens of each row, [rows] int32; None: all.
    max_budget_tokens: width of the result, needed where budgets is a tensor.
    method: "exact", or "threshold": as many tokens, chosen to within 1/256 of the range of the row's images.

    Returns (kept [rows, max_budget_tokens] int32, ascending, -1 past the row's count; num_kept [rows] int32). Raises ValueError
    where a budget exceeds its row's length or is below what is protected. Tensors on a GPU are not looked into, as that would
    wait for it: there a row keeps min(budget, length) tokens, and what is protected always.
    """
    checks.tensor("scores", scores, torch.float32, (None, None), contiguous=False)
    checks.last_dim_dense("scores", scores)
    num_rows, num_tokens = scores.shape
    checks.choice("method", method, METHODS)
    checks.integer("num_sink", num_sink, 0)
    checks.integer("num_recent", num_recent, 0)
    if isinstance(budgets, int):
        max_budget_tokens = budgets
        budgets = torch.full((num_rows,), budgets, dtype=torch.int32, device=scores.device)
    checks.integer("max_budget_tokens", max_budget_tokens, 0)
    assert max_budget_tokens is not None
    checks.budget("budgets", max_budget_tokens, num_tokens)
    if lengths is None:
        lengths = torch.full((num_rows,), num_tokens, dtype=torch.int32, device=scores.device)
    checks.tensor("lengths", lengths, torch.int32, (num_rows,), scores.device)
    checks.tensor("budgets", budgets, torch.int32, (num_rows,), scores.device)
    _check_values(budgets, lengths, num_tokens, max_budget_tokens, num_sink + num_recent)
    kept = torch.empty(num_rows, max_budget_tokens, dtype=torch.int32, device=scores.device)
    num_kept = torch.empty(num_rows, dtype=torch.int32, device=scores.device)
    arguments = (scores, lengths, budgets, kept, num_kept, num_sink, num_recent, max_budget_tokens, scores.stride(0))
    if method == "exact" and num_tokens <= RESIDENT_TOKENS:
        row = max(MIN_ROW, next_power_of_2(num_tokens))
        warps = min(32, max(4, row // KEYS_PER_WARP))
        launch(resident_kernel, (num_rows,), *arguments, ROW=row, TILE=min(row, WRITE_TILE), num_warps=warps)
    else:
        exact = method == "exact"
        launch(streamed_kernel, (num_rows,), *arguments, EXACT=exact, SLICES=NUM_SLICES, TILE=WRITE_TILE, num_warps=8)
    return kept, num_kept


def _check_values(
    budgets: torch.Tensor, lengths: torch.Tensor, num_tokens: int, max_budget_tokens: int, num_protected: int
) -> None:
    checks.require(
        num_protected <= max_budget_tokens, "num_sink + num_recent", num_protected,
        f"be at most the budget of {max_budget_tokens}", "raise the budget or protect fewer",
    )  # fmt: skip
    if lengths.device.type != "cpu":
        return
    for row, (budget, length) in enumerate(zip(budgets.tolist(), lengths.tolist(), strict=True)):
        checks.integer(f"lengths[{row}]", length, 0, num_tokens)
        checks.budget(f"budgets[{row}]", budget, length)
        least = min(num_protected, length)
        checks.integer(f"budgets[{row}]", budget, least, max_budget_tokens)


@dataclass(frozen=True)
class Shape:
    """num_rows: (layer, sequence, KV head) triples. tokens: of each row. budget_tokens: kept of them."""

    num_rows: int = 8
    tokens: int = 32768
    budget_tokens: int = 2048
    num_sink: int = 4
    num_recent: int = 32
    method: str = "exact"


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Scores as attention leaves them: sums of probabilities, most small and a few large."""
    scores = torch.randn(shape.num_rows, shape.tokens, generator=generator(rng, device), device=device).mul_(2).exp_()
    return {
        "scores": scores, "budgets": shape.budget_tokens, "num_sink": shape.num_sink, "num_recent": shape.num_recent,
        "method": shape.method,
    }  # fmt: skip


def bytes_moved(shape: Shape) -> float:
    """Scores read to search and again to write, later passes being served by registers or L2; indices and counts written."""
    return 4.0 * shape.num_rows * (2 * shape.tokens + shape.budget_tokens + 1)


def flops(shape: Shape) -> float:
    """None: it compares integers."""
    return 0.0


TOLERANCE = {torch.float32: 0.0}
"""Kept indices are integers: they equal the reference's."""


def compile_specs() -> list[CompileSpec]:
    """Rows of 1k, 32k (the longest in registers) and 128k tokens, and the threshold."""
    shapes = (Shape(tokens=1024, budget_tokens=256), Shape(), Shape(tokens=131072), Shape(method="threshold"))
    rng = np.random.default_rng(0)
    specs = []
    for shape in shapes:
        inputs = make_inputs(shape, rng)
        specs += recorded(f"{shape.method} {shape.tokens} tokens", lambda inputs=inputs: run(**inputs))
    return specs
