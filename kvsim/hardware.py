"""GPUs: capacity, bandwidths and peak rates, each with its source. SI units inside, datasheet units in the YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from kvsim.catalogue import DATA, Fields, is_path, names, read_yaml, unknown_name
from kvsim.errors import InputError
from kvsim.units import GB, GIB, MIB, TB

PEAK_DTYPES = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
SUSTAINED_DTYPES = ("fp32", "fp16", "bf16", "fp8", "int8")
"""Products of 4-bit weights are of 16-bit operands."""
PCIE_5_X16_GB_PER_S = 63.0
"""Each way: 16 lanes of 32 GT/s, 128/130. What is quicker leads to a CPU (NVLink-C2C) and not to another GPU."""
SUSTAINED_RANGE = (0.1, 1.5)
"""Of the datasheet's peak: less is a slip of units (an L4 holds 0.47), twice is a rate of sparse products (an RTX 5090 holds 1.13 to 1.15,
github.com/zzc0721/torch-performance-test-data)."""

_FALLBACK = {"int4": "int8", "int8": "bf16", "fp8": "bf16", "bf16": "fp16"}


@dataclass(frozen=True)
class Gpu:
    """One GPU. Bandwidths are theoretical and decimal; links count one direction; peaks are dense, never sparse.

    Attributes:
        hbm_bytes: capacity as marketed. A GPU's "80 GB" is 80 GiB (an A100 shows 81920 MiB in nvidia-smi).
        usable_bytes: what the driver reports to CUDA or HIP as total (torch's ``total_memory``).
        host_link_bytes_per_s: PCIe, one direction.
        gpu_link_bytes_per_s: NVLink or Infinity Fabric to the other GPUs together; PCIe where has_gpu_link is false.
        peak_flops_per_s: by dtype of the operands (fp16, bf16: fp32 accumulation); dtypes without units are absent.
        sustained_flops_per_s: what the best large product was measured to hold, by dtype; empty where nobody says. Above
            the peak where clocks go above the datasheet's.
        compute_capability: NVIDIA's (major, minor); None for others.
        sources: field name in the YAML file → where its number comes from.
    """

    name: str
    vendor: str
    hbm_bytes: int
    usable_bytes: int
    hbm_bandwidth_bytes_per_s: float
    l2_bytes: int
    num_sms: int
    boost_clock_hz: float
    host_link_bytes_per_s: float
    gpu_link_bytes_per_s: float
    has_gpu_link: bool
    board_power_w: float
    compute_capability: tuple[int, int] | None
    peak_flops_per_s: Mapping[str, float] = field(hash=False)
    sources: Mapping[str, str] = field(hash=False, repr=False)
    sustained_flops_per_s: Mapping[str, float] = field(default_factory=dict, hash=False)

    def peak_flops(self, dtype: str) -> float:
        """Peak FLOP/s (or OP/s) for operands of this dtype, falling back where the GPU has no units for it.

        As kernels do: fp8 → bf16 (the weights are widened on the fly), int4 → int8 → bf16, bf16 → fp16 (T4).
        Weight-only int4 (AWQ, GPTQ) multiplies in 16 bits on every GPU: ask with ``dtypes.compute_dtype("int4")``.
        """
        if dtype not in PEAK_DTYPES:
            raise InputError("dtype", dtype, f"must be one of {', '.join(PEAK_DTYPES)}")
        while dtype not in self.peak_flops_per_s:
            if dtype not in _FALLBACK:
                raise InputError(f"gpu.peak_tflops.{dtype}", None, f"is missing for {self.name}", "add it to its file")
            dtype = _FALLBACK[dtype]
        return self.peak_flops_per_s[dtype]

    def by_datasheet(self) -> Gpu:
        """Without what is known to be sustained: where times were measured on this very GPU, they say it themselves."""
        return replace(self, sustained_flops_per_s={}) if self.sustained_flops_per_s else self


def list_gpus() -> list[str]:
    """Catalogue names, sorted; aliases are not listed."""
    return names("gpus")


def load_gpu(name_or_path: str | Path) -> Gpu:
    """A GPU by catalogue name, by alias (``a100``, ``h100-sxm``, ``l4``), or from a YAML file in the same layout.

    Raises InputError for an unknown name (with the closest ones), a missing or malformed file, or a bad value.
    """
    if is_path(name_or_path):
        return _read_gpu(Path(name_or_path).expanduser(), needs_source=False)
    name = str(name_or_path).strip().lower().replace("_", "-").replace(" ", "-")
    if name not in list_gpus():
        aliases = _aliases()
        if name not in aliases:
            raise unknown_name("gpu", str(name_or_path), [*list_gpus(), *aliases], "kvsim list gpus")
        name = aliases[name]
    return _catalogue_gpu(name)


@cache
def _catalogue_gpu(name: str) -> Gpu:
    return _read_gpu(DATA / "gpus" / f"{name}.yaml", needs_source=True)


@cache
def _aliases() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in list_gpus():
        for alias in Fields(read_yaml("gpu", DATA / "gpus" / f"{name}.yaml"), name).texts("aliases"):
            assert alias not in found, f"alias {alias} is claimed by {found[alias]} and {name}"
            found[alias] = name
    return found


_LAYOUT = "lay the file out as those in kvsim/data/gpus/"


def _read_gpu(path: Path, *, needs_source: bool) -> Gpu:
    fields = Fields(read_yaml("gpu", path, _LAYOUT), "gpu", needs_source=needs_source, layout=_LAYOUT)
    fields.texts("aliases")
    hbm_bytes = round(fields.number("memory_gib") * GIB)
    usable_bytes = round(fields.number("usable_memory_gib") * GIB)
    if usable_bytes > hbm_bytes:
        raise InputError(
            "gpu.usable_memory_gib", usable_bytes / GIB, f"must not exceed memory_gib={hbm_bytes / GIB:g}",
            "memory_gib is the marketed capacity, usable_memory_gib what the driver reports",
        )  # fmt: skip
    host_link_gb_per_s = fields.number("host_link_gb_per_s")
    gpu_link_gb_per_s = fields.optional_number("gpu_link_gb_per_s")
    peaks = fields.mapping("peak_tflops")
    peak_tflops = {dtype: peaks.optional_number(dtype) for dtype in PEAK_DTYPES}
    peaks.reject_unknown()
    if peak_tflops["fp16"] is None:
        raise InputError("gpu.peak_tflops.fp16", None, "is missing", "give the dense tensor-core peak")
    sustained_tflops, sustained_sources = _sustained(fields, peak_tflops)
    gpu = Gpu(
        name=fields.text("name", path.stem),
        vendor=fields.text("vendor", "nvidia", choices=("nvidia", "amd", "cpu")),
        hbm_bytes=hbm_bytes,
        usable_bytes=usable_bytes,
        hbm_bandwidth_bytes_per_s=fields.number("hbm_bandwidth_gb_per_s") * GB,
        l2_bytes=round(fields.number("l2_mib") * MIB),
        num_sms=fields.integer("num_sms"),
        boost_clock_hz=fields.number("boost_clock_mhz") * 1e6,
        host_link_bytes_per_s=host_link_gb_per_s * GB,
        gpu_link_bytes_per_s=(min(host_link_gb_per_s, PCIE_5_X16_GB_PER_S) if gpu_link_gb_per_s is None else gpu_link_gb_per_s) * GB,
        has_gpu_link=gpu_link_gb_per_s is not None,
        board_power_w=fields.number("board_power_w"),
        compute_capability=_compute_capability(fields),
        peak_flops_per_s={dtype: tflops * TB for dtype, tflops in peak_tflops.items() if tflops is not None},
        sources={
            **fields.sources, **{f"peak_tflops.{dtype}": source for dtype, source in peaks.sources.items()}, **sustained_sources,
        },
        sustained_flops_per_s={dtype: tflops * TB for dtype, tflops in sustained_tflops.items()},
    )  # fmt: skip
    fields.reject_unknown()
    return gpu


def _sustained(fields: Fields, peak_tflops: Mapping[str, float | None]) -> tuple[dict[str, float], dict[str, str]]:
    """TFLOP/s and sources of the optional section sustained_tflops."""
    if fields.raw("sustained_tflops") is None:
        return {}, {}
    section = fields.mapping("sustained_tflops")
    if section.has("int4"):
        fix = "weights of 4 bits are multiplied in 16: give bf16"
        raise InputError("gpu.sustained_tflops.int4", section.raw("int4"), "must be left out", fix)
    found: dict[str, float] = {}
    for dtype in SUSTAINED_DTYPES:
        tflops, peak = section.optional_number(dtype), peak_tflops["fp16" if dtype == "bf16" and peak_tflops[dtype] is None else dtype]
        if tflops is None:
            continue
        if peak is None:
            rule = f"must be left out: peak_tflops.{dtype} is null"
            raise InputError(f"gpu.sustained_tflops.{dtype}", tflops, rule, "give the peak too, if there is one")
        if not SUSTAINED_RANGE[0] * peak <= tflops <= SUSTAINED_RANGE[1] * peak:
            raise InputError(
                f"gpu.sustained_tflops.{dtype}", tflops,
                f"must be {SUSTAINED_RANGE[0]:g} to {SUSTAINED_RANGE[1]:g} times peak_tflops.{dtype}={peak:g}",
                "TFLOP/s that a large dense product was measured to hold; the peak is the datasheet's of dense ones",
            )  # fmt: skip
        found[dtype] = tflops
    section.reject_unknown()
    return found, {f"sustained_tflops.{dtype}": source for dtype, source in section.sources.items()}


def _compute_capability(fields: Fields) -> tuple[int, int] | None:
    value = fields.sourced("compute_capability")
    if value is None:
        return None
    major, dot, minor = str(value).partition(".")
    if not (isinstance(value, str) and dot and major.isdigit() and minor.isdigit()):
        fix = "two whole numbers and a dot" if isinstance(value, str) else "put it in quotes"
        raise InputError("gpu.compute_capability", value, 'must be text such as "8.0"', fix)
    return int(major), int(minor)
