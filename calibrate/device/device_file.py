"""The device as a GPU file: of the catalogue where it is in there, else made of what was measured and what the system reports."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from kvsim.calibrate.rows import MeasuredRow
from kvsim.catalogue import DATA
from kvsim.hardware import Gpu, list_gpus, load_gpu
from kvsim.ops import DecodeAttention, Elementwise, Gemm, PrefillAttention
from kvsim.profile_file import DEVICE_FILE
from kvsim.units import GB, GIB, MIB

TORCH_NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100-sxm-80gb", "NVIDIA A100-SXM4-40GB": "a100-sxm-40gb", "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA A10G": "a10g-24gb", "NVIDIA A40": "a40-48gb", "NVIDIA B200": "b200-sxm-180gb", "NVIDIA H100 NVL": "h100-nvl-94gb",
    "NVIDIA H100 PCIe": "h100-pcie-80gb", "NVIDIA H100 80GB HBM3": "h100-sxm-80gb", "NVIDIA H200": "h200-sxm-141gb",
    "NVIDIA L4": "l4-24gb", "NVIDIA L40S": "l40s-48gb", "AMD Instinct MI300X": "mi300x-192gb",
    "NVIDIA GeForce RTX 4090": "rtx-4090-24gb", "NVIDIA RTX A6000": "rtx-a6000-48gb",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx-pro-6000-96gb",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000-server-96gb", "Tesla T4": "t4-16gb",
    "NVIDIA GeForce RTX 3090": "rtx-3090-24gb", "NVIDIA GH200 480GB": "gh200-96gb", "AMD Instinct MI325X": "mi325x-256gb",
}  # fmt: skip
"""What `torch.cuda.get_device_name` says of the catalogue's GPUs. An RTX 5090 is described anew: its products exceed the datasheet by
more than rows may, 1.13 to 1.15 times."""
ASSUMED_CLOCK_MHZ, ASSUMED_POWER_W, ASSUMED_LINK_GB_PER_S = 2000.0, 100.0, 16.0
TERA = 1e12


def catalogue_name(header: dict[str, Any]) -> str | None:
    """The catalogue's name of the device; None for others, and for a slice of one (MIG), which has fewer multiprocessors."""
    name = TORCH_NAMES.get(header["device_name"])
    if name is None or load_gpu(name).num_sms != header["facts"].get("multiprocessors"):
        return None
    return name


def write_device(folder: Path, header: dict[str, Any], rows: Iterable[MeasuredRow], gpu_name: str | None = None) -> Gpu:
    """Writes device.yaml and reads it back.

    header: of rows.jsonl. rows: where one is faster than the ceilings, it is the ceiling. gpu_name: take the device for this one
    of the catalogue, whatever it calls itself.
    """
    name = gpu_name or catalogue_name(header)
    if name is not None:
        name = load_gpu(name).name
        assert name in list_gpus()
        text = (DATA / "gpus" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        head = f"# {header['device_name']}, as kvsim calibrate device measured it with torch {header['torch']}\n"
        text = head + yaml.safe_dump(describe(header, rows), sort_keys=False, width=140)
    partial = folder / f"{DEVICE_FILE}.tmp"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / DEVICE_FILE)
    return load_gpu(folder / DEVICE_FILE)


def slug(device_name: str, device_type: str) -> str:
    """A name for files and reports: "cpu-intel-xeon-processor-2-threads"."""
    words = re.sub(r"\((r|tm)\)", "", device_name.lower())
    text = "-".join(re.findall(r"[a-z0-9.]+", words))
    return text if text.startswith(device_type) or device_type == "cuda" else f"{device_type}-{text}"


def describe(header: dict[str, Any], rows: Iterable[MeasuredRow]) -> dict[str, Any]:
    """The content of a GPU file: every number with its source."""
    facts, peaks, copy_rate = header["facts"], dict(header["peak_flops_per_s"]), float(header["copy_bytes_per_s"])
    bandwidth, best = ceilings(peaks, copy_rate, header["cache_bytes"], rows)
    is_cpu = header["device_type"] == "cpu"
    clocks = facts.get("clocks") or {}

    def number(value: float, source: str) -> dict[str, Any]:
        return {"value": float(f"{value:.6g}"), "source": source}

    def reported(name: str, otherwise: float) -> dict[str, Any]:
        try:
            return number(float(clocks[name]), "reported: nvidia-smi")
        except (KeyError, ValueError):
            return number(otherwise, "assumed: the system does not say; no time rests on it alone")

    content: dict[str, Any] = {
        "name": slug(header["device_name"], header["device_type"]), "vendor": "cpu" if is_cpu else "nvidia",
        "memory_gib": number(facts["memory_bytes"] / GIB, "reported: free memory" if is_cpu else "reported: torch"),
        "usable_memory_gib": number(facts["memory_bytes"] / GIB, "reported: free memory" if is_cpu else "reported: torch"),
        "hbm_bandwidth_gb_per_s": number(bandwidth / GB, "measured: the fastest of copies and of rows past the cache"),
        "l2_mib": number(header["cache_bytes"] / MIB, "reported: last-level cache"),
        "num_sms": {"value": int(facts.get("multiprocessors") or facts["host_cpus"]), "source": "reported: torch"},
        "boost_clock_mhz": reported("max_sm_mhz", ASSUMED_CLOCK_MHZ),
        "host_link_gb_per_s": number(float(header["host_copy_bytes_per_s"]) / GB, "measured: copies to the device"),
        "board_power_w": reported("power_limit_w", ASSUMED_POWER_W),
    }  # fmt: skip
    if not is_cpu and facts.get("compute_capability"):
        content["compute_capability"] = {"value": facts["compute_capability"], "source": "reported: torch"}
    source = "measured: the fastest matrix product"
    content["peak_tflops"] = {dtype: number(rate / TERA, source) for dtype, rate in sorted(best.items())}
    if "fp16" not in best:  # a GPU file must have it
        content["peak_tflops"]["fp16"] = number(min(best.values()) / TERA, "assumed: torch has no fp16 product here; the slowest other")
    return content


def ceilings(
    peaks: dict[str, float], bandwidth: float, cache_bytes: int, rows: Iterable[MeasuredRow]
) -> tuple[float, dict[str, float]]:
    """(bytes/s, FLOP/s by dtype): what a benchmark reached, or a row that was faster."""
    best = dict(peaks)
    for op, seconds, _ in rows:
        if isinstance(op, Gemm) and op.weight_dtype != "int4":  # multiplies in 16 bits
            best[op.weight_dtype] = max(best.get(op.weight_dtype, 0.0), 2.0 * op.m * op.n * op.k / seconds)
        elif isinstance(op, PrefillAttention) and op.kv_dtype in best:
            best[op.kv_dtype] = max(best[op.kv_dtype], op.flops / seconds)
        elif isinstance(op, DecodeAttention | Elementwise) and op.bytes_moved > 2 * cache_bytes:
            bandwidth = max(bandwidth, op.bytes_moved / seconds)
        if isinstance(op, Gemm) and op.weight_dtype in ("fp32", "bf16", "fp16"):
            weights = (4.0 if op.weight_dtype == "fp32" else 2.0) * op.n * op.k
            bandwidth = max(bandwidth, weights / seconds if weights > 2 * cache_bytes else 0.0)
    return bandwidth, best
