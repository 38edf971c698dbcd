"""Compile every kernel for GPUs that are not there, and check registers, spills and shared memory.

    python -m kvsim.kernels.ahead_of_time [--targets 80,90,100] [--kernels ...] [--write docs/kernels.md]

The launches are those that each module's `run` makes (`compile_specs`), with the attributes Triton's launcher would pass. Registers
and stack come from the cubin (`cuobjdump -res-usage` of the Triton wheel), shared memory from Triton's metadata; the compiler
itself does not compare shared memory with the target's limit. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kvsim.kernels
from kvsim.kernels.runtime import CompileSpec

KIB = 1024
SHARED_LIMIT_BYTES = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
"""Most shared memory of a block by compute capability (CUDA C++ Programming Guide, technical specifications)."""
REGISTER_LIMIT = 255
"""32-bit registers a thread can address, all three targets (same source)."""
WARP_SIZE = 32
BEGIN, END = "<!-- made by python -m kvsim.kernels.ahead_of_time --write -->", "<!-- end of the made part -->"


@dataclass(frozen=True)
class Usage:
    """What one compiled launch takes."""

    target: int
    registers: int
    stack_bytes: int
    shared_bytes: int

    def problems(self) -> list[str]:
        found = []
        if self.stack_bytes:
            found.append(f"{self.stack_bytes} B of stack (spills)")
        if self.registers > REGISTER_LIMIT:
            found.append(f"{self.registers} registers > {REGISTER_LIMIT}")
        if self.shared_bytes > SHARED_LIMIT_BYTES[self.target]:
            found.append(f"{self.shared_bytes} B of shared memory > {SHARED_LIMIT_BYTES[self.target]}")
        return found


def compile_for(spec: CompileSpec, target: int) -> Usage:
    """Compile one launch for sm_`target`; raises what Triton raises where it cannot."""
    source = ASTSource(spec.kernel, spec.signature, spec.constants, spec.attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, WARP_SIZE), options=options)
    registers, stack_bytes = resource_usage(compiled.asm["cubin"])
    return Usage(target, registers, stack_bytes, compiled.metadata.shared)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread) of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, timeout=60, check=True)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return int(found[0]), int(found[1])


def unique(specs: Iterable[CompileSpec]) -> list[CompileSpec]:
    """Launches that compile to different code, in order."""
    seen: dict[str, CompileSpec] = {}
    for spec in specs:
        key = repr((spec.kernel_name, spec.signature, spec.constants, spec.attrs, spec.num_warps, spec.num_stages))
        seen.setdefault(key, spec)
    return list(seen.values())


def launches(kernels: Sequence[str]) -> list[tuple[str, CompileSpec]]:
    """(module, launch) of all that the modules compile."""
    return [(name, spec) for name in kernels for spec in unique(kvsim.kernels.load(name).compile_specs())]


def one_of_each_kernel(found: Sequence[tuple[str, CompileSpec]]) -> list[tuple[str, CompileSpec]]:
    """The first launch of every kernel of every module."""
    first: dict[tuple[str, str], tuple[str, CompileSpec]] = {}
    for name, spec in found:
        first.setdefault((name, spec.kernel_name), (name, spec))
    return list(first.values())


def label_cells(name: str, spec: CompileSpec) -> list[str]:
    return [name, spec.kernel_name, spec.label, str(spec.num_warps), str(spec.num_stages)]


def table(found: Sequence[tuple[str, CompileSpec]], targets: Sequence[int]) -> tuple[list[str], list[str]]:
    """Markdown lines of all figures, and every problem found."""
    heads = [f"sm_{t}: registers / stack B / shared KiB" for t in targets]
    lines = ["| module | kernel | launch | warps | stages | " + " | ".join(heads) + " |", "|---" * (5 + len(heads)) + "|"]
    problems = []
    for name, spec in found:
        cells = label_cells(name, spec)
        for target in targets:
            usage = compile_for(spec, target)
            cells.append(f"{usage.registers} / {usage.stack_bytes} / {usage.shared_bytes / KIB:.1f}")
            problems += [f"{name} {spec.kernel_name} ({spec.label}) sm_{target}: {text}" for text in usage.problems()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines, problems


def prose(kernels: Sequence[str]) -> list[str]:
    """A section for each kernel from its docstring, with the arguments of its wrapper."""
    lines = []
    for name in kernels:
        module = kvsim.kernels.load(name)
        lines += [f"### {name}", "", inspect.getdoc(module) or "", "", "**run**", "", inspect.getdoc(module.run) or "", ""]
    return lines


def document(kernels: Sequence[str], lines: Sequence[str]) -> str:
    limits = ", ".join(f"sm_{target} {limit // KIB} KiB" for target, limit in SHARED_LIMIT_BYTES.items())
    return "\n".join([
        BEGIN, "", "## Kernels", "", *prose(kernels), "## Compiled ahead of time", "",
        f"Triton {triton.__version__}. Limits: {REGISTER_LIMIT} registers, no stack, shared memory a block {limits}.", "",
        *lines, "", END,
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="80,90,100", help="compute capabilities without their point")
    parser.add_argument("--kernels", default=",".join(kvsim.kernels.KERNELS))
    parser.add_argument("--write", type=Path, help="put the made part into this file, between its markers")
    options = parser.parse_args(arguments)
    kernels = options.kernels.split(",")
    lines, problems = table(launches(kernels), [int(target) for target in options.targets.split(",")])
    if options.write:
        text = options.write.read_text()
        start, end = text.index(BEGIN), text.index(END) + len(END)
        options.write.write_text(text[:start] + document(kernels, lines) + text[end:])
    else:
        print("\n".join(lines))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
