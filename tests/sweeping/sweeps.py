"""A sweep that takes milliseconds a case, and what several tests do with one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

TINY = str(Path(__file__).parent.parent / "theory" / "tiny.yaml")
POLICIES: dict[str, Any] = {"full": [], "snapkv": [{"kind": "snapkv", "budget_tokens": 128}]}


def scenario(num_requests: int = 60) -> dict[str, Any]:
    return {
        "gpu": "a100-sxm-80gb",
        "model": TINY,
        "engine": {"kind": "vllm_v1", "max_model_len": 4096},
        "workload": {
            "arrivals": {"kind": "poisson", "rate_per_s": 200},
            "lengths": {"kind": "fixed", "prompt_tokens": 200, "output_tokens": 20},
            "num_requests": num_requests,
        },
        "policies": POLICIES,
        "slo": {"ttft_p99_s": 1.0},
    }


def sweep_file(num_seeds: int, num_requests: int = 60, **more: Any) -> dict[str, Any]:
    """Two cases for each seed."""
    return {"scenario": scenario(num_requests), "vary": {"workload.seed": list(range(num_seeds))}, **more}


def write(data: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvsim.cli", "sweep", *map(str, arguments)]


def run_command(*arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "results.parquet").to_pylist()
