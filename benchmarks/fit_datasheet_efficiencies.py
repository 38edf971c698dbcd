"""Fit kvsim/data/profiles/datasheet_efficiencies.yaml to measured kernels and report leave-one-GPU-out errors.

    python benchmarks/fit_datasheet_efficiencies.py [--measured ../shared/measured] [--check] [--host-only]

The measured rows (README there: sources and licences) are not part of the project; only the fits are, but for the host work of vLLM's
engines (benchmarks/results/): --host-only fits that anew and leaves the rest of the file as it is. The formulas are
those of `kvsim.datasheet`: each trial builds a DatasheetProfile and asks it. Per kind: fit every GPU by itself, take
the median over GPUs (the packaged numbers), and predict each GPU from the median of the others (the packaged errors).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filter_rows
import host_rows
import numpy as np
import yaml
from measured_rows import Row, collective_rows, kernel_rows, read_csv
from scipy.optimize import least_squares

from kvsim.datasheet import DatasheetProfile
from kvsim.efficiencies import DEFAULT_PATH, Efficiencies, load_efficiencies
from kvsim.hardware import Gpu, load_gpu
from kvsim.model import load_model
from kvsim.ops import Elementwise, MixedAttention
from kvsim.profile import QUANTILE_LEVELS, LogBias

GPUS = {"a100": "a100-sxm-80gb", "h100": "h100-sxm-80gb", "rtx4090": "rtx-4090-24gb"}
FIT_ROWS_PER_ENGINE = 1200
SOFT_L1_SCALE = 0.1
SIZES = ("m<=16", "m<=512", "m>512")
ROWS_FROM = "aiconfigurator (Apache-2.0), LLMServingSim (MIT) and vidur (MIT) rows"
MIN_SIGMA, ASSUMED_SIGMA = 0.05, 0.35
"""Standard deviations of log bias: the least that any answer claims, and that of a number without measurement."""

HOST_SIGMA = 0.35
"""A host may be twice as fast or as slow as the one measured: 1.96 standard deviations."""
EAGER_SOURCE = (
    "fitted: batch = number of launches, of which kvsim counts 9 a layer; Python and dispatcher of a LlamaDecoderLayer whose kernels do "
    f"nothing, measured beside the parts, plus {host_rows.KERNELS_PER_LAYER} kernels of {host_rows.CUDA_LAUNCH_US} us in the CUDA runtime "
    "(NVIDIA's blog on CUDA graphs, V100)"
)
AS_V1 = "assumed: as vLLM V1 was, before it was measured"
TRTLLM_SOURCE = "fitted: sum of parts, TPOT of TensorRT-LLM 1.0 (Llama-3.1-8B on 2 and 8 H100s, calibrate groups)"
VIDUR_COLUMNS = ("schedule_median_ms", "prepare_inputs_e2e_median_ms", "model_execution_launch_median_ms",
                 "sampler_e2e_median_ms", "process_model_outputs_median_ms")  # fmt: skip

GEMM_GPU = {"fp8": "h100", "int8": "a100", "int4": "a100"}

Bounds = Mapping[str, tuple[float, float, float]]
KINDS: Mapping[str, Bounds] = {
    "gemm.16bit": {"launch_s": (5e-6, 1e-7, 5e-5), "memory_frac": (0.8, 0.2, 1.0), "compute_frac": (0.8, 0.2, 1.05)},
    "decode_attention": {
        "launch_s": (1e-5, 1e-6, 5e-5), "split_s": (5e-6, 1e-7, 5e-5), "block_s": (4e-6, 1e-7, 2e-5),
        "memory_frac.16bit": (0.8, 0.2, 1.0),
    },
    "prefill_attention": {
        "launch_s": (1e-5, 1e-6, 5e-5), "compute_frac": (0.6, 0.2, 1.05), "memory_frac": (0.5, 0.05, 1.0),
        "walk_frac": (0.4, 0.0, 2.0),
    },
    "elementwise": {"launch_cycles": (4000.0, 100.0, 40000.0), "memory_frac": (0.7, 0.1, 1.0)},
    "collective.link": {
        "graph_s": (4e-6, 1e-7, 5e-5), "eager_s": (2e-5, 1e-6, 1e-4), "per_doubling_s": (1e-6, 1e-8, 1e-5),
        "bus_frac": (0.7, 0.2, 1.1),
    },
}  # fmt: skip
"""Fitted names per kind: (start, least, most)."""

CHOSEN = {
    "gemm.fp32.launch_us": (5.575, "assumed: as 16 bit"),
    "gemm.fp32.memory_frac": (0.8544, "assumed: as 16 bit"),
    "gemm.fp32.compute_frac": (0.759, "assumed: as 16 bit, of the fp32 peak"),
    "gemm.fp32.tile_rows": (8192.0, "assumed: all rows at once; CPUs are measured"),
    "gemm.fp32.second_tile_reads": (1.0, "assumed: a second tile of rows reads all weights again; CPUs are measured"),
    "gemm.fp32.tile_reads": (1.0, "assumed: so does each further one; CPUs are measured"),
    "gemm.fp32.packed_reads": (0.0, "assumed: weights are taken as they lie; CPUs are measured"),
    "decode_attention.sequence_us": (0.0, "assumed: one launch attends a whole batch; CPUs are measured"),
    "decode_attention.split_tokens": (400.0, "fitted: one value for all GPUs, free fits gave 40-425 on the same rows"),
    "decode_attention.compute_frac": (
        0.5, "assumed over caches of fewer than 16 bits, which kernels widen first; binds where matrix rate is low for the bandwidth",
    ),
    "policy.memory_frac": (
        0.4, "assumed: gather and scatter at half of a streaming kernel, until measured; PyTorch's eager attention of grouped queries, "
        "copies and batched products, reaches 0.42 on an A100 (pytorch.org/blog/flash-decoding)",
    ),
    "policy.compute_frac": (0.4, "assumed: a tiled 16-bit matrix product with an epilogue, below prefill attention's 0.65"),
    "policy.load_cycles": (265.0, "fitted: latency of the L2 cache, 261-273 cycles on A100, H100 and RTX 4090 (arXiv 2402.13499)"),
    "copy.launch_us": (5.0, "assumed: one cudaMemcpyAsync"),
    "copy.host_frac": (0.85, "assumed: pinned memory over PCIe (about 26 of 31.5 GB/s on gen 4, 55 of 63 on gen 5)"),
    "host.vllm_v0.torch_call.base_us": (0.0, "assumed: cost is per call"),
    "host.vllm_v0.torch_call.per_sequence_us": (10.0, "assumed: batch = number of calls; bare PyTorch takes 5-10 us a launch"),
    "host.vllm_v0.sync.base_us": (0.0, "assumed: cost is per wait"),
    "host.vllm_v0.sync.per_sequence_us": (
        20.0, "assumed: batch = number of waits; one number copied to the host and read, on a device that is idle"),
    "host.vllm_v1.compiled_launch.base_us": (0.0, "assumed: cost is per launch"),
    "host.vllm_v1.compiled_launch.per_sequence_us": (
        10.0, "assumed: batch = number of launches of torch.compile's code, where no graph was captured; bare PyTorch takes 5-10 us"),
    "host.trtllm.schedule.base_us": (150.0, f"{AS_V1}, most of it in C++"),
    "host.trtllm.schedule.per_sequence_us": (2.0, f"{AS_V1}, most of it in C++"),
    "host.trtllm.prepare.base_us": (350.0, AS_V1),
    "host.trtllm.prepare.per_sequence_us": (2.0, AS_V1),
    "host.trtllm.launch.base_us": (150.0, "assumed: replay of a captured graph"),
    "host.trtllm.launch.per_sequence_us": (0.0, "assumed: replay of a captured graph"),
    "host.trtllm.process.base_us": (1950.0, f"{TRTLLM_SOURCE}: responses in Python"),
    "host.trtllm.process.per_sequence_us": (31.0, f"{TRTLLM_SOURCE}: responses in Python"),
    "host.trtllm.eager_launch.base_us": (0.0, "assumed: as vLLM"),
    "host.trtllm.eager_launch.per_sequence_us": (
        50.0, "fitted: batch = number of launches; the same groups, where a prompt of 1,024 tokens stops decodes for 20 ms"),
    "host.sglang.schedule.base_us": (150.0, AS_V1),
    "host.sglang.schedule.per_sequence_us": (2.0, AS_V1),
    "host.sglang.prepare.base_us": (350.0, AS_V1),
    "host.sglang.prepare.per_sequence_us": (2.0, AS_V1),
    "host.sglang.launch.base_us": (150.0, "assumed: replay of a captured graph"),
    "host.sglang.launch.per_sequence_us": (0.0, "assumed: replay of a captured graph"),
    "host.sglang.process.base_us": (150.0, AS_V1),
    "host.sglang.process.per_sequence_us": (2.0, AS_V1),
    "host.torch_decoder.step.base_us": (500.0, "assumed: a step of kvsim's own decoder in Python, beside its kernels' launches"),
    "host.torch_decoder.step.per_sequence_us": (20.0, "assumed: as above"),
    "host.torch_decoder.eager_launch.base_us": (0.0, "assumed: cost is per launch"),
    "host.torch_decoder.eager_launch.per_sequence_us": (10.0, "assumed: bare PyTorch takes 5-10 us, upper end for Python"),
    "host.huggingface.launch.base_us": (0.0, "assumed: cost is per launch"),
    "host.huggingface.launch.per_sequence_us": (
        20.0, "assumed: batch = number of launches; the ~30 ms floor of an eager 7-8B model over about 1,500 launches "
        "(32 layers of 47 in eager modules); PyTorch's bare dispatch and launch is 5-10 us, the rest is Python"),
}  # fmt: skip


# Fitting -----------------------------------------------------------------------------------------------------------


def predict(gpu: Gpu, efficiencies: Efficiencies, rows: Sequence[Row]) -> np.ndarray:
    answer = DatasheetProfile(gpu, efficiencies).answer
    return np.array([answer(row.op).seconds for row in rows])


def weights(rows: Sequence[Row]) -> np.ndarray:
    """Every GPU counts the same, and within it every engine."""
    pairs = [(row.gpu, row.engine) for row in rows]
    engines = {gpu: len({e for g, e in pairs if g == gpu}) for gpu, _ in pairs}
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    return np.array([1.0 / (counts[pair] * engines[pair[0]]) for pair in pairs])


def thinned(rows: Iterable[Row]) -> list[Row]:
    by_engine: dict[str, list[Row]] = {}
    for row in rows:
        if row.fits:
            by_engine.setdefault(row.engine, []).append(row)
    kept = []
    for group in by_engine.values():
        step = max(1, -(-len(group) // FIT_ROWS_PER_ENGINE))
        kept += group[::step]
    return kept


def fit(gpu: Gpu, base: Efficiencies, rows: Sequence[Row], bounds: Bounds) -> dict[str, float]:
    """Robust least squares of log(measured / predicted)."""
    rows = thinned(rows)
    measured, weight = np.log([row.seconds for row in rows]), np.sqrt(weights(rows))
    scale = np.array([start for start, _, _ in bounds.values()])

    def residual(x: np.ndarray) -> np.ndarray:
        values = dict(zip(bounds, map(float, x * scale), strict=True))
        return (np.log(predict(gpu, base.replaced(values), rows)) - measured) * weight

    low, high = (np.array([b[i] for b in bounds.values()]) / scale for i in (1, 2))
    found = least_squares(residual, np.ones(len(scale)), bounds=(low, high), loss="soft_l1",
                          f_scale=SOFT_L1_SCALE / math.sqrt(len(rows)))  # fmt: skip
    return dict(zip(bounds, map(float, found.x * scale), strict=True))


def log_residuals(gpus: Mapping[str, Gpu], by_gpu: Mapping[str, Efficiencies], rows: Sequence[Row]) -> np.ndarray:
    """log(measured / predicted), each GPU with its own efficiencies."""
    out = np.empty(len(rows))
    for key in {row.gpu for row in rows}:
        index = [i for i, row in enumerate(rows) if row.gpu == key]
        chosen = [rows[i] for i in index]
        out[index] = np.log([row.seconds for row in chosen]) - np.log(predict(gpus[key], by_gpu[key], chosen))
    return out


def error(residual: np.ndarray) -> float:
    """Median of |predicted - measured| / measured."""
    return float(np.median(np.abs(np.expm1(-residual))))


def quantiles(residual: np.ndarray, weight: np.ndarray) -> LogBias:
    order = np.argsort(residual)
    share = (np.cumsum(weight[order]) - 0.5 * weight[order]) / weight.sum()
    found = np.interp(QUANTILE_LEVELS, share, residual[order])
    return (float(found[0]), float(found[1]), float(found[2]), float(found[3]))


def quadrature(one: LogBias, other: LogBias) -> LogBias:
    """Two independent errors: the middles add, the half widths add in quadrature."""
    middle = sum((q[1] + q[2]) / 2 for q in (one, other))

    def width(i: int) -> float:
        return math.hypot(*(q[i] - (q[1] + q[2]) / 2 for q in (one, other)))

    return (middle - width(0), middle - width(1), middle + width(2), middle + width(3))


def normal_bias(sigma: float) -> LogBias:
    return (-1.96 * sigma, -sigma, sigma, 1.96 * sigma)


class Book:
    """What becomes the YAML: values and biases with their sources."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[float, str]] = {}
        self.biases: dict[tuple[str, str], tuple[LogBias, str]] = {}

    @classmethod
    def packaged(cls) -> Book:
        """What the packaged YAML says."""
        book, content = cls(), yaml.safe_load(DEFAULT_PATH.read_text(encoding="utf-8"))

        def walk(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> None:
            for key, node in tree.items():
                if "value" in node:
                    book.value(".".join((*path, key)), node["value"], node["source"])
                else:
                    walk(node, (*path, key))

        walk(content["values"])
        for kind, classes in content["log_biases"].items():
            for size_class, entry in classes.items():
                book.biases[kind, size_class] = (tuple(entry["quantiles"]), entry["source"])
        return book

    def value(self, name: str, value: float, source: str) -> None:
        self.values[name] = (value, source)

    def bias(self, kind: str, size_class: str, bias: LogBias, source: str) -> None:
        widest = tuple(
            min(q, -z * MIN_SIGMA) if i < 2 else max(q, z * MIN_SIGMA)
            for i, (q, z) in enumerate(zip(bias, (1.96, 1.0, 1.0, 1.96), strict=True))
        )
        self.biases[kind, size_class] = ((widest[0], widest[1], widest[2], widest[3]), source)

    def yaml(self) -> str:
        tree: dict = {}
        for name, (value, source) in self.values.items():
            *path, leaf = name.split(".")
            node = tree
            for key in path:
                node = node.setdefault(key, {})
            node[leaf] = {"value": float(f"{value:.4g}"), "source": source}
        biases: dict = {}
        for (kind, size_class), (bias, source) in self.biases.items():
            biases.setdefault(kind, {})[size_class] = {"quantiles": [float(f"{q:.3f}") for q in bias], "source": source}
        head = (
            "# Made by benchmarks/fit_datasheet_efficiencies.py; do not edit by hand. Fractions are of the\n"
            "# datasheet's bandwidth or peak; log_biases are the 2.5, 16, 84 and 97.5 % quantiles of\n"
            "# log(measured / predicted).\n"
        )
        return head + yaml.safe_dump(
            {"values": tree, "log_biases": biases}, sort_keys=False, width=120, allow_unicode=True
        )


def all_classes() -> dict[tuple[str, str], LogBias]:
    """Every class an answer may carry, unbiased: what a profile needs while it is being fitted."""
    dtypes = ("16bit", "fp32", "fp8", "int8", "int4", "fp8_widened", "int8_widened")
    names = [("gemm", f"{dtype} {size}") for dtype in dtypes for size in SIZES]
    names += [("decode_attention", f"{f} {s}") for f in ("16bit", "fp8", "subbyte") for s in ("kv<=2xL2", "kv>2xL2")]
    names += [("prefill_attention", s) for s in ("new<=512", "new>512")]
    names += [("mixed_attention", "any"), ("policy", "any")]
    names += [("elementwise", s) for s in ("<=4MiB", ">4MiB")] + [("copy", s) for s in ("hbm", "host")]
    names += [("collective", f"{m} {s}") for m in ("graph", "eager") for s in ("<=1MiB", ">1MiB")]
    names += [("collective", s) for s in ("pcie", "all_gather")] + [("sampling", library) for library in filter_rows.STARTS]
    engines = ["vllm_v0", "vllm_v1", "trtllm", "sglang", "torch_decoder", "huggingface", "eager_launch"]
    engines += (f"{engine} eager_launch" for engine in ("vllm_v0", "vllm_v1", "sglang"))
    return dict.fromkeys(names + [("host", engine) for engine in engines], (0.0, 0.0, 0.0, 0.0))


def friendly(name: str, value: float) -> tuple[str, float]:
    return (name[:-2] + "_us", value * 1e6) if name.endswith("_s") else (name, value)


class Study:
    """Fits one kind after another; each result goes into the base that the next one sees."""

    def __init__(self, gpus: Mapping[str, Gpu], base: Efficiencies) -> None:
        self.gpus, self.base, self.book = gpus, base, Book()
        self.own: dict[str, dict[str, float]] = {key: {} for key in gpus}
        self.left_out: dict[str, dict[str, float]] = {key: {} for key in gpus}

    def with_values(self, table: Mapping[str, Mapping[str, float]]) -> dict[str, Efficiencies]:
        return {key: self.base.replaced(values) for key, values in table.items()}

    def fit_kind(self, kind: str, rows: Sequence[Row]) -> None:
        """Own fits, medians, leave-one-GPU-out predictions, biases per size class."""
        bounds = {f"{kind}.{name}": bound for name, bound in KINDS[kind].items()}
        present = [key for key in self.gpus if any(row.gpu == key for row in rows)]
        for key in present:
            self.own[key].update(fit(self.gpus[key], self.base, [row for row in rows if row.gpu == key], bounds))
        for key in self.gpus:
            others = [other for other in present if other != key]
            self.left_out[key].update({n: float(np.median([self.own[o][n] for o in others])) for n in bounds})
        median = {name: float(np.median([self.own[key][name] for key in present])) for name in bounds}
        self.base = self.base.replaced(median)
        residual = log_residuals(self.gpus, self.with_values(self.left_out), rows)
        own_residual = log_residuals(self.gpus, self.with_values(self.own), rows)
        informing = np.array([row.fits for row in rows])
        per_gpu = {key: np.array([row.gpu == key for row in rows]) for key in present}
        left_out = {key: error(residual[mask & informing]) for key, mask in per_gpu.items()}
        overall = float(np.median(list(left_out.values())))
        print(f"\n{kind}: leave-one-GPU-out median error {overall:.1%} (median over GPUs), "
              f"{error(residual[informing]):.1%} (all rows)")  # fmt: skip
        for key, mask in per_gpu.items():
            shown = (friendly(n.rsplit(".", 1)[-1], v) for n, v in self.own[key].items() if n in bounds)
            values = " ".join(f"{n}={v:.4g}" for n, v in shown)
            print(f"  {key:8s} own {error(own_residual[mask & informing]):.1%}  left out {left_out[key]:.1%}  {values}")
        self.add_biases(kind.split(".")[0], rows, residual, "leave-one-GPU-out residuals")
        errors = ", ".join(f"{key} {value:.0%}" for key, value in left_out.items())
        for name, value in median.items():
            self.book.value(*friendly(name, value), f"fitted: over {ROWS_FROM}, median over GPUs, leave-one-GPU-out "
                            f"median error {overall:.0%} ({errors})")  # fmt: skip

    def classes(self, rows: Sequence[Row]) -> list[str]:
        profiles = {key: DatasheetProfile(gpu, self.base) for key, gpu in self.gpus.items()}
        return [profiles[row.gpu].answer(row.op).size_class for row in rows]

    def add_biases(
        self, kind: str, rows: Sequence[Row], residual: np.ndarray, how: str, widen: LogBias | None = None
    ) -> None:
        weight, names = weights(rows), np.array(self.classes(rows))
        for name in dict.fromkeys(names):
            mask = names == name
            bias = quantiles(residual[mask], weight[mask])
            if widen is not None:
                bias = quadrature(bias, widen)
            source = f"datasheet: roofline, efficiencies from {ROWS_FROM}; error: {how}, {int(mask.sum())} rows"
            self.book.bias(kind, str(name), bias, source)
            print(f"    {name:20s} n={mask.sum():5d}  median error {error(residual[mask]):.1%}  quantiles "
                  + " ".join(f"{q:+.2f}" for q in bias))  # fmt: skip

    def cross_gpu(self, kind: str, size_class: str) -> LogBias:
        """What the 16-bit rows say of an unmeasured GPU, centred: it widens classes measured on one GPU."""
        bias = self.book.biases[kind, size_class][0]
        middle = (bias[1] + bias[2]) / 2
        return (bias[0] - middle, bias[1] - middle, bias[2] - middle, bias[3] - middle)

    def fit_gemm_dtype(self, dtype: str, rows: Sequence[Row]) -> None:
        """Quantised GEMMs were measured on one GPU: fit the ratio to its own 16-bit numbers."""
        key = GEMM_GPU[dtype]
        rows = [row for row in rows if row.gpu == key]
        bounds = {f"gemm.{dtype}.{n}": b for n, b in KINDS["gemm.16bit"].items()}
        own = fit(self.gpus[key], self.base, rows, bounds)
        base = self.base.replaced(own)
        residual = log_residuals(self.gpus, dict.fromkeys(self.gpus, base), rows)
        print(f"\ngemm.{dtype}: {key} only, own error {error(residual):.1%}  {own}")
        self.add_biases("gemm", rows, residual, f"own fit on {key} only, widened by the 16-bit spread over GPUs",
                        self.cross_gpu("gemm", "16bit m>512"))  # fmt: skip
        for name, value in own.items():
            plain = name.replace(dtype, "16bit")
            ratio = value / self.own[key][plain]
            generic = min(ratio * self.base[plain], 0.95) if name.endswith("frac") else value
            self.base = self.base.replaced({name: generic})
            shown = f"{ratio:.2f} of 16 bit, " if name.endswith("frac") else ""
            self.book.value(*friendly(name, generic), f"fitted: {shown}{key} only, {ROWS_FROM}")

    def fit_decode_fp8(self, rows: Sequence[Row]) -> None:
        name, plain, key = "decode_attention.memory_frac.fp8", "decode_attention.memory_frac.16bit", "h100"
        base = self.base.replaced(self.own[key])
        own = fit(self.gpus[key], base, rows, {name: (0.7, 0.2, 1.0)})
        ratio = own[name] / self.own[key][plain]
        residual = log_residuals(self.gpus, {key: base.replaced(own)}, rows)
        print(f"\ndecode fp8: h100 only, own error {error(residual):.1%}, {own[name]:.3f} = {ratio:.2f} of 16 bit")
        self.add_biases("decode_attention", rows, residual, "own fit on h100 only, widened by the 16-bit spread",
                        self.cross_gpu("decode_attention", "16bit kv>2xL2"))  # fmt: skip
        generic = ratio * self.base[plain]
        self.base = self.base.replaced({name: generic, "decode_attention.memory_frac.subbyte": generic})
        self.book.value(name, generic, f"fitted: {ratio:.2f} of 16 bit on h100, the one GPU measured, {ROWS_FROM}")
        self.book.value("decode_attention.memory_frac.subbyte", generic, "assumed: dequantises as well as fp8")
        for size in ("kv<=2xL2", "kv>2xL2"):
            bias = quadrature(self.book.biases["decode_attention", f"fp8 {size}"][0], normal_bias(ASSUMED_SIGMA))
            self.book.bias("decode_attention", f"subbyte {size}", bias, "assumed: fp8's efficiency and error, widened")

    def fit_mixed(self, rows: Sequence[Row]) -> None:
        """Only the RTX 4090 was measured: a third of the (new_tokens, n_decode) groups is held out."""
        key = "rtx4090"
        bounds = {"mixed_attention.reread_frac": (0.4, 0.0, 2.0), "mixed_attention.block_s": (4e-6, 0.0, 5e-5)}

        def pair(row: Row) -> tuple[int, int]:
            assert isinstance(row.op, MixedAttention)
            return row.op.prefill.new_tokens, row.op.decode.batch

        groups = sorted({pair(row) for row in rows})
        held = {groups[i] for i in np.random.default_rng(0).permutation(len(groups))[: len(groups) // 3]}
        inside, outside = ([row for row in rows if (pair(row) in held) == side] for side in (False, True))
        base = self.base.replaced(self.own[key])
        own = fit(self.gpus[key], base, inside, bounds)
        own_error = error(log_residuals(self.gpus, {key: base.replaced(own)}, outside))
        parts = [[row._replace(op=getattr(row.op, part)) for row in outside] for part in ("prefill", "decode")]
        summed = sum(predict(self.gpus[key], base, rows_of_part) for rows_of_part in parts)
        plain = np.log([row.seconds for row in outside]) - np.log(summed)
        self.base = self.base.replaced(own)
        residual = log_residuals(self.gpus, {key: base.replaced(own)}, rows)
        left_out = log_residuals(self.gpus, {key: self.base.replaced(self.left_out[key])}, rows)
        print(f"\nmixed: held-out groups, own parts: {own_error:.1%} (plain sum {error(plain):.1%}); "
              f"with other GPUs' parts {error(left_out):.1%}  {own}")  # fmt: skip
        self.add_biases("mixed_attention", rows, residual, "interaction and parts of the rtx4090, widened by the "
                        "spread of prefill over GPUs", self.cross_gpu("prefill_attention", "new<=512"))  # fmt: skip
        source = (
            f"fitted: rtx4090 mixed rows of LLMServingSim (MIT), held-out error {own_error:.0%}, "
            f"plain sum {error(plain):.0%}"
        )
        for name, value in own.items():
            self.book.value(*friendly(name, value), source)

    def fit_pcie(self, rows: Sequence[Row]) -> None:
        """The measured GPUs have NVLink in pairs: ask a copy of them without it."""
        bare = {key: replace(gpu, has_gpu_link=False) for key, gpu in self.gpus.items()}
        bounds = {"collective.pcie.eager_s": (3e-5, 1e-6, 2e-4), "collective.pcie.bus_frac": (0.7, 0.1, 1.0)}
        base = self.base.replaced({"collective.pcie.per_doubling_s": 0.0, "collective.pcie.graph_s": 1e-5})
        own = {key: fit(bare[key], base, [row for row in rows if row.gpu == key], bounds) for key in ("a100", "h100")}
        median = {name: float(np.median([values[name] for values in own.values()])) for name in bounds}
        self.base = base.replaced(median)
        swapped = {"a100": base.replaced(own["h100"]), "h100": base.replaced(own["a100"])}
        residual = log_residuals(bare, swapped, rows)
        print(f"\ncollective.pcie: {error(residual):.1%} left out  {own}")
        bias = quadrature(quantiles(residual, weights(rows)), normal_bias(0.2))
        self.book.bias(
            "collective", "pcie", bias, "datasheet: PCIe rate, vidur (MIT) rows of 4 GPUs linked in pairs, widened"
        )
        source = "fitted: vidur (MIT) rows, 4 GPUs with NVLink in pairs so that PCIe binds"
        for name, value in median.items():
            self.book.value(*friendly(name, value), source)
        eager_us = median["collective.pcie.eager_s"] * 1e6
        self.book.value("collective.pcie.graph_us", 0.5 * eager_us, "assumed: half of eager, the rest is the launch")
        self.book.value("collective.pcie.per_doubling_us", 0.1 * eager_us, "assumed: measured at 4 GPUs only")

    def fit_host(self, table: Sequence[Mapping[str, str]]) -> None:
        """vLLM's own Python (host_rows.py); vidur's rows of a fork of 2024 are V0's other witness, its Ray time left out."""
        single = [row for row in table if row["tp"] == "1"]
        vidur_batch = np.array([float(row["batch"]) for row in single])
        vidur = np.array([sum(float(row[column]) * 1e3 for column in VIDUR_COLUMNS) for row in single])
        self.fit_host_engine(
            host_rows.V0, {"own": host_rows.V0, "LLM.generate": host_rows.V0_OFFLINE}, {"vidur": (vidur_batch, vidur)},
            f"fitted: sum of parts over contexts, LLM.generate and {len(single)} rows of vidur (MIT; a fork of 2024, 2 hosts), widened: "
            "hosts differ by up to 2 times",
        )  # fmt: skip
        self.fit_host_engine(
            host_rows.V1, {"own": host_rows.V1, "FlashAttention 3, temperature 1": host_rows.V1_OTHERWISE}, {},
            "fitted: sum of parts over contexts, with FlashAttention 3 and at temperature 1, widened: hosts differ by up to 2 times",
        )  # fmt: skip
        launch_us = host_rows.eager_launch_us(host_rows.read_rows(host_rows.V0), load_model("llama-3.1-8b"))
        print(f"  eager launch of vllm_v0 {launch_us:.1f} us")
        self.book.value("host.vllm_v0.eager_launch.base_us", 0.0, "assumed: cost is per launch")
        self.book.value("host.vllm_v0.eager_launch.per_sequence_us", launch_us, EAGER_SOURCE)
        for engine in ("trtllm", "sglang", "torch_decoder"):
            self.book.bias("host", engine, normal_bias(0.5), "assumed: no step of this engine was timed on the host")
        self.book.bias("host", "huggingface", (-1.4, -0.7, 0.25, 0.6),
                       "assumed: 5 us of bare PyTorch launch to 1.8 times the default")  # fmt: skip

    def fit_host_engine(
        self, engine: host_rows.HostEngine, ways: Mapping[str, host_rows.HostEngine],
        others: Mapping[str, tuple[np.ndarray, np.ndarray]], source: str,
    ) -> None:  # fmt: skip
        """Lines of an engine's parts; its bias from steps run in several ways, and from others' (batches, microseconds a step)."""
        rows = host_rows.read_rows(engine)
        batch, times = host_rows.measured(engine, rows)
        lines = host_rows.fit_lines(batch, times)
        fitted = f"fitted: line over {len(batch)} cases of {engine.words} (benchmarks/results/{engine.path.name}): "
        for part, line in lines.items():
            calls = engine.cuda_calls.get(part)
            added = f"; {calls} CUDA calls of {host_rows.CUDA_LAUNCH_US} us added" if calls else ""
            self.book.value(f"host.{engine.name}.{part}.base_us", line.base_us, fitted + engine.meanings[part] + added)
            self.book.value(f"host.{engine.name}.{part}.per_sequence_us", line.per_sequence_us, fitted + engine.meanings[part])
        steps = {name: (batch, np.sum(list(host_rows.measured(way, rows)[1].values()), axis=0)) for name, way in ways.items()}
        print(f"\nhost {engine.name}: {lines}")
        residuals = []
        for name, (sizes, total) in {**steps, **others}.items():
            residual = np.log(total / sum(line.at(sizes) for line in lines.values()))
            least, middle, most = np.exp(np.percentile(residual, (0, 50, 100)))
            print(f"  {name}, times the lines: {least:.2f}-{most:.2f}, median {middle:.2f}")
            residuals.append(residual)
        weight = np.concatenate([np.full(len(residual), 1.0 / len(residual)) for residual in residuals])
        self.book.bias("host", engine.name, quadrature(quantiles(np.concatenate(residuals), weight), normal_bias(HOST_SIGMA)), source)


def host_biases(book: Book) -> None:
    for engine in sorted({step.engine for step in host_rows.EAGER_STEPS}):
        sources = "; ".join(step.source for step in host_rows.EAGER_STEPS if step.engine == engine)
        book.value(f"host.{engine}.eager_launch.base_us", 0.0, "assumed: cost is per launch")
        book.value(f"host.{engine}.eager_launch.per_sequence_us", host_rows.engine_launch_us(engine),
                   f"fitted: batch = number of launches; {sources}")  # fmt: skip
    book.bias("host", "vllm_v1 eager_launch", (-1.05, -0.6, 0.1, 0.3),
              "assumed: other model code in this engine, on a quicker host, took a third (torchtitan pull request 2373)")  # fmt: skip
    book.bias("host", "sglang eager_launch", normal_bias(HOST_SIGMA), "assumed: half to twice; one host was timed")
    book.bias("host", "eager_launch", (-0.9, -0.5, 0.5, 0.9), "assumed: 0.4 to 2.5 times")
    book.bias("host", "vllm_v0 eager_launch", normal_bias(HOST_SIGMA),
              "assumed: half to twice; no launch of this engine was timed on a GPU")  # fmt: skip


def fit_filters(book: Book) -> None:
    """From rows that are committed (filter_rows.py), on top of the packaged rest."""
    classes = all_classes()
    base = Efficiencies({**load_efficiencies().values, **filter_rows.starts()}, {}, classes, dict.fromkeys(classes, "assumed: start"))
    for name, value in filter_rows.fit(base).items():
        book.value(*friendly(name, value), filter_rows.SOURCE)
    for library in filter_rows.STARTS:
        book.bias("sampling", library, normal_bias(ASSUMED_SIGMA),
                  "assumed: constants of one GPU, not named, carried by multiprocessors and clock")  # fmt: skip


def choose(book: Book, start: str = "") -> None:
    """Enters what is CHOSEN; start: of the names to enter."""
    for name, (value, source) in CHOSEN.items():
        if name.startswith(start):
            book.value(name, value, source)


def assumed_biases(study: Study) -> None:
    book, widened = study.book, "assumed: no such units on this GPU, weights widened on the fly like int4's"
    for size in SIZES:
        for dtype in ("fp8_widened", "int8_widened"):
            bias = quadrature(book.biases["gemm", f"int4 {size}"][0], normal_bias(0.2))
            book.bias("gemm", f"{dtype} {size}", bias, widened)
        bias = quadrature(book.biases["gemm", f"16bit {size}"][0], normal_bias(0.2))
        book.bias("gemm", f"fp32 {size}", bias, "assumed: as 16 bit, widened")
    unmeasured = "assumed: efficiency of an elementwise or gather kernel until measured"
    book.bias("policy", "any", (-0.9, -0.5, 0.7, 1.4), unmeasured)
    spread = quadrature(book.biases["collective", "graph <=1MiB"][0], normal_bias(0.2))
    book.bias("collective", "all_gather", spread, "assumed: latency and rate of the measured all-reduce, widened")
    host_biases(book)
    book.bias("copy", "host", normal_bias(0.1), "assumed: PCIe of the datasheet, pinned memory")


def fit_all(study: Study, measured: Path) -> None:
    rows = kernel_rows(measured, study.gpus) | collective_rows(measured)
    study.fit_kind("gemm.16bit", rows["gemm.16bit"])
    for dtype in GEMM_GPU:
        study.fit_gemm_dtype(dtype, rows[f"gemm.{dtype}"])
    study.fit_kind("decode_attention", rows["decode_attention.16bit"])
    study.fit_decode_fp8(rows["decode_attention.fp8"])
    study.fit_kind("prefill_attention", rows["prefill_attention"])
    study.fit_mixed(rows["mixed_attention"])
    study.fit_kind("elementwise", rows["elementwise"])
    study.fit_kind("collective.link", rows["collective.link"])
    study.fit_pcie(rows["collective.pcie"])
    study.fit_host(read_csv(measured / "step_cpu_overheads.csv"))
    rates = [
        (row.gpu, row.op.bytes_moved / row.seconds / study.gpus[row.gpu].hbm_bandwidth_bytes_per_s)
        for row in rows["elementwise"]
        if isinstance(row.op, Elementwise) and row.op.name == "add" and row.op.bytes_moved > 2**27
    ]
    copy_frac = float(np.median([np.median([v for g, v in rates if g == key]) for key in {g for g, _ in rates}]))
    study.book.value("copy.hbm_frac", copy_frac, f"fitted: additions above 128 MiB, median over GPUs, {ROWS_FROM}")
    study.book.bias(
        "copy", "hbm", normal_bias(0.1), "datasheet: bandwidth, efficiency of large additions, error rounded up"
    )
    assumed_biases(study)
    fit_filters(study.book)
    choose(study.book)
    missing = set(all_classes()) - set(study.book.biases)
    assert not missing, missing


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measured", type=Path, default=root.parent / "shared" / "measured")
    parser.add_argument("--check", action="store_true", help="print the report but leave the YAML alone")
    parser.add_argument("--host-only", action="store_true", help="fit host work and samplers anew, leave the rest of the YAML as it is")
    options = parser.parse_args()
    if not (options.measured / "kernel_a100.csv").exists():
        print(f"{options.measured} is absent: the measured rows are not part of the project; give --measured FOLDER. "
              "The packaged YAML stays as it is.", file=sys.stderr)  # fmt: skip
        return 2
    gpus = {key: load_gpu(name) for key, name in GPUS.items()}
    start = {f"{kind}.{name}": bound[0] for kind, names in KINDS.items() for name, bound in names.items()}
    start |= {f"gemm.{d}.{n}": b[0] for d in GEMM_GPU for n, b in KINDS["gemm.16bit"].items()}
    start |= {f"decode_attention.memory_frac.{f}": 0.7 for f in ("fp8", "subbyte")}
    start |= {"mixed_attention.reread_frac": 0.4, "mixed_attention.block_s": 4e-6}
    for name, (value, _) in CHOSEN.items():
        start |= {name[:-3] + "_s" if name.endswith("_us") else name: value * (1e-6 if name.endswith("_us") else 1)}
    classes = all_classes()
    study = Study(gpus, Efficiencies(start, {}, classes, dict.fromkeys(classes, "assumed: start of the fit")))

    if options.host_only:
        study.book = Book.packaged()
        study.fit_host(read_csv(options.measured / "step_cpu_overheads.csv"))
        host_biases(study.book)
        fit_filters(study.book)
        choose(study.book, "host.")
    else:
        fit_all(study, options.measured)
    if not options.check:
        DEFAULT_PATH.write_text(study.book.yaml(), encoding="utf-8")
        print(f"\nwrote {DEFAULT_PATH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
