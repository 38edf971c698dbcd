"""Every kernel that a policy names exists, and every module keeps the same contract."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kvsim.kernels
import kvsim.ops
from kvsim.kernels import KERNELS, checks, layouts, load, packing, runtime

ROOT = Path(__file__).parent.parent.parent
ALLOWED_IMPORTS = {"torch", "triton", "numpy", "kvsim"} | set(sys.stdlib_module_names)


def names_in_policies() -> set[str]:
    """First arguments of all PolicyKernel(...) calls in the simulator that a policy owns, none of them computed."""
    found = set()
    for path in (ROOT / "kvsim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "PolicyKernel":
                owner = [*node.args[4:5], *(keyword.value for keyword in node.keywords if keyword.arg == "owner")]
                if owner and getattr(owner[0], "value", None) == "engine":
                    continue  # what an engine does to its cache whatever the policy
                named = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "kernel")]
                assert named and isinstance(named[0], ast.Constant), f"{path}:{node.lineno} computes the kernel's name"
                found.add(named[0].value)
    return found


def test_every_kernel_that_a_policy_names_exists() -> None:
    names = names_in_policies()
    assert {"prefill_scores", "decode_attention_scored", "select", "compact", "kv_quantize"} <= names
    assert names <= set(KERNELS)
    order = [field.name for field in fields(kvsim.ops.PolicyKernel)]
    assert (order.index("kernel"), order.index("owner")) == (0, 4)


def size_field(shape: object) -> str:
    return "tokens" if hasattr(shape, "tokens") else "num_slots"


@pytest.mark.parametrize("name", KERNELS)
def test_contract(name: str) -> None:
    """Same names everywhere; `run` and `reference` take what `make_inputs` gives; bytes and FLOPs grow with the shape."""
    module = load(name)
    assert inspect.getdoc(module) and inspect.getdoc(module.run) and inspect.getdoc(module.reference)
    assert is_dataclass(module.Shape) and module.Shape.__dataclass_params__.frozen
    shape = module.Shape()
    assert shape == module.Shape()
    inputs = module.make_inputs(shape, np.random.default_rng(0), "cpu")
    for function in (module.run, module.reference):
        inspect.signature(function).bind(**inputs)
    small, large = (replace(shape, **{size_field(shape): tokens}) for tokens in (4096, 8192))
    assert 0 < 1.5 * module.bytes_moved(small) < module.bytes_moved(large) < 2.5 * module.bytes_moved(small)
    assert 0 <= module.flops(small) <= module.flops(large)
    assert module.TOLERANCE and all(isinstance(dtype, torch.dtype) for dtype in module.TOLERANCE)
    assert inspect.signature(module.compile_specs).parameters == {}


@pytest.mark.parametrize("name", KERNELS)
def test_inputs_follow_the_generator(name: str) -> None:
    module = load(name)
    first, same, other = (module.make_inputs(module.Shape(), np.random.default_rng(seed), "cpu") for seed in (1, 1, 2))
    tensors = [key for key, value in first.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert tensors
    assert all(torch.equal(first[key].nan_to_num(), same[key].nan_to_num()) for key in tensors)
    assert not all(torch.equal(first[key].nan_to_num(), other[key].nan_to_num()) for key in tensors)


def test_kernels_import_only_torch_triton_numpy_and_themselves() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] in ALLOWED_IMPORTS, f"{path.name} imports {module}"
                assert not module.startswith("kvsim") or module.startswith("kvsim.kernels"), f"{path.name} imports {module}"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_package_alone_imports_neither_torch_nor_triton() -> None:
    done = run_python("import sys, kvsim.kernels, kvsim.cli; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr


def test_without_gpu_or_interpreter_run_refuses() -> None:
    """It neither falls back to the reference nor ends in an error from inside Triton."""
    done = run_python(
        "import numpy as np; from kvsim.kernels import load; m = load('decode_attention');"
        "m.run(**m.make_inputs(m.Shape(tokens=4), np.random.default_rng(0), 'cpu'))"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("kvsim.kernels.runtime.TritonUnavailable: device=cpu must be a CUDA device;")


def test_recording_in_the_interpreter_is_refused() -> None:
    if runtime.INTERPRETED:
        with pytest.raises(runtime.TritonUnavailable, match="TRITON_INTERPRET"):
            runtime.recorded("", lambda: None)


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^name='flash' must be a kernel; choose one of decode_attention, "):
        load("flash")


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_caches_of_every_layout(layout: str) -> None:
    """Slots that heads hold are finite, all others NaN; heads of the first length are empty; blocks are nobody else's."""
    shape = layouts.CacheShape(batch=2, kv_heads=3, tokens=37, layout=layout, ragged=True, head_dim=64)
    cache = layouts.make_cache(shape, np.random.default_rng(), "cpu")
    view = layouts.view_kv(**cache)
    assert shape.pair_lengths()[0] == 0 and shape.pair_lengths()[-1] == 37 <= view.max_tokens
    held = []
    for pair, length in enumerate(shape.pair_lengths()):
        rows = layouts.tokens_of(cache["k"], cache["block_table"], *divmod(pair, 3), length)
        assert rows.shape == (length, 64) and not rows.isnan().any()
        held.append(rows)
    assert int((~cache["k"].isnan()).all(-1).sum()) == sum(shape.pair_lengths())
    rows = torch.cat(held)
    assert len(torch.unique(rows.float(), dim=0)) == len(rows)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_goes_both_ways(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 7, 96), dtype=torch.int32)
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 7, 96 * bits // 8)
    assert torch.equal(packing.unpack(packed, bits), codes)
    assert int(packed[0, 0, 0]) & (2**bits - 1) == int(codes[0, 0, 0]), "the first channel is in the lowest bits"


def test_kivi_takes_three_and_five_bits() -> None:
    """2 and 4 bits with an fp16 scale and minimum for 32 elements (policies.md, KIVI)."""
    for bits, effective in ((2, 3), (4, 5)):
        for fmt in packing.kivi_formats(bits):
            assert fmt.stored_bytes(64, 128) * 8 == effective * 64 * 128


def test_checks_name_argument_value_rule_and_fix() -> None:
    with pytest.raises(ValueError, match=r"^kept=9 must be within 0 and the length 8; lower kept$"):
        checks.budget("kept", 9, 8)
    with pytest.raises(ValueError, match=r"^head_dim=72 must be one of 64, 80, 96, 128, 256; choose one of these$"):
        checks.head_dim(72)
    with pytest.raises(ValueError, match=r"^x must be|^x=list must be a torch.Tensor; pass a tensor$"):
        checks.tensor("x", [1], torch.int32)
    with pytest.raises(ValueError, match=r"^q.shape\[1\]=34 must be 1 to 16 times the 2 KV heads; "):
        checks.group_of(34, 2)
