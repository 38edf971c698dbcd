"""Points of `kvsim calibrate device` that run kernels: their shapes are legal, and what they launch computes attention."""

from __future__ import annotations

import pytest
import torch

import kvsim.kernels
from kvsim.calibrate.bench import Maker
from kvsim.calibrate.device.grids import Heads, Scope, all_points, decode_op
from kvsim.calibrate.device.points import SKEW, Point
from kvsim.calibrate.device.workloads import bench_of
from kvsim.ops import DecodeAttention

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 64)


def test_every_kernel_has_points_whose_shapes_it_takes():
    points = [point for point in all_points(Scope("cuda", "full")) if point.work.startswith("kernel")]
    named = set()
    for point in points:
        details = dict(point.details)
        module = kvsim.kernels.load(details["kernel"])
        shape = module.Shape(**dict(details["shape"]))
        named.add(details["kernel"])
        assert module.bytes_moved(shape) > 0
        # What policies count and what the kernel counts are the same work: the numbers differ by passes and scratch, not by sizes.
        assert 0.05 < point.op.bytes_moved / module.bytes_moved(shape) < 20, (details["kernel"], details["shape"])
    assert named == set(kvsim.kernels.KERNELS) - {"decode_attention"}, "which decode attention itself measures"


@pytest.mark.parametrize("kernel", sorted(set(kvsim.kernels.KERNELS) - {"decode_attention"}))
def test_small_points_of_every_kernel_run(kernel):
    import numpy as np

    points = all_points(Scope("cpu", "small"))
    point = next(p for p in points if p.work.startswith("kernel") and dict(p.details)["kernel"] == kernel)
    module = kvsim.kernels.load(kernel)
    inputs = module.make_inputs(module.Shape(**dict(dict(point.details)["shape"])), np.random.default_rng(0), "cpu")
    module.run(**inputs)


@pytest.mark.parametrize("lengths", [None, (40, 8, 1)])
def test_paged_decode_attention_is_that_of_torch(lengths):
    """The GPU's workload, interpreted: the same numbers as torch's attention over the blocks it names."""
    op = decode_op(3, HEADS, 40, "bf16", "paged")
    point = Point(op, "decode", "bfloat16")
    if lengths is not None:
        unlike = DecodeAttention(3, *HEADS, 2 * sum(lengths), max(lengths), op.slot_bytes, "bf16", "paged")
        point = Point(unlike, SKEW, "bfloat16", (("lengths", lengths),))
    bench = bench_of(point)
    q, k, v, held, table = inputs = bench.make_inputs({}, Maker(CPU, torch.bfloat16, torch.Generator().manual_seed(0)))
    assert held[:, 0].tolist() == list(lengths or (40, 40, 40)) and table is not None
    out, _ = bench.run(inputs)
    expected, _ = kvsim.kernels.load("decode_attention").reference(q, k, v, held, table)
    assert torch.allclose(out.double(), expected, atol=0.02)
