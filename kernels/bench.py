"""Time every kernel on a device, beside torch and against the device's own copy and matmul rates.

    python -m kvsim.kernels.bench [--device cuda|cpu] [--kernels decode_attention,...] [--budget-s 480] --out DIR

Writes DIR/kernels.json: a header with device and versions, and a row for each kernel, shape and variant ("triton"; "torch ..." for
a baseline; on a CPU "reference", which says nothing of the kernels). An interrupted run goes on where it stopped when
given the same DIR. Inputs are cold: copies larger than twice the L2 take turns. Needs torch, Triton and numpy only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvsim.kernels
from kvsim.kernels import bench_cases
from kvsim.kernels.bench_timing import Call, ceilings, device_facts, input_bytes, percentiles_us, ring_of, time_calls

FILE_NAME = "kernels.json"
SCHEMA_VERSION = 1
ROW_S = {"cuda": 0.15, "cpu": 0.02}
"""Seconds of samples a row: some hundred rows, compiled first, fit into eight minutes."""
SEED = 0

Row = dict[str, Any]


def key(row: Row) -> tuple[str, str, str]:
    return row["kernel"], row["variant"], json.dumps(row["shape"], sort_keys=True)


class Results:
    """Rows on disk; refuses to continue a file of another device or other versions."""

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE_NAME
        self.header: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **facts, "commands": []}
        self.rows: list[Row] = []
        if self.path.exists():
            content = json.loads(self.path.read_text())
            for name, value in self.header.items():
                found = content["header"].get(name)
                if name != "commands" and found != value:
                    raise ValueError(f"{self.path}:{name}={found!r} must be {value!r} to go on here; give another --out")
            self.header, self.rows = content["header"], content["rows"]

    def keys(self) -> set[tuple[str, str, str]]:
        return {key(row) for row in self.rows if row["status"] == "ok"}

    def add(self, row: Row) -> None:
        self.rows = [old for old in self.rows if key(old) != key(row)]
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Replaced in one step: a crash never leaves half of it."""
        partial = self.path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
        rows = ",\n".join(json.dumps(row, allow_nan=False) for row in self.rows)
        partial.write_text(f'{{"header": {json.dumps(self.header)},\n"rows": [\n{rows}\n]}}\n')
        os.replace(partial, self.path)


def variants(kernel: str, shape: Any, device: torch.device) -> Iterator[tuple[str, Call]]:
    """What is timed on inputs of a shape: the kernel (on a CPU its reference), and torch where it has a comparable call."""
    module = kvsim.kernels.load(kernel)
    if device.type == "cuda":
        yield "triton", lambda inputs: module.run(**inputs)
    else:
        yield "reference", lambda inputs: module.reference(**inputs)
    beside = bench_cases.baseline(kernel, shape)
    if beside:
        yield beside


def measure(kernel: str, variant: str, call: Call, shape: Any, device: torch.device, rates: dict[str, float]) -> Row:
    """One row; a failure is a row whose status says what went wrong, so that the others are still measured."""
    module = kvsim.kernels.load(kernel)
    row: Row = {"kernel": kernel, "variant": variant, "shape": dataclasses.asdict(shape)}
    try:
        ring = ring_of(module.make_inputs(shape, np.random.default_rng(SEED), device), device)
        times_s, mode = time_calls(call, ring, device, ROW_S[device.type])
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {**row, "status": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    num_bytes, flops, p50_s = float(module.bytes_moved(shape)), float(module.flops(shape)), float(np.median(times_s))
    gb_per_s, tflop_per_s = num_bytes / p50_s / 1e9, flops / p50_s / 1e12
    working_set = sum(input_bytes(inputs) for inputs in ring)
    return {
        **row, "status": "ok", "mode": mode, **percentiles_us(times_s), "repeats": len(times_s), "bytes_moved": num_bytes,
        "flops": flops, "gb_per_s": gb_per_s, "tflop_per_s": tflop_per_s, "of_copy_frac": gb_per_s / rates["copy_gb_per_s"],
        "of_matmul_frac": tflop_per_s / rates["matmul_tflop_per_s"], "buffers": len(ring), "working_set_bytes": working_set,
    }  # fmt: skip


def run(device: torch.device, kernels: Sequence[str], budget_s: float, directory: Path, command: str) -> int:
    """Measure what is missing in `directory`; returns how many rows are still missing when the budget ends."""
    start_s = time.monotonic()
    facts = device_facts(device)
    results = Results(directory, facts)
    results.header["commands"].append({"command": command, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    if "ceilings" not in results.header:
        results.header["ceilings"] = ceilings(device, ROW_S[device.type])
    results.save()
    done, missing = results.keys(), 0
    for kernel in kernels:
        for shape in bench_cases.cases(kernel, small=device.type == "cpu"):
            for variant, call in variants(kernel, shape, device):
                wanted = key({"kernel": kernel, "variant": variant, "shape": dataclasses.asdict(shape)})
                if wanted in done:
                    continue
                done.add(wanted)
                if time.monotonic() - start_s > budget_s:
                    missing += 1
                    continue
                row = measure(kernel, variant, call, shape, device, results.header["ceilings"])
                results.add(row)
                print(summary(row), flush=True)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    return missing


def summary(row: Row) -> str:
    fields = " ".join(f"{name}={value}" for name, value in row["shape"].items() if name not in ("block_size", "ragged"))
    if row["status"] != "ok":
        return f"{row['kernel']} [{row['variant']}] {fields}: {row['status']}"
    rate = f"{row['gb_per_s']:.0f} GB/s ({row['of_copy_frac']:.0%} of copy), {row['tflop_per_s']:.1f} TFLOP/s"
    return f"{row['kernel']} [{row['variant']}] {fields}: {row['p50_us']:.1f} us, {rate}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernels", default=",".join(kvsim.kernels.KERNELS), help="names, with commas between them")
    parser.add_argument("--budget-s", type=float, default=480, help="no row is begun after so many seconds")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {FILE_NAME}")
    options = parser.parse_args(arguments)
    kernels = options.kernels.split(",")
    unknown = sorted(set(kernels) - set(kvsim.kernels.KERNELS))
    if unknown:
        parser.error(f"--kernels {','.join(unknown)}: must be of {', '.join(kvsim.kernels.KERNELS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu to time the references")
    command = "python -m kvsim.kernels.bench " + " ".join(sys.argv[1:] if arguments is None else arguments)
    missing = run(torch.device(options.device), kernels, options.budget_s, options.out, command)
    if missing:
        print(f"{missing} rows are missing: the budget of {options.budget_s:.0f} s is spent; run again with the same --out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
