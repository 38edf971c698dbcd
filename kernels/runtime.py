"""What all kernels share at launch: where Triton can run, how a launch is made or recorded, and the dot of the interpreter.

`launch` is the one place where a kernel starts. Within `recorded` it notes instead what Triton's launcher would have compiled
(types, arguments equal to 1 turned into constants, divisibility by 16): ahead-of-time figures are of the very same launches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on CPU tensors. Fixed when this module is imported, as it is for Triton."""
ASSUMED_MULTIPROCESSORS = 108
"""Of an A100 (NVIDIA A100 whitepaper), where no device is there to ask: the interpreter and ahead-of-time compilation."""
DIVISIBILITY = 16
"""Triton's launcher notes which pointers (bytes) and integers are divisible by 16 (triton/backends/compiler.py)."""
_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


class TritonUnavailable(RuntimeError):
    """The tensors lie where Triton cannot run. Nothing is computed in its stead: call `reference` where that is meant."""


@dataclass(frozen=True)
class CompileSpec:
    """One launch as the compiler sees it. `signature`, `constants` and `attrs` are those of `triton.compiler.ASTSource`."""

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int

    @property
    def kernel_name(self) -> str:
        return str(self.kernel.__name__)


_recorder: ContextVar[list[CompileSpec] | None] = ContextVar("recorder", default=None)
_label: ContextVar[str] = ContextVar("label", default="")


@triton.jit
def dot(a, b, FP32_DOT: tl.constexpr):
    """a @ b in fp32. FP32_DOT (pass INTERPRETED): the interpreter's product of bf16 tiles is wrong, so it gets fp32 ones."""
    if FP32_DOT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


def recorded(label: str, call: Callable[[], Any]) -> list[CompileSpec]:
    """The launches that `call` would make, none of which is made; its results are not computed. Needs no GPU."""
    if INTERPRETED:
        raise TritonUnavailable("TRITON_INTERPRET=1 leaves nothing to compile; unset it before importing kvsim.kernels")
    specs: list[CompileSpec] = []
    tokens = _recorder.set(specs), _label.set(label)
    try:
        call()
    finally:
        _recorder.reset(tokens[0])
        _label.reset(tokens[1])
    return specs


def specs_of(label: str, run: Callable[..., Any], make_inputs: Callable[..., Any], shape: Any, **options: Any) -> list[CompileSpec]:
    """What `run` would launch on CPU inputs of `shape`."""
    return recorded(label, lambda: run(**make_inputs(shape, np.random.default_rng(0), "cpu"), **options))


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
) -> None:
    """Start `kernel` over `grid` with positional run-time arguments and constexprs by name; empty grids start nothing.

    Raises TritonUnavailable for CPU tensors without the interpreter.
    """
    specs = _recorder.get()
    if specs is not None:
        specs.append(compile_spec(_label.get(), kernel, args, constexprs, num_warps, num_stages))
        return
    require_triton(next(arg.device for arg in args if isinstance(arg, torch.Tensor)))
    if 0 not in grid:
        kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)


def require_triton(device: torch.device) -> None:
    """Raises TritonUnavailable unless kernels can run on tensors of `device`."""
    if device.type != "cuda" and not INTERPRETED:
        raise TritonUnavailable(
            f"device={device} must be a CUDA device; move the tensors, set TRITON_INTERPRET=1 before Triton is imported to "
            "interpret kernels on the CPU, or call `reference`"
        )


def compile_spec(
    label: str, kernel: Any, args: tuple[Any, ...], constexprs: dict[str, Any], num_warps: int, num_stages: int
) -> CompileSpec:
    """Types, constants and attributes as the launcher derives them from arguments (triton/runtime/jit.py)."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    names = list(kernel.arg_names)
    values = dict(zip(names, args, strict=False)) | constexprs
    for index, name in enumerate(names):
        value = values[name]
        if name in constexprs:
            kind, divisible = "constexpr", False
        elif kernel.params[index].do_not_specialize:
            kind, divisible = "i32" if -(2**31) <= value < 2**31 else "i64", False
        else:
            kind, divisible = _specialize(value)
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif divisible:
            attrs[(index,)] = [["tt.divisibility", DIVISIBILITY]]
    return CompileSpec(label, kernel, signature, constants, attrs, num_warps, num_stages)


def _specialize(value: Any) -> tuple[str, bool]:
    """Type of a run-time argument and whether it is divisible by 16; None and 1 become constants."""
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}", value.data_ptr() % DIVISIBILITY == 0
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
        return "constexpr", False
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % DIVISIBILITY == 0
    return "fp32", False


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; an A100's where there is none."""
    if device.type != "cuda":
        return ASSUMED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
