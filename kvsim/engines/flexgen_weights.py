"""Where FlexGen puts weights: matrices one by one, in the order of a layer, on disk, in host memory and on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WEIGHT_BITS = 4.5
"""Of --compress-weight: 4 bits, and an fp16 scale and minimum for each group of 64 (CompressionConfig(num_bits=4, group_size=64))."""


class LayerWeights(NamedTuple):
    """Matrices of one layer: elements, and stored bytes by where they live."""

    elements: int
    gpu_bytes: float
    cpu_bytes: float
    disk_bytes: float


def placed(sizes: Sequence[int], gpu_frac: float, cpu_frac: float, compressed: bool) -> LayerWeights:
    """As init_weight_list of flex_opt.py: a matrix lives where the middle of it falls on the line disk, host, GPU.

    sizes: elements of each matrix. gpu_frac, cpu_frac: shares asked for; the rest lies on disk.
    """
    total, before, disk_frac = sum(sizes), 0, 1.0 - gpu_frac - cpu_frac
    found = {"gpu": 0.0, "cpu": 0.0, "disk": 0.0}
    for size in sizes:
        middle = (before + size / 2) / total
        place = "disk" if middle < disk_frac - 1e-9 else "cpu" if middle < disk_frac + cpu_frac - 1e-9 else "gpu"
        found[place] += size * (WEIGHT_BITS / 8 if compressed else 2)
        before += size
    return LayerWeights(total, found["gpu"], found["cpu"], found["disk"])
