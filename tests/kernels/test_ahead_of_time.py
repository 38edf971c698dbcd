"""Every kernel compiles for sm_80, sm_90 and sm_100 with no GPU, without spills and within limits, as `run` would launch it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SAMPLE = """
import json, sys
import kvsim.kernels
from kvsim.kernels import ahead_of_time as aot
found = aot.one_of_each_kernel(aot.launches(kvsim.kernels.KERNELS))
rows = []
for index, (name, spec) in enumerate(found):
    usage = aot.compile_for(spec, (90, 80, 100)[index % 3])
    rows.append([name, spec.kernel_name, usage.target, usage.registers, usage.problems()])
json.dump(rows, sys.stdout)
"""
SPILLS = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvsim.kernels.ahead_of_time import Usage, resource_usage
from greedy_kernel import greedy
source = ASTSource(greedy, {"x_ptr": "*fp32"}, {}, {(0,): [["tt.divisibility", 16]]})
compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1, "num_stages": 1})
usage = Usage(80, *resource_usage(compiled.asm["cubin"]), shared_bytes=164 * 1024)
print(json.dumps([usage.problems(), Usage(90, 255, 0, 164 * 1024).problems()]))
"""
GREEDY = """
import triton
import triton.language as tl

@triton.jit
def greedy(x_ptr):
    index = tl.arange(0, 16384)
    x = tl.load(x_ptr + index)
    tl.store(x_ptr + index, x - tl.sum(x, 0))
"""
DOCUMENT = """
import sys
import kvsim.kernels
from kvsim.kernels import ahead_of_time as aot
found = aot.launches(kvsim.kernels.KERNELS)
print("\\n".join([*aot.prose(kvsim.kernels.KERNELS), *("| " + " | ".join(aot.label_cells(*item)) + " |" for item in found)]))
"""
NATIVE = """
import torch
from triton.backends.compiler import BaseBackend
from triton._C.libtriton import native_specialize_impl
from kvsim.kernels.runtime import _specialize
aligned = torch.empty(64)
values = [aligned, aligned[1:], aligned.half(), aligned.to(torch.uint8), torch.empty(4, dtype=torch.int32), 16, 17, 1, 0, 2**31, -16]
for value in (*values, 1.5, None):
    kind, key = native_specialize_impl(BaseBackend, value, False, True, True)
    ours, divisible = _specialize(value)
    assert (ours, divisible) == (kind, key == "D" if kind != "constexpr" else False), (value, kind, key, ours, divisible)
"""


def compiled(code: str, tmp_path: Path, timeout_s: int = 300) -> str:
    """Output of `code` in a process without the interpreter and with an empty cache of compiled kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_one_launch_of_every_kernel(tmp_path: Path) -> None:
    """Targets in turn; the full table (`-m slow`) is every launch on every target."""
    rows = json.loads(compiled(SAMPLE, tmp_path))
    assert len({(name, kernel) for name, kernel, *_ in rows}) == len(rows) >= 20
    assert {target for _, _, target, *_ in rows} == {80, 90, 100}
    assert all(8 <= registers <= 255 for *_, registers, _ in rows)
    assert [(*row[:3], row[4]) for row in rows if row[4]] == []


@pytest.mark.slow
def test_every_launch_on_every_target(tmp_path: Path) -> None:
    compiled("import sys; from kvsim.kernels.ahead_of_time import main; sys.exit(main([]))", tmp_path, timeout_s=1200)


def test_a_kernel_that_takes_too_much_is_found(tmp_path: Path) -> None:
    """A warp that holds 512 numbers a thread spills; 164 KiB of shared memory fit sm_90, not sm_80. The compiler minds neither."""
    (tmp_path / "greedy_kernel.py").write_text(GREEDY)
    too_much, fits = json.loads(compiled(SPILLS, tmp_path))
    assert any("spills" in problem for problem in too_much) and any("shared" in problem for problem in too_much)
    assert fits == []


def test_document_is_up_to_date(tmp_path: Path) -> None:
    """Prose and the launches of the table in docs/kernels.md are those of the code; figures are made by --write."""
    text = (ROOT / "docs/kernels.md").read_text()
    missing = [line for line in compiled(DOCUMENT, tmp_path).splitlines() if line.rstrip(" |") not in text]
    assert missing == [], "run python -m kvsim.kernels.ahead_of_time --write docs/kernels.md"


def test_types_and_divisibility_are_those_of_the_launcher(tmp_path: Path) -> None:
    compiled(NATIVE, tmp_path)
