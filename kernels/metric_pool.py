"""KV-Compress's pass over the metrics of the whole pool: squares of a step's probabilities added, probabilities zeroed.

Every decode step leaves each query head's probabilities in slots of their own, one per (KV slot, query head of the group).
The pass adds their squares to the slot's metric and clears them for the next step, whether a slot is in use or not.
The reference engine's four library calls move (16r+8) bytes a slot (policies.md, KV-Compress); one fused pass reads and
clears r probabilities and reads and writes one metric: 8r+8.
Source: KV-Compress (arXiv 2410.00161), squared attention summed over the query heads of a group.
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
from kvsim.kernels.runtime import CompileSpec, ceil_div, launch, next_power_of_2, recorded

FP32_BYTES = 4
TILE_ELEMENTS, MIN_TILE_GROUP = 4096, 4


@triton.jit
def metric_pool_kernel(
    probabilities_ptr, metrics_ptr, num_slots, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, TILE: tl.constexpr
):
    slot = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    member = tl.arange(0, GROUP_PADDED)
    in_pool = slot < num_slots
    mask = in_pool[:, None] & (member[None, :] < GROUP)
    pointers = probabilities_ptr + slot[:, None] * GROUP + member[None, :]
    probabilities = tl.load(pointers, mask=mask, other=0.0)
    squares = tl.sum(probabilities * probabilities, 1)
    metrics = tl.load(metrics_ptr + slot, mask=in_pool, other=0.0)
    tl.store(metrics_ptr + slot, metrics + squares, mask=in_pool)
    tl.store(pointers, tl.zeros([TILE, GROUP_PADDED], tl.float32), mask=mask)


def reference(probabilities: torch.Tensor, metrics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(metrics, probabilities) after the pass, float64, in new tensors."""
    return metrics.double() + (probabilities.double() ** 2).sum(-1), torch.zeros_like(probabilities, dtype=torch.float64)


def run(probabilities: torch.Tensor, metrics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """metrics [slots] fp32 += squares of probabilities [slots, group] fp32 over the group; probabilities become 0. In place.

    group: 1 to 16 query heads of a KV head. Returns (metrics, probabilities).
    """
    checks.tensor("probabilities", probabilities, torch.float32, (None, None))
    num_slots, group = probabilities.shape
    checks.choice("probabilities.shape[1]", group, checks.GROUPS)
    checks.tensor("metrics", metrics, torch.float32, (num_slots,), probabilities.device)
    padded = next_power_of_2(group)
    tile = TILE_ELEMENTS // max(MIN_TILE_GROUP, padded)
    launch(
        metric_pool_kernel, (ceil_div(num_slots, tile),), probabilities, metrics, num_slots,
        GROUP=group, GROUP_PADDED=padded, TILE=tile,
    )  # fmt: skip
    return metrics, probabilities


@dataclass(frozen=True)
class Shape:
    """num_slots: KV slots of the pool. group: query heads of a KV head."""

    num_slots: int = 1 << 20
    group: int = 4


def make_inputs(shape: Shape, rng: np.random.Generator, device: str | torch.device = "cpu") -> dict[str, Any]:
    gen = generator(rng, device)
    return {
        "probabilities": torch.rand(shape.num_slots, shape.group, generator=gen, device=device),
        "metrics": torch.rand(shape.num_slots, generator=gen, device=device),
    }


def bytes_moved(shape: Shape) -> float:
    """Probabilities read and cleared, metrics read and written."""
    return float(2 * FP32_BYTES * shape.num_slots * (shape.group + 1))


def flops(shape: Shape) -> float:
    """A square and a sum for each probability."""
    return 2.0 * shape.num_slots * shape.group


TOLERANCE = {torch.float32: 2e-6}
"""Relative: up to 16 squares and 17 sums, each rounded by 2^-24, one after another at worst."""


def compile_specs() -> list[CompileSpec]:
    specs = []
    for group in (1, 4, 7, 16):
        inputs = make_inputs(Shape(1024, group), np.random.default_rng(0))
        specs += recorded(f"group {group}", lambda inputs=inputs: run(**inputs))
    return specs
