"""What machine is this: the facts that go into the header of a measurement, read without changing any setting."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from kvsim.units import GIB, KIB, MIB

DEFAULT_CACHE_BYTES = 64 * MIB
"""Assumed last-level cache where nothing reports one."""


def cache_bytes(device: torch.device) -> int:
    """L2 of a GPU, last-level cache of a CPU."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or DEFAULT_CACHE_BYTES
    scale = {"K": KIB, "M": MIB, "G": GIB}
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _read(path)
        if text[:-1].isdigit() and text[-1:] in scale:
            sizes.append(int(text[:-1]) * scale[text[-1]])
    return max(sizes) or DEFAULT_CACHE_BYTES


def free_memory_bytes(device: torch.device) -> float:
    """Memory a benchmark may still take: of the GPU, or of this machine and its control group."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [float("inf")]
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(float(line.split()[1]) * KIB)
    limit, used = _read(Path("/sys/fs/cgroup/memory.max")), _read(Path("/sys/fs/cgroup/memory.current"))
    if limit.isdigit() and used.isdigit():
        limits.append(float(limit) - float(used))
    return min(limits)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def facts(device: torch.device) -> dict[str, Any]:
    """Header fields that name the software and the state of the device."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None,
        "python": platform.python_version(),
        "host_cpus": torch.get_num_threads(),
        "driver": None,
        "clocks": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cudnn": torch.backends.cudnn.version(),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
        found |= _driver_and_clocks(device)
    return found


QUERY = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "celsius",
}


def _driver_and_clocks(device: torch.device) -> dict[str, Any]:
    """From nvidia-smi when it is there; None otherwise. Reads only."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)},uuid", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    ours = [line for line in lines if str(uuid) in line] or lines
    values = dict(zip(QUERY.values(), ours[0].split(", "), strict=False)) if len(ours) == 1 else {}
    return {"driver": values.pop("driver", None), "clocks": values or None}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
