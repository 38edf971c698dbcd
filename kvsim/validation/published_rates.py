"""Matrix products and copies that others timed on single GPUs, with where each number is written. Data only.

Square products are ``torch.mm`` of normal random matrices, m = n = k, 6 launches to warm up and 30 timed together, as `test.py` of
github.com/zzc0721/torch-performance-test-data does; operands of the small sizes stay in the L2 cache, and so few launches end
before a power limit acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SIZES = (1024, 2048, 4096, 8192, 10240)
REPOSITORY = "github.com/zzc0721/torch-performance-test-data"


class Sweep(NamedTuple):
    """One card, in TFLOP/s by dtype, a number for each of SIZES. gpu: of the catalogue. card: what the source calls it.

    changed: catalogue fields, in SI units, in which that card differs.
    """

    gpu: str
    card: str
    source: str
    tflops: Mapping[str, tuple[float, float, float, float, float]]
    changed: Mapping[str, float] = {}
    confidence: str = ""


SWEEPS = (
    Sweep("l4-24gb", "L4", "issue 120", {
        "bf16": (54.42, 70.89, 54.91, 59.40, 56.90), "fp16": (54.81, 68.83, 53.02, 53.80, 52.47),
        "fp32": (12.87, 15.38, 12.53, 10.66, 11.11),
    }),
    Sweep("a10g-24gb", "A10G", "issue 126", {
        "bf16": (47.92, 60.57, 62.48, 66.59, 69.47), "fp16": (49.00, 60.62, 62.46, 65.67, 69.47),
        "fp32": (17.75, 21.73, 23.37, 23.23, 22.43),
    }),
    Sweep("a40-48gb", "A40", "issue 185", {
        "bf16": (82.35, 95.47, 115.16, 110.64, 122.29), "fp16": (85.02, 94.31, 113.51, 108.47, 119.18),
        "fp32": (17.05, 21.44, 23.01, 23.73, 22.82),
    }),
    Sweep("h100-pcie-80gb", "H100 PCIe", "issue 95", {
        "bf16": (217.70, 449.09, 495.93, 492.84, 471.79), "fp16": (201.71, 458.03, 457.32, 437.07, 449.65),
        "fp32": (27.44, 33.31, 36.51, 36.95, 35.80),
    }),
    Sweep("h100-pcie-80gb", "H800 PCIe", "issue 112", {
        "bf16": (170.73, 483.89, 503.83, 499.46, 487.22), "fp16": (159.05, 465.20, 478.23, 470.26, 462.26),
        "fp32": (27.62, 33.41, 37.22, 37.77, 36.60),
    }, {}, "an H100 PCIe but for its NVLink and fp64"),
    Sweep("a100-pcie-80gb", "A100-PCIE-40GB", "issue 108", {
        "bf16": (94.89, 138.46, 234.14, 215.26, 211.72), "fp16": (83.66, 214.73, 241.49, 197.51, 205.66),
        "fp32": (8.99, 9.69, 15.52, 17.56, 16.67),
    }, {"board_power_w": 250.0, "hbm_bandwidth_bytes_per_s": 1555e9}, "catalogue card with 250 W and 1555 GB/s (A100 PCIe product brief)"),
    Sweep("h100-sxm-80gb", "H100 80GB HBM3", "issue 79", {
        "bf16": (176.62, 676.59, 788.72, 797.51, 719.72), "fp16": (179.13, 645.12, 760.04, 736.19, 668.42),
        "fp32": (37.39, 49.58, 51.88, 51.81, 49.61),
    }),
    Sweep("rtx-pro-6000-server-96gb", "RTX PRO 6000 Blackwell Server Edition", "issue 162", {
        "bf16": (114.16, 257.19, 399.93, 417.34, 387.01), "fp16": (114.12, 252.77, 397.22, 406.97, 374.05),
        "fp32": (35.82, 57.10, 78.61, 78.99, 74.88),
    }),
)  # fmt: skip


class Best(NamedTuple):
    """The best of SIZES on one card, in TFLOP/s by dtype, where no more is written."""

    gpu: str
    source: str
    tflops: Mapping[str, float]


BESTS = (
    Best("t4-16gb", "database.md, Google Colab", {"fp16": 41.91, "fp32": 4.17}),
    Best("t4-16gb", "database.md, Kaggle", {"fp16": 42.71, "fp32": 4.43}),
    Best("rtx-a6000-48gb", "issue 46", {"bf16": 123.34, "fp16": 120.49, "fp32": 23.92}),
    Best("rtx-pro-6000-96gb", "database.md", {"bf16": 417.98, "fp16": 315.51, "fp32": 77.24}),
    Best("l40s-48gb", "issue 43", {"bf16": 269.15, "fp16": 264.02, "fp32": 46.88}),
    Best("rtx-4090-24gb", "database.md, PyTorch 2.8", {"bf16": 163.09, "fp16": 167.80, "fp32": 54.67}),
    Best("a100-sxm-80gb", "database.md", {"bf16": 264.53, "fp16": 258.74, "fp32": 19.18}),
    Best("h200-sxm-141gb", "issue 45", {"bf16": 790.29, "fp16": 759.40, "fp32": 51.34}),
    Best("rtx-5090-32gb", "issue 124", {"bf16": 236.99, "fp16": 223.98, "fp32": 69.83}),
    Best("b200-sxm-180gb", "database.md", {"bf16": 1696.03, "fp16": 1627.64, "fp32": 66.24}),
)
"""Of several RTX 4090 and 5090 the one in the middle; a 40 GB A100 of unknown form is left out."""

L4_PROBE = "github.com/ish-codes-magic/bytes-per-token, M0 report: PyTorch 2.14, L2 flushed before every launch, median"
L4_PROBE_GRID = ((1, 8, 32, 128, 512, 2048, 8192), (1024, 2048, 4096, 8192))
"""Its m, and its n = k."""
L4_PROBE_BEST = {"bf16": 57.0, "fp16": 56.6, "fp8": 117.8, "int8": 128.1}
"""TFLOP/s, the best of the grid."""
EAGER_LAUNCH_US = 8.72
"""Between launches of small kernels from Python, on the probe's host."""


class FewRows(NamedTuple):
    """Products of few rows, where the matrix is read and little computed: (m, n, k) → microseconds of a launch."""

    gpu: str
    dtype: str
    micros: Mapping[tuple[int, int, int], float]
    source: str
    confidence: str = ""


_T4_US = {
    1: (388.4, 133.0, 692.3, 356.2), 16: (433.8, 160.9, 759.1, 412.0), 32: (566.8, 172.1, 951.8, 477.5),
    64: (552.4, 176.2, 953.2, 488.1),
}  # fmt: skip
_LLAMA_2_7B = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
FEW_ROWS = (
    FewRows("l4-24gb", "bf16", {(1, size, size): micros for size, micros in {1024: 18.0, 2048: 56.0, 4096: 193.0, 8192: 663.0}.items()},
            L4_PROBE, "L2 flushed by writing: what is dirty in it leaves within the time"),
    FewRows("t4-16gb", "fp16", {(m, *nk): us for m, row in _T4_US.items() for nk, us in zip(_LLAMA_2_7B, row, strict=True)},
            "github.com/vllm-project/vllm pull request 6996, July 2024: torch.mm over the matrices of Llama-2-7B"),
)  # fmt: skip


class DeviceCopy(NamedTuple):
    """Bytes read and written a second, in GB/s, of copies of num_bytes within a GPU's memory, several times its L2."""

    gpu: str
    num_bytes: int
    gb_per_s: float
    source: str
    changed: Mapping[str, float] = {}
    confidence: str = ""


_BENCHMARKS = "github.com/chsasank/device-benchmarks, Tensor.copy_"
COPIES = (
    DeviceCopy("t4-16gb", 32_000_000, 239.6, "github.com/router-gao/cuda-demo, CUDA's bandwidthTest"),
    DeviceCopy("t4-16gb", 379_625_062, 240.0, _BENCHMARKS),
    DeviceCopy("l4-24gb", 1 << 30, 231.0, L4_PROBE),
    DeviceCopy("a100-sxm-40gb", 1 << 30, 1309.1, "github.com/pc2/GPUInspector.jl, docs: DGX A100, 1219 GiB/s", {}, "size not stated"),
    DeviceCopy("a100-pcie-80gb", 1_000_000_000, 1226.1, "github.com/jdh4/della-gpu-A100, bandwidthTest", {
        "hbm_bandwidth_bytes_per_s": 1555e9,
    }, "an A100-PCIE-40GB: catalogue card with 1555 GB/s"),
    DeviceCopy("a100-pcie-80gb", 379_625_062, 1490.0, _BENCHMARKS, {}, "form factor from a pull request"),
    DeviceCopy("h100-pcie-80gb", 379_625_062, 1630.0, _BENCHMARKS),
    DeviceCopy("rtx-4090-24gb", 379_625_062, 912.0, _BENCHMARKS),
)  # fmt: skip
