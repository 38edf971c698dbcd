"""Cold inputs without the time to make them: on a CPU, views of one block of random numbers that is larger than the cache."""

from __future__ import annotations

import torch

from kvsim.calibrate.bench import Bench, Maker
from kvsim.calibrate.bench_timing import Buffers, copy_inputs, rotated, storage_bytes, tensors

ALIGN_ELEMENTS = 64
"""Inputs begin where allocators would let them begin, at 256 bytes for fp32."""


class Arena(Maker):
    """Makes inputs as a `Maker` does, its normal numbers being views of a block, each beginning where the last one ended.

    Numbers repeat after a turn through the block; by then a cache of half its size holds none of them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator, num_bytes: int) -> None:
        super().__init__(device, dtype, generator)
        block = torch.randn(num_bytes // dtype.itemsize, dtype=dtype, device=device, generator=generator)
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "start", 0)
        object.__setattr__(self, "made_others", False)

    block: torch.Tensor
    start: int
    made_others: bool

    def normal(self, *size: int) -> torch.Tensor:
        count = torch.Size(size).numel()
        if count > self.block.numel():
            object.__setattr__(self, "made_others", True)
            return super().normal(*size)
        start = self.start if self.start + count <= self.block.numel() else 0
        object.__setattr__(self, "start", -(-(start + count) // ALIGN_ELEMENTS) * ALIGN_ELEMENTS)
        return self.block[start : start + count].view(size)

    def buffers(self, bench: Bench, target_bytes: int) -> Buffers:
        """Inputs in turn whose total exceeds `target_bytes`, as `bench_timing.make_buffers`, from this block where that serves."""
        object.__setattr__(self, "made_others", False)
        first = bench.make_inputs({}, self)
        own = self.block.untyped_storage().data_ptr()
        from_block = not self.made_others and all(t.untyped_storage().data_ptr() == own for t in tensors(first))
        each = sum(t.nbytes for t in tensors(first)) if from_block else storage_bytes(first)
        count = max(2, min(1024, target_bytes // max(1, each) + 1)) if from_block else rotated(first, target_bytes)
        others = (bench.make_inputs({}, self) if from_block else copy_inputs(first) for _ in range(count - 1))
        return Buffers([first, *others], count * each, 0)
